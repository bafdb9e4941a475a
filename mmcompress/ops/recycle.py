# SPDX-License-Identifier: Apache-2.0
"""Folding the least important tokens of a grid into one token per cell."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def grid_cells(grids: Sequence[tuple[int, int]], side: float) -> tuple[Tensor, int]:
    """Cell of each token of the grids (rows, columns), one behind the other, [N] int64, and how many cells there are: squares of
    `side` tokens, which need not be a whole number, numbered grid by grid; on the CPU."""
    return _grid_cells(tuple(grids), side)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _grid_cells(grids: tuple[tuple[int, int], ...], side: float) -> tuple[Tensor, int]:
    parts, count = [], 0
    for rows, columns in grids:
        y, x = (torch.arange(n, dtype=torch.float64).div(side).floor().long() for n in (rows, columns))
        down, across = (int((n - 1) / side) + 1 for n in (rows, columns))
        parts.append(count + (y[:, None] * across + x).flatten())
        count += down * across
    return torch.cat(parts), count


@torch.no_grad()
def recycle(importance: Tensor, cell: Tensor, cells: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leave exactly `k` tokens: the less important ones of a cell become one. Returns (keep [U, k] ascending, assign [U, N],
    folded [U, N] bool).

    importance [U, N]; cell [U, N] int64 in [0, cells). Tokens are taken from the least important one on. The first of a cell
    changes nothing by itself, each further one makes the tokens fewer by one, until `k` are left; so any k down to the number of
    cells is met. What was taken of a cell (`folded`) goes into the most important of these (`assign`). With fewer than one
    token per cell those cells are dropped (-1) that are less important. Of equals the higher index is taken first. Cost N log N.
    """
    n = importance.shape[1]
    order = importance.float().sort(dim=1, descending=True, stable=True).indices.flip(1)
    place = torch.arange(n, device=order.device).expand_as(order)
    ranked = cell.gather(1, order)
    none = torch.full((len(order), cells), n, dtype=torch.int64, device=order.device)
    joins = (place != none.scatter_reduce(1, ranked, place, "amin").gather(1, ranked)).long()
    whole = joins.cumsum(1) - joins >= n - k
    last = torch.full_like(none, -1).scatter_reduce(1, ranked, place.masked_fill(whole, -1), "amax")
    speaker = last.gather(1, ranked)
    stays = whole | (place == speaker)
    best = (place + stays * n).sort(dim=1, descending=True).indices[:, :k]
    keep = order.gather(1, best).sort(dim=1).values
    output = torch.full_like(order, -1).scatter(1, keep, place[:, :k])
    by_place = output.gather(1, order)
    by_place = torch.where(whole, by_place, by_place.gather(1, speaker.clamp_min(0)))
    assign = torch.empty_like(order).scatter(1, order, by_place)
    return keep, assign, torch.empty_like(whole).scatter(1, order, ~whole)
