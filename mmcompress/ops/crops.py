# SPDX-License-Identifier: Apache-2.0
"""Crops: what the encoder sees as one picture each (thumbnail, tile, video frame), for methods that treat each alone."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from .shares import split_budget


class Grid(Hashable, Protocol):
    """What is asked of a view of a layout: rows and columns, where in them another tile begins, and the tile of each cell."""

    @property
    def grid(self) -> tuple[int, int]: ...

    @property
    def seams(self) -> tuple[tuple[float, ...], tuple[float, ...]]: ...

    def tiles(self) -> Tensor: ...


@dataclass(frozen=True)
class Crops:
    """Neighbouring crops of the same size and budget, as one batch.

    cells  [g, n] int64: the slots of each crop, ascending.
    k      how many tokens each of them keeps.
    whole  whether it is one crop of all slots.
    """

    cells: Tensor
    k: int
    whole: bool = False

    def take(self, x: Tensor) -> Tensor:
        """The tokens of these crops, [U * g, n, ...], of `x` [U, N, ...]."""
        return x if self.whole else x.index_select(1, self.cells.flatten()).unflatten(1, self.cells.shape).flatten(0, 1)

    def slots(self, picks: Tensor) -> Tensor:
        """Slots in the visual, [U, g * m], of places in the crops, [U * g, m]."""
        if self.whole:
            return picks
        places = picks.unflatten(0, (-1, len(self.cells)))
        return self.cells.expand(len(places), -1, -1).gather(2, places).flatten(1)


def alike_crops(views: Sequence[Grid], tokens: int, k: int, device: torch.device) -> list[Crops]:
    """All crops of a visual in the order of their first slots (tiles of one view in raster order), batched where neighbours
    are alike.

    views: the grids that the `tokens` tokens lie in, one behind the other; empty: all tokens are one crop. `k` is split by
    size, exactly (`split_budget`); crops that get nothing are left out. Host arithmetic on shapes, no synchronisation.
    """
    if not views:
        return [Crops(torch.arange(tokens, device=device)[None], k, whole=True)]
    crops = [tile.to(device, non_blocking=True) for first, view in _starts(views) for tile in _tiles(first, view)]
    budgets = split_budget(k, [len(crop) for crop in crops])
    runs = groupby(zip(crops, budgets, strict=True), key=lambda crop: (len(crop[0]), crop[1]))
    return [
        Crops(torch.stack([cells for cells, _ in run]), quota, whole=len(crops) == 1)
        for (_, quota), run in runs
        if quota
    ]


def _starts(views: Sequence[Grid]) -> Iterator[tuple[int, Grid]]:
    """Every view with its first slot."""
    first = 0
    for view in views:
        yield first, view
        first += view.grid[0] * view.grid[1]


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _tiles(first: int, view: Grid) -> tuple[Tensor, ...]:
    """Slots of each tile of a view, on the CPU; a cell belongs to the tile that its centre is in. The same pictures come again."""
    if not any(view.seams):
        return (torch.arange(first, first + view.grid[0] * view.grid[1]),)
    numbers = view.tiles()
    cells = first + numbers.sort(stable=True).indices
    return tuple(tile for tile in cells.split(numbers.bincount().tolist()) if len(tile))
