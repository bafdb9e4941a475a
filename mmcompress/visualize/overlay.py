# SPDX-License-Identifier: Apache-2.0
"""Overlays on pictures: the fate of every cell, and values as colours. Pillow and numpy only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from ..explain.fates import DROPPED, KEPT, Step
from ..explain.panes import Pane, picture_number
from ..pictures import to_rgb
from .colours import DIM, GLOW, KEPT_EDGE, SEAM, TINT, cluster_colour, heat

Draw = Callable[[Image.Image, Pane], Image.Image]
_THUMBNAIL, _GAP = 0.45, 8
"""Size of the thumbnail beside the tiles, and the space between them in pixels."""


def fate_overlay(picture: Image.Image, pane: Pane, step: Step, first: int = 0) -> Image.Image:
    """`picture` behind a stage: dropped cells are dark, those of a merged token have the colour of their cluster and a line around
    it, kept ones are as they were, with a white frame. first: number of the visual's first cell in `step`."""
    cells = first + pane.cells
    bright = np.asarray(to_rgb(picture), dtype=np.float32)
    at = _cell_at(pane, picture.size)
    fate = _spread(step.fate[cells], at, DROPPED)
    owner = _spread(step.stands[cells], at, -1)
    many = _spread(step.share[cells], at, 0) > 1
    grey = bright.mean(2, keepdims=True)
    out = np.where((fate == DROPPED)[..., None], DIM * (0.5 * bright + 0.5 * grey), bright)
    colours = np.zeros((len(step.stands) + 1, 3), dtype=np.float32)
    for cell in np.unique(owner[many]):
        colours[cell] = cluster_colour(int(cell))
    tinted = many & (fate != DROPPED)
    out[tinted] = (1 - TINT) * out[tinted] + TINT * colours[owner[tinted]]
    edge = _changes(owner) & tinted
    out[edge] = 0.3 * out[edge] + 0.7 * colours[owner[edge]]
    result = Image.fromarray(out.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(result)
    for y, x in (step.fate[cells] == KEPT).nonzero().tolist():
        box = cell_box(pane, y, x, picture.size)
        if box[2] >= box[0] and box[3] >= box[1]:
            pen.rectangle(box, outline=KEPT_EDGE)
    return _with_seams(result, pane)


def heat_overlay(picture: Image.Image, pane: Pane, values: Tensor) -> Image.Image:
    """`picture` under the colours of `values` (a visual's cells, 0 to 1), more of them the higher; cells without a value (NaN) are
    hatched."""
    at = _cell_at(pane, picture.size)
    shown = _spread(values[pane.cells].float(), at, np.nan)
    below = np.asarray(to_rgb(picture), dtype=np.float32)
    part = (GLOW[0] + GLOW[1] * np.nan_to_num(shown))[..., None]
    out = below * (1 - part) + heat(shown) * part
    y, x = np.indices(shown.shape)
    stripes = np.where((x + y) % 8 < 2, 110.0, 0.0)[..., None]
    out = np.where(np.isnan(shown)[..., None], 0.15 * below + 0.4 * stripes, out)
    return _with_seams(Image.fromarray(out.clip(0, 255).astype(np.uint8)), pane)


def laid_out(
    pictures: Sequence[Image.Image], panes: Sequence[Pane], draw: Draw, side: int = 480, frame: int = 0
) -> Image.Image:
    """A visual as one picture of at most `side` pixels: a picture or its tiles with the thumbnail beside them; of a video a frame.

    pictures: the picture, or one for each frame; none: a grey one of the grid's shape.
    """
    shown = [p for p in panes if p.role not in ("frame", "thumbnail") or (p.role == "frame" and p.frame == frame)]
    small = [p for p in panes if p.role == "thumbnail"] if shown else []
    parts = [(pane, side) for pane in shown or list(panes)[:1]] + [(pane, round(side * _THUMBNAIL)) for pane in small]
    drawn = [draw(scaled(picture_of(pictures, panes, pane), size), pane) for pane, size in parts]
    result = Image.new(
        "RGB",
        (sum(d.width for d in drawn) + _GAP * (len(drawn) - 1), max(d.height for d in drawn)),
        (255, 255, 255),
    )
    left = 0
    for part in drawn:
        result.paste(part, (left, 0))
        left += part.width + _GAP
    return result


def picture_of(pictures: Sequence[Image.Image], panes: Sequence[Pane], pane: Pane) -> Image.Image:
    """What a pane lies on; without pictures something grey."""
    if not pictures:
        rows, columns = pane.grid
        return Image.new("RGB", (24 * columns, 24 * rows), (150, 150, 150))
    return pictures[picture_number(panes, pane, len(pictures))]


def scaled(picture: Image.Image, side: int) -> Image.Image:
    """With `side` pixels along the longer side."""
    scale = side / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return to_rgb(picture).resize(size, Image.Resampling.BICUBIC)


def cell_box(pane: Pane, row: int, column: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """First and last pixel of a cell on a picture of `size` (width, height): left, top, right, bottom."""
    x, y = _edges(pane, size)
    return int(x[column]), int(y[row]), int(x[column + 1]) - 1, int(y[row + 1]) - 1


def _edges(pane: Pane, size: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pixels at which the columns and the rows of a pane begin, and where they end."""
    (rows, columns), (left, top, right, bottom) = pane.grid, pane.box
    return tuple(  # type: ignore[return-value]
        (np.linspace(a, b, n + 1) * pixels).round().clip(0, pixels).astype(np.int64)
        for a, b, n, pixels in ((left, right, columns, size[0]), (top, bottom, rows, size[1]))
    )


def _cell_at(pane: Pane, size: tuple[int, int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Column of every x and row of every y, -1 where the pane does not reach."""
    found = []
    for edges, pixels in zip(_edges(pane, size), size, strict=True):
        at = np.searchsorted(edges, np.arange(pixels), side="right") - 1
        found.append(np.where((at < 0) | (at >= len(edges) - 1), -1, at))
    return found[0], found[1]


def _spread(grid: Tensor, at: tuple[NDArray[np.int64], NDArray[np.int64]], outside: float) -> NDArray[Any]:
    """Values [rows, columns] at every pixel, [height, width]."""
    x, y = at
    values = grid.numpy()[y.clip(0)][:, x.clip(0)]
    inside = (y >= 0)[:, None] & (x >= 0)
    return np.where(inside, values, np.asarray(outside, dtype=values.dtype))


def _changes(owner: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Pixels beside one of another owner."""
    edge = np.zeros(owner.shape, dtype=bool)
    across, down = owner[:, 1:] != owner[:, :-1], owner[1:] != owner[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    return edge


def _with_seams(picture: Image.Image, pane: Pane) -> Image.Image:
    """Orange lines where another tile begins."""
    pen, (width, height) = ImageDraw.Draw(picture), picture.size
    (rows, columns), (left, top, right, bottom) = pane.grid, pane.box
    for seam in pane.seams[0]:
        y = round((top + (bottom - top) * seam / rows) * height)
        pen.line((max(0, round(left * width)), y, min(width, round(right * width)), y), fill=SEAM, width=2)
    for seam in pane.seams[1]:
        x = round((left + (right - left) * seam / columns) * width)
        pen.line((x, max(0, round(top * height)), x, min(height, round(bottom * height))), fill=SEAM, width=2)
    return picture
