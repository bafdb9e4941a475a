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
    first  how many tokens the crops before them keep.
    """

    cells: Tensor
    k: int
    whole: bool = False
    first: int = 0

    @functools.cached_property
    def _flat(self) -> Tensor:
        return self.cells.flatten()

    @functools.cached_property
    def _begins(self) -> Tensor:
        """Number of the first token that each crop keeps, [g, 1]."""
        return self.first + self.k * torch.arange(len(self.cells), device=self.cells.device)[:, None]

    def take(self, x: Tensor) -> Tensor:
        """The tokens of these crops, [U * g, n, ...], of `x` [U, N, ...]."""
        if self.whole:
            return x
        crops, tokens = self.cells.shape
        return x.index_select(1, self._flat).view(len(x) * crops, tokens, *x.shape[2:])

    def slots(self, picks: Tensor) -> Tensor:
        """Slots in the visual, [U, g * m], of places in the crops, [U * g, m]."""
        if self.whole:
            return picks
        visuals = len(picks) // len(self.cells)
        cells = self.cells if visuals == 1 else self.cells.repeat(visuals, 1)
        return cells.gather(1, picks).view(visuals, len(self.cells) * picks.shape[1])

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """`x` [U, N] with the `values` [U * g, n] of the tokens of these crops."""
        return values if self.whole else x.index_copy(1, self._flat, values.reshape(len(x), -1))

    def numbers(self, kept: Tensor) -> Tensor:
        """Numbers of tokens that are kept, [U * g, m] in [0, k) for each crop, among those of all crops, [U, g, m]."""
        return kept if self.whole else kept.unflatten(0, (-1, len(self.cells))) + self._begins


def alike_crops(views: Sequence[Grid], tokens: int, k: int, device: torch.device) -> list[Crops]:
    """All crops of a visual in the order of their first slots (tiles of one view in raster order), batched where neighbours
    are alike.

    views: the grids that the `tokens` tokens lie in, one behind the other; empty: all tokens are one crop. `k` is split by
    size, exactly (`split_budget`); crops that get nothing are left out. Host arithmetic on shapes, no synchronisation.
    """
    crops = _alike(tuple(views), tokens, k)
    if device.type == "cpu":
        return [*crops]
    return [Crops(part.cells.to(device, non_blocking=True), part.k, part.whole, part.first) for part in crops]


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _alike(views: tuple[Grid, ...], tokens: int, k: int) -> tuple[Crops, ...]:
    """The same on the CPU. The same pictures come again."""
    if not views:
        return (Crops(torch.arange(tokens)[None], k, whole=True),)
    crops = [tile for first, view in _starts(views) for tile in _tiles(first, view)]
    runs = groupby(
        zip(crops, split_budget(k, [len(crop) for crop in crops]), strict=True),
        key=lambda crop: (len(crop[0]), crop[1]),
    )
    found: list[Crops] = []
    total = 0
    for (_, quota), run in runs:
        if quota:
            cells = torch.stack([cells for cells, _ in run])
            found.append(Crops(cells, quota, len(crops) == 1, total))
            total += quota * len(cells)
    return tuple(found)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """What was made of one crop, or block of tokens, after the other, [U, n, ...] each, side by side."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _starts(views: Sequence[Grid]) -> Iterator[tuple[int, Grid]]:
    """Every view with its first slot."""
    first = 0
    for view in views:
        yield first, view
        first += view.grid[0] * view.grid[1]


def _tiles(first: int, view: Grid) -> tuple[Tensor, ...]:
    """Slots of each tile of a view; a cell belongs to the tile that its centre is in."""
    if not any(view.seams):
        return (torch.arange(first, first + view.grid[0] * view.grid[1]),)
    numbers = view.tiles()
    cells = first + numbers.sort(stable=True).indices
    return tuple(tile for tile in cells.split(numbers.bincount().tolist()) if len(tile))
