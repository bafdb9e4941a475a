# SPDX-License-Identifier: Apache-2.0
"""Overlay of kept tokens on the picture that the encoder saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..explain.fates import step_of_layer, steps_of
from ..explain.panes import panes
from ..trace import VisualTrace
from .figure import new_figure, written
from .legend import fate_legend
from .overlay import fate_overlay, laid_out


def encoded_view(processor: Any, pixel_values: Tensor) -> Image.Image:
    """The picture as the encoder saw it (after resizing and cropping), from pixel values [3, H, W]."""
    images = processor.image_processor
    mean, deviation = (np.asarray(v, dtype=np.float32)[:, None, None] for v in (images.image_mean, images.image_std))
    pixels = (pixel_values.float().cpu().numpy() * deviation + mean).clip(0, 1)
    return Image.fromarray((pixels.transpose(1, 2, 0) * 255).round().astype(np.uint8))


def kept_overlay(
    picture: Image.Image, visual: VisualTrace, layer: int | None = None, side: int = 480, frame: int = 0
) -> Image.Image:
    """`picture` with kept cells bright and framed, those of merged tokens in the colours of their clusters, dropped ones dark;
    seams of tiles are orange lines, a thumbnail stands beside the tiles.

    picture: the original picture (what the encoder saw of it, where a processor crops).
    layer: show the tokens that enter this LLM layer; None: the last layer.
    frame: which frame of a video `picture` is (of those that have tokens).
    """
    found = steps_of([visual])
    step = found[-1 if layer is None else step_of_layer(found, layer)]
    return laid_out([picture], panes(visual.layout), lambda scene, pane: fate_overlay(scene, pane, step), side, frame)


@dataclass(frozen=True)
class Panel:
    """One picture of a figure with a line above and a line below it; `good` colours the lower one green or red."""

    picture: Image.Image
    above: str
    below: str
    good: bool | None = None


def kept_figure(rows: Sequence[Sequence[Panel]], title: str, path: Path) -> Path:
    """Write a grid of panels as a PNG, with a legend; needs matplotlib (`pip install mmcompress[viz]`)."""
    columns = max(map(len, rows))
    figure = new_figure(3.0 * columns, 3.5 * len(rows) + 0.9, title)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(rows):
        for j in range(columns):
            axis = axes[i][j]
            axis.set_axis_off()
            if j < len(row):
                panel = row[j]
                axis.imshow(np.asarray(panel.picture))
                axis.set_title(panel.above, fontsize=9, parse_math=False, wrap=True)
                color = {True: "#1a7f37", False: "#b42318", None: "#333333"}[panel.good]
                axis.text(
                    0.5, -0.03, panel.below, transform=axis.transAxes, ha="center", va="top", fontsize=10, color=color,
                    parse_math=False,
                )  # fmt: skip
    fate_legend(figure)
    return written(figure, path)
