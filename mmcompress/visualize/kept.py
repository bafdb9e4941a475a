# SPDX-License-Identifier: Apache-2.0
"""Overlay of kept tokens on the picture that the encoder saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..trace import VisualTrace

_KEPT_EDGE = (255, 255, 255)
_DIM = 0.22
"""Brightness of a dropped cell."""
_MERGED = 0.5
"""Brightness of a cell that lives on in a merged token at another place."""


def encoded_view(processor: Any, pixel_values: Tensor) -> Image.Image:
    """The picture as the encoder saw it (after resizing and cropping), from pixel values [3, H, W]."""
    images = processor.image_processor
    mean, deviation = (np.asarray(v, dtype=np.float32)[:, None, None] for v in (images.image_mean, images.image_std))
    pixels = (pixel_values.float().cpu().numpy() * deviation + mean).clip(0, 1)
    return Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def kept_overlay(picture: Image.Image, visual: VisualTrace, layer: int | None = None, side: int = 480) -> Image.Image:
    """`picture` (what the encoder saw) with kept cells bright and framed, merged ones dimmed, dropped ones dark.

    layer: show the tokens that enter this LLM layer; None: the last layer.
    """
    last = visual.call.groups[-1].start
    kept = set(visual.kept_cells(last if layer is None else layer).tolist())
    selection = visual.selection
    merged: set[int] = set()
    if selection.assign is not None:
        output_of = {int(slot): j for j, slot in enumerate(selection.keep[0])}
        alive = {output_of[slot] for slot in kept}
        # an output token that stands for no patch of its own (CLS) lights no cell
        kept = {slot for slot in kept if int(selection.assign[0, slot]) == output_of[slot]}
        merged = {slot for slot, j in enumerate(selection.assign[0].tolist()) if j in alive} - kept
    scale = side / max(picture.size)
    shown = picture.convert("RGB").resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    dark = np.asarray(shown, dtype=np.float32)
    out = dark * _DIM
    boxes = (visual.layout.boxes() * Tensor([shown.width, shown.height] * 2)).round().int().tolist()
    for cell, (left, top, right, bottom) in enumerate(boxes):
        factor = 1.0 if cell in kept else _MERGED if cell in merged else None
        if factor is not None:
            out[top:bottom, left:right] = dark[top:bottom, left:right] * factor
    result = Image.fromarray(out.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(result)
    for cell in kept:
        left, top, right, bottom = boxes[cell]
        pen.rectangle((left, top, right - 1, bottom - 1), outline=_KEPT_EDGE)
    return result


@dataclass(frozen=True)
class Panel:
    """One picture of a figure with a line above and a line below it; `good` colours the lower one green or red."""

    picture: Image.Image
    above: str
    below: str
    good: bool | None = None


def kept_figure(rows: Sequence[Sequence[Panel]], title: str, path: Path) -> Path:
    """Write a grid of panels as a PNG; needs matplotlib (`pip install mmcompress[viz]`)."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'mmcompress[viz]'") from error
    columns = max(map(len, rows))
    figure = Figure(figsize=(3.0 * columns, 3.5 * len(rows) + 0.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for j in range(columns):
            axis = axes[i][j]
            axis.set_axis_off()
            if j < len(row):
                panel = row[j]
                axis.imshow(np.asarray(panel.picture))
                axis.set_title(panel.above, fontsize=9)
                color = {True: "#1a7f37", False: "#b42318", None: "#333333"}[panel.good]
                axis.text(
                    0.5, -0.03, panel.below, transform=axis.transAxes, ha="center", va="top", fontsize=10, color=color
                )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
