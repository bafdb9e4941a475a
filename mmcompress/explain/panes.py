# SPDX-License-Identifier: Apache-2.0
"""Panes: the grids of a visual as they are looked at, tiles laid together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..visuals import Layout, View

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Pane:
    """One grid of a visual: a picture, its tiles as one grid, the thumbnail, or a frame.

    cells  [rows, columns] int64: number of each cell among all cells of the visual.
    box    left, top, right, bottom of what the grid shows, in parts of the picture; it may reach over the edge.
    role   "image", "tiles", "thumbnail" or "frame". seams: rows and columns (in cells) at which another tile begins.
    frame  number of the frame, for role "frame".
    """

    cells: Tensor
    box: Box = (0.0, 0.0, 1.0, 1.0)
    role: str = "image"
    seams: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())
    frame: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        return self.cells.shape[0], self.cells.shape[1]

    def on_picture(self, values: Tensor, size: tuple[int, int], smooth: bool = True) -> Tensor:
        """Values [rows, columns] at the pixels of a picture of `size` (height, width), [height, width] float32; NaN at cells that
        are missing (NaN) and where the pane does not reach. `smooth`: bilinear between the cells that are there."""
        (height, width), (left, top, right, bottom) = size, self.box
        x = ((torch.arange(width) + 0.5) / width - left) / (right - left)
        y = ((torch.arange(height) + 0.5) / height - top) / (bottom - top)
        inside = ((y >= 0) & (y <= 1))[:, None] & ((x >= 0) & (x <= 1))
        at = torch.stack(torch.meshgrid(2 * y - 1, 2 * x - 1, indexing="ij")[::-1], -1)[None]
        values = values.float().cpu()
        there = ~values.isnan()

        def sampled(grid: Tensor, mode: str) -> Tensor:
            return F.grid_sample(grid[None, None], at, mode, padding_mode="border", align_corners=False)[0, 0]

        seen = (sampled(there.float(), "nearest") > 0) & inside
        filled = values.nan_to_num(0.0)
        if smooth:
            found = sampled(filled, "bilinear") / sampled(there.float(), "bilinear").clamp_min(1e-6)
        else:
            found = sampled(filled, "nearest")
        return found.masked_fill(~seen, float("nan"))


def panes(layout: Layout) -> tuple[Pane, ...]:
    """The panes of a visual, in the order of its views. Single tiles become one pane, laid together as they lie in the picture."""
    found: list[Pane] = []
    tiles: list[tuple[View, int]] = []
    place = first = frames = 0
    for view in layout.views:
        if view.role == "tile":
            place = place if tiles else len(found)
            tiles.append((view, first))
        else:
            cells = torch.arange(first, first + view.cells).view(view.grid)
            found.append(Pane(cells, view.box, view.role, view.seams, frames))
            frames += view.role == "frame"
        first += view.cells
    if tiles:
        found.insert(place, _together(tiles))
    return tuple(found)


def picture_number(found: Sequence[Pane], pane: Pane, pictures: int) -> int:
    """Which of the `pictures` of a visual with panes `found` a pane lies on. A model that reads several frames at a time has fewer
    panes than there are pictures: the first of them."""
    if pane.role != "frame":
        return 0
    together = -(-pictures // max(1, sum(p.role == "frame" for p in found)))
    return min(pane.frame * together, pictures - 1)


def _together(tiles: list[tuple[View, int]]) -> Pane:
    """Tiles (view, number of its first cell) on one grid."""
    tops, lefts = (sorted({view.box[side] for view, _ in tiles}) for side in (1, 0))
    rows, columns = tiles[0][0].grid
    cells = torch.zeros(rows * len(tops), columns * len(lefts), dtype=torch.int64)
    for view, first in tiles:
        y, x = tops.index(view.box[1]) * rows, lefts.index(view.box[0]) * columns
        cells[y : y + rows, x : x + columns] = torch.arange(first, first + view.cells).view(view.grid)
    right, bottom = (max(view.box[side] for view, _ in tiles) for side in (2, 3))
    seams = tuple(tuple(float(n * i) for i in range(1, len(k))) for n, k in ((rows, tops), (columns, lefts)))
    return Pane(cells, (lefts[0], tops[0], right, bottom), "tiles", (seams[0], seams[1]))
