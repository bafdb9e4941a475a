# SPDX-License-Identifier: Apache-2.0
"""Tokens in groups (tiles, frames, rows of a grid): numbering them, sharing a budget out, choosing within each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def number_groups(parts: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Group numbers of several grids, each counted from 0, as one row [cells] in which no two grids share a group; and
    how many groups there are. For tensors on the host."""
    numbers, count = [], 0
    for part in parts:
        numbers.append(part + count)
        count += int(part.max()) + 1 if part.numel() else 0
    return torch.cat(numbers), count


def of_cells(values: Tensor, slots: Tensor | None, features: Tensor) -> Tensor:
    """What the tokens `features` [U, N, D] have of `values` [cells]: [U, N], by the cells `slots` [U, N] that they are."""
    values = values.to(features.device).expand(len(features), -1)
    return values if slots is None else values.gather(1, slots.to(features.device))


def group_sum(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """Sum over the members of each group: x [U, N, ...], groups [U, N] in [0, count): [U, count, ...]."""
    index = groups.view(*groups.shape, *[1] * (x.dim() - 2)).expand_as(x)
    return x.new_zeros(x.shape[0], count, *x.shape[2:]).scatter_add(1, index, x)


def group_sizes(groups: Tensor, count: int) -> Tensor:
    """Members of each group, [U, count] int64."""
    return group_sum(torch.ones_like(groups), groups, count)


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


def best_of_groups(order: Tensor, groups: Tensor, quotas: Tensor, k: int) -> Tensor:
    """The first `quotas` [U, G] tokens of each group in `order` [U, N] (best first): [U, k], ascending.

    groups [U, N]; every row of the quotas sums to `k`.
    """
    ordered, place = groups.gather(1, order).sort(dim=1, stable=True)
    order = order.gather(1, place)
    sizes = group_sizes(groups, quotas.shape[1])
    rank = torch.arange(order.shape[1], device=order.device) - (sizes.cumsum(1) - sizes).gather(1, ordered)
    chosen = (rank < quotas.gather(1, ordered)).to(torch.uint8)
    return order.gather(1, chosen.sort(dim=1, descending=True, stable=True).indices[:, :k]).sort(dim=1).values
