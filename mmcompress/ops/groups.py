# SPDX-License-Identifier: Apache-2.0
"""Tokens in groups: their sums and sizes, and a budget shared out over them, where sizes are only known on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ties import largest


def of_cells(values: Tensor, slots: Tensor | None, features: Tensor) -> Tensor:
    """What the tokens `features` [U, N, D] have of `values` [cells]: [U, N], by the cells `slots` [U, N] that they are."""
    values = values.to(features.device, non_blocking=True).expand(len(features), -1)
    return values if slots is None else values.gather(1, slots.to(features.device))


def group_sum(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum over the members of each group: x and groups [U, N], groups in [0, count): [U, count]."""
    return x.new_zeros(x.shape[0], count).scatter_add(1, groups, x)


def group_sizes(groups: Tensor, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Members of each group, [U, count] (float32 counts exactly up to 2^24)."""
    return torch.zeros(len(groups), count, dtype=dtype, device=groups.device).scatter(1, groups, 1, reduce="add")


def rank_within(score: Tensor, groups: Tensor) -> Tensor:
    """Place of each token among those of its group by falling score, from 0, [U, N] int64; ties go to the lower token.

    score [U, N]; groups [U, N] int64, any numbers."""
    order = score.sort(dim=1, descending=True, stable=True).indices
    ordered, place = groups.gather(1, order).sort(dim=1, stable=True)
    rank = torch.arange(groups.shape[1], device=groups.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(rank).scatter(1, order.gather(1, place), rank)


def places_of(order: Tensor, groups: Tensor) -> Tensor:
    """Place of each token among those of its group, from 0, [U, N] int64, where `order` [U, N] holds them group after group."""
    ordered = groups.gather(1, order)
    place = torch.arange(groups.shape[1], device=groups.device)
    begins = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0))
    return torch.empty_like(order).scatter(1, order, place - (place * begins).cummax(1).values)


def apportion(sizes: Tensor, k: int, largest: int) -> Tensor:
    """`k` tokens shared out in proportion to `sizes` [U, G] (Webster's rule): [U, G] int64 with sum k in every row.

    No group gets more than its size. None that has members gets nothing, unless there are more of them than `k`: then the
    largest get one each. Ties go to the lower group. k is at most the sum of the sizes, `largest` at least the largest
    size. Cost G * min(k, largest).
    """
    seat = torch.arange(min(k, largest), device=sizes.device)
    claim = sizes[..., None] / (2 * seat + 1).float()
    claim = claim + (seat == 0) * sizes.sum(1)[:, None, None]
    claim = claim.masked_fill(seat >= sizes[..., None], -1)
    winners = claim.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :k] // len(seat)
    return group_sizes(winners, sizes.shape[1])


def best_of_groups(scores: Tensor, groups: Tensor, counts: Tensor) -> Tensor:
    """Mask [U, N] of the `counts` [U, G] largest `scores` [U, N] of each of the groups [U, N] in [0, G); all of a smaller group;
    ties to the lower index."""
    if counts.shape[1] == 1:
        return largest(scores, counts)
    return rank_within(scores, groups) < counts.gather(1, groups)
