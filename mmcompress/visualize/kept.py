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
from ..visuals import Layout

_KEPT_EDGE = (255, 255, 255)
_DIM = 0.22
"""Brightness of a dropped cell."""
_MERGED = 0.5
"""Brightness of a cell that lives on in a merged token at another place."""
_SEAM = (255, 170, 0)
_THUMBNAIL, _GAP = 0.45, 8
"""Size of the thumbnail beside the tiles, and the space between them in pixels."""


def encoded_view(processor: Any, pixel_values: Tensor) -> Image.Image:
    """The picture as the encoder saw it (after resizing and cropping), from pixel values [3, H, W]."""
    images = processor.image_processor
    mean, deviation = (np.asarray(v, dtype=np.float32)[:, None, None] for v in (images.image_mean, images.image_std))
    pixels = (pixel_values.float().cpu().numpy() * deviation + mean).clip(0, 1)
    return Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def kept_overlay(
    picture: Image.Image, visual: VisualTrace, layer: int | None = None, side: int = 480, frame: int = 0
) -> Image.Image:
    """`picture` with kept cells bright and framed, merged ones dimmed, dropped ones dark; seams of tiles are orange lines, a
    thumbnail stands beside the tiles.

    picture: the original picture (what the encoder saw of it, where a processor crops).
    layer: show the tokens that enter this LLM layer; None: the last layer.
    frame: which frame of a video `picture` is (of those that have tokens).
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
    fate = [1.0 if c in kept else _MERGED if c in merged else _DIM for c in range(visual.layout.cells)]
    views = list(enumerate(visual.layout.views))
    first = [sum(view.cells for _, view in views[:i]) for i, _ in views]
    big = [i for i, v in views if v.role != "thumbnail" and (v.role != "frame" or i == frame)]
    small = [i for i, v in views if v.role == "thumbnail"]
    big, small = (big, small) if big else (small, [])
    drawn = [_draw(picture, visual.layout, [(i, first[i]) for i in big], fate, side)]
    if small:
        drawn.append(_draw(picture, visual.layout, [(i, first[i]) for i in small], fate, round(side * _THUMBNAIL)))
    width = sum(d.width for d in drawn) + _GAP * (len(drawn) - 1)
    result = Image.new("RGB", (width, max(d.height for d in drawn)), (255, 255, 255))
    left = 0
    for part in drawn:
        result.paste(part, (left, 0))
        left += part.width + _GAP
    return result


def _draw(
    picture: Image.Image, layout: Layout, views: Sequence[tuple[int, int]], fate: Sequence[float], side: int
) -> Image.Image:
    """`picture` with the cells of some views (number, first cell) as bright as their fate, kept ones framed, seams drawn."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    bright = np.asarray(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    out = bright * _DIM
    framed: list[tuple[int, int, int, int]] = []
    seams: list[tuple[int, int, int, int]] = []
    to_pixels = Tensor([size[0], size[1]] * 2)
    for number, first in views:
        view = layout.views[number]
        boxes = (view.boxes().clamp(0, 1) * to_pixels).round().int().tolist()
        for cell, (left, top, right, bottom) in enumerate(boxes):
            out[top:bottom, left:right] = bright[top:bottom, left:right] * fate[first + cell]
            if fate[first + cell] == 1.0:
                framed.append((left, top, right - 1, bottom - 1))
        (left, top, right, bottom), (rows, columns) = view.box, view.grid
        across = [top + (bottom - top) * seam / rows for seam in view.seams[0]]
        down = [left + (right - left) * seam / columns for seam in view.seams[1]]
        lines = [(left, y, right, y) for y in across] + [(x, top, x, bottom) for x in down]
        if view.role == "tile":
            lines += [(left, top, left, bottom), (left, top, right, top)]
        for x0, y0, x1, y1 in lines:
            seams.append((round(x0 * size[0]), round(y0 * size[1]), round(x1 * size[0]), round(y1 * size[1])))
    result = Image.fromarray(out.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(result)
    for box in framed:
        if box[2] >= box[0] and box[3] >= box[1]:
            pen.rectangle(box, outline=_KEPT_EDGE)
    for line in seams:
        pen.line(line, fill=_SEAM, width=2)
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
