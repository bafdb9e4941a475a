# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of cut-up pictures lie: the arithmetic of processors and packing, shared by the adapters."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..visuals import Layout, View


@functools.lru_cache(maxsize=256)
def best_resolution(size: tuple[int, int], pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Height and width among `pinpoints` that a picture of `size` is fitted into (transformers' `select_best_resolution`)."""
    scales = [min(p[1] / size[1], p[0] / size[0]) for p in pinpoints]
    seen = [min(int(size[1] * s) * int(size[0] * s), size[0] * size[1]) for s in scales]
    return max(zip(seen, pinpoints, strict=True), key=lambda found: (found[0], found[0] - math.prod(found[1])))[1]


@dataclass(frozen=True)
class AnyRes:
    """A picture in the LLaVA-NeXT way: [thumbnail | tiles laid together, without padding, a newline after each row].

    size           height and width of the original picture in pixels.
    pinpoints      the resolutions (height, width) that the picture may be cut from.
    tile, patch    side of a tile and of a patch in pixels.
    most_tiles     OneVision shrinks what has more tokens than that many tiles.
    """

    size: tuple[int, int]
    pinpoints: tuple[tuple[int, int], ...]
    tile: int
    patch: int
    most_tiles: int | None = None

    @property
    def side(self) -> int:
        """Patches per side of a tile."""
        return self.tile // self.patch

    @property
    def target(self) -> tuple[int, int]:
        """Height and width of the padded picture that is cut into tiles."""
        return best_resolution(self.size, self.pinpoints)

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return self.target[0] // self.tile, self.target[1] // self.tile

    @property
    def pads(self) -> tuple[int, int]:
        """Rows and columns of patches that are cut off on both sides."""
        (height, width), (rows, columns) = self.size, (n * self.side for n in self.tiles)
        if width / height > columns / rows:
            return (rows - int(round(height * (columns / width), 7))) // 2, 0
        return 0, (columns - int(round(width * (rows / height), 7))) // 2

    @property
    def shown(self) -> tuple[int, int]:
        """Rows and columns of patches without padding."""
        rows, columns = (n * self.side - 2 * pad for n, pad in zip(self.tiles, self.pads, strict=True))
        return rows, columns

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of LLM tokens: those of `shown`, or shrunk."""
        rows, columns = self.shown
        if self.most_tiles is not None:
            ratio = math.sqrt(rows * columns / (self.most_tiles * self.side**2))
            if ratio > 1.1:
                return int(rows // ratio), int(columns // ratio)
        return rows, columns

    def layout(self) -> Layout:
        (height, width), target = self.size, self.target
        if target[1] / width < target[0] / height:
            picture = (min(math.ceil(height * (target[1] / width)), target[0]), target[1])
        else:
            picture = (target[0], min(math.ceil(width * (target[0] / height)), target[1]))
        ends, seams = [], []
        for axis in (0, 1):
            cells, pad = self.tiles[axis] * self.side, self.pads[axis]
            pixels, offset = target[axis] / cells, (target[axis] - picture[axis]) // 2
            ends.append([(at * pixels - offset) / picture[axis] for at in (pad, cells - pad)])
            starts = [start - pad for start in range(self.side, cells, self.side)]
            factor = self.grid[axis] / max(1, self.shown[axis])
            seams.append(tuple(start * factor for start in starts if 0 < start < self.shown[axis]))
        box = (ends[1][0], ends[0][0], ends[1][1], ends[0][1])
        views = [View((self.side, self.side), role="thumbnail")]
        if 0 not in self.grid:  # nothing is left of the tiles of a picture that is thinner than a patch
            views.append(View(self.grid, box, "tiles", (seams[0], seams[1])))
        first, (rows, columns) = self.side**2, self.grid
        return Layout(tuple(views), tuple(first + (row + 1) * (columns + 1) - 1 for row in range(rows)))

    def pack(self, views: Tensor, nearest: bool = False) -> Tensor:
        """[thumbnail and tiles, side * side, C] in the order of the LLM's tokens, newlines left out: [N, C]."""
        (rows, columns), (row_pad, column_pad) = self.tiles, self.pads
        x = views[1:].unflatten(1, (self.side, self.side)).unflatten(0, (rows, columns))
        x = x.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)
        x = x[:, row_pad : x.shape[1] - row_pad, column_pad : x.shape[2] - column_pad]
        if self.grid != self.shown:
            x = resize(x[None], self.grid, nearest)[0]
        return torch.cat([views[0], x.flatten(1).T])


def resize(x: Tensor, size: Sequence[int], nearest: bool) -> Tensor:
    """[n, C, h, w] at another size: bilinear as in the models, or the value of the nearest cell."""
    if nearest:
        return F.interpolate(x.double(), list(size), mode="nearest-exact").to(x.dtype)
    return F.interpolate(x, list(size), mode="bilinear")


def tiled(rows: int, columns: int, side: int, first: bool = False) -> Layout:
    """rows x columns tiles of side x side tokens each, and the thumbnail behind or `first`, if there is more than one tile."""
    if rows * columns == 1:
        return Layout.raster(1, side, side)
    views = [
        View((side, side), (c / columns, r / rows, (c + 1) / columns, (r + 1) / rows), "tile")
        for r in range(rows)
        for c in range(columns)
    ]
    views.insert(0 if first else len(views), View((side, side), role="thumbnail"))
    return Layout(tuple(views))
