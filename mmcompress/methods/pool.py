# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.groups import apportion, group_sizes, group_sum, of_cells
from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Layout, View, Visuals


@register("pool")
@dataclass(frozen=True, repr=False)
class Pool(InputStage):
    """Average pooling of the grid of every view to exactly k tokens: sees only where tokens lie.

    Each view gets its part of k by its number of tokens, and is cut into as many groups. Where equal blocks fit (sides at
    most 1:2), these are the groups: 24 x 24 to 144 is plain 2 x 2 pooling. Elsewhere the view is halved across its
    longer side, in parts as the tokens they are to give, again and again; groups then differ by one token at most, and
    an edge may have a step. With fewer tokens than views, runs of neighbouring tokens are averaged across views. An output
    token stands where its member nearest the middle was. Cost O(N log N log k + N D). After an earlier stage the tokens
    that are left are grouped in the same way, but for the blocks.
    """

    keep: float | int = 0.25
    merging: ClassVar[bool] = True

    def select(self, visuals: Visuals) -> Selection:
        features, k = visuals.features, visuals.k
        if visuals.slots is None:  # then all visuals lie alike
            tables = tuple(t.to(features.device, non_blocking=True) for t in _raster(visuals.layout, k))
        else:
            tables = _pooled(visuals.layout, k, visuals.slots, features)
        merged = Selection(*(t.expand(len(features), -1) for t in tables))
        return replace(merged, rows=merged.apply(features))


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _raster(layout: Layout, k: int) -> tuple[Tensor, ...]:
    """The same for all visuals of a layout that nothing has left, [1, ...] each, on the CPU. The same pictures come again."""
    return _pooled(layout, k, None, torch.empty(1, layout.cells, 0))


def _pooled(layout: Layout, k: int, slots: Tensor | None, features: Tensor) -> tuple[Tensor, ...]:
    """The token that each output token stands at [U, k], the output token of every token and its share of that [U, N]."""
    group, y, x = _groups(layout, k, slots, features)
    size = group_sizes(group, k)
    own = size.gather(1, group)
    off = [at - group_sum(at, group, k).gather(1, group) / own for at in (y, x)]
    near = (off[0] ** 2 + off[1] ** 2).sort(dim=1, stable=True).indices
    near = near.gather(1, group.gather(1, near).sort(dim=1, stable=True).indices)
    keep, order = near.gather(1, size.cumsum(1) - size).sort(dim=1)
    place = torch.arange(k, device=order.device).expand_as(order)
    return keep, torch.empty_like(order).scatter(1, order, place).gather(1, group), 1 / own


def _groups(layout: Layout, k: int, slots: Tensor | None, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Group in [0, k) of every token, and its row and column in its view, [U, N] each."""
    views = layout.views
    rows = torch.cat([torch.arange(v.grid[0]).repeat_interleave(v.grid[1]) for v in views])
    columns = torch.cat([torch.arange(v.grid[1]).repeat(v.grid[0]) for v in views])
    side = 1 + max(max(v.grid) for v in views)
    y, x, view = (of_cells(cells, slots, features) for cells in (rows, columns, layout.view_of()))
    if k < len(views):
        y = torch.arange(features.shape[1], device=features.device).expand_as(y)
        x, side = torch.zeros_like(x), features.shape[1] + 1
        return _halve(torch.zeros_like(y), torch.full_like(y, k), y, x, k, side), y, x
    largest = max(v.cells for v in views)
    if slots is None:
        quotas = apportion(torch.tensor([[v.cells for v in views]]), k, largest)
        blocks = [_blocks(v, quota) for v, quota in zip(views, quotas[0].tolist(), strict=True)]
        inside, share = (of_cells(torch.cat(cells), None, features) for cells in zip(*blocks, strict=True))
        quotas = quotas.to(features.device, non_blocking=True)
    else:
        quotas = apportion(group_sizes(view, len(views)), k, largest)
        inside, share = torch.zeros_like(view), quotas.gather(1, view)
    first = (quotas.cumsum(1) - quotas).expand(len(view), -1).gather(1, view)
    return _halve(first + inside, share, y, x, k, side), y, x


def _blocks(view: View, k: int) -> tuple[Tensor, Tensor]:
    """For every cell of a view: the group of equal blocks that it is in, and 1; or 0 and `k` where no such blocks fit."""
    rows, columns = view.grid
    fits = []
    for down in (d for low in range(1, isqrt(k) + 1) if k % low == 0 for d in {low, k // low}):
        across = k // down
        if rows % down == 0 and columns % across == 0:
            height, width = rows // down, columns // across
            fits.append((max(height, width) / min(height, width), height, width))
    if not fits or min(fits)[0] > 2:
        return torch.zeros(view.cells, dtype=torch.int64), torch.full((view.cells,), k)
    _, height, width = min(fits)
    block = (torch.arange(rows) // height)[:, None] * (columns // width) + torch.arange(columns) // width
    return block.flatten(), torch.ones(view.cells, dtype=torch.int64)


def _halve(first: Tensor, share: Tensor, y: Tensor, x: Tensor, k: int, side: int) -> Tensor:
    """Cut groups in two until each is one output token: its number [U, N].

    first, share [U, N]: the group of every token is to give the outputs `first` to `first + share - 1`, and has at least
    as many members. y, x: where the tokens lie, less than `side`. Sizes within a group end up at most one apart.
    """
    ends = torch.zeros(len(first), k, dtype=torch.int64, device=first.device)
    place = torch.arange(first.shape[1], device=first.device)
    for _ in range((k - 1).bit_length()):
        long, wide = (
            (
                ends.scatter_reduce(1, first, at, "amax", include_self=False)
                - ends.scatter_reduce(1, first, at, "amin", include_self=False)
            ).gather(1, first)
            for at in (y, x)
        )
        across = long >= wide
        way = torch.where(across, y, x) * side + torch.where(across, x, y)
        order = (first * side**2 + way).sort(dim=1, stable=True).indices
        sizes = group_sizes(first, k)
        rank = torch.empty_like(order).scatter(1, order, place.expand_as(order))
        rank = rank - (sizes.cumsum(1) - sizes).gather(1, first)
        left = share // 2
        cut = (2 * sizes.gather(1, first) * left + share) // (2 * share)  # to the nearest
        second = (rank >= cut) & (share > 1)
        first = torch.where(second, first + left, first)
        share = torch.where(share > 1, torch.where(second, share - left, left), share)
    return first
