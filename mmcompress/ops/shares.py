# SPDX-License-Identifier: Apache-2.0
"""Sharing a budget out over parts, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .known import known_zero


def split_budget(k: int, sizes: Sequence[int]) -> list[int]:
    """`k` tokens over parts of known sizes, in proportion to them: rounded down, the rest to the largest remainders (the
    first of equals). No part gets more than its size as long as `k` is at most their sum."""
    total = sum(sizes)
    parts = [k * size // total for size in sizes]
    by_remainder = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % total))
    for i in by_remainder[: k - sum(parts)]:
        parts[i] += 1
    return parts


def worth_shares(worth: Tensor, room: Tensor, k: int | Tensor) -> Tensor:
    """`k` tokens over parts in proportion to their worth, [U, P] int64 that sums to exactly `k` in every row.

    worth [U, P], not negative; room [P] or [U, P] int64: the most that a part can take; k, or one [U, 1] for each row, at most the
    sum of the room. What
    full parts cannot take goes to the others by worth, until nothing is left over (in closed form: the parts fill up in the
    order of room / worth). Shares are rounded down, the rest goes one by one to the parts of the largest worth; ties to the
    lower part. Parts without worth share equally what all others cannot take. Cost P log P.
    """
    if worth.shape[1] == 1:
        return torch.zeros_like(room.expand(worth.shape)) + k
    worth = worth.float()
    room = room.expand(worth.shape)
    worth = torch.maximum(worth, (1e-12 * worth.amax(1, keepdim=True)).clamp_min(1e-30))
    order = (room / worth).sort(dim=1, stable=True).indices
    size, weight = room.gather(1, order), worth.gather(1, order)
    left = k - (size.cumsum(1) - size)
    rate = left / weight.flip(1).cumsum(1).flip(1)
    full = (rate * weight >= size).cumprod(1).sum(1, keepdim=True)
    rate = rate.gather(1, full.clamp_max(worth.shape[1] - 1))
    share = _fill(torch.minimum((rate * worth).floor(), room).long(), k)  # rounding must never give out more than k

    full = share >= room
    rank = worth.masked_fill(full, -1).sort(dim=1, descending=True, stable=True).indices.argsort(1)
    share = share + (rank < k - share.sum(1, keepdim=True)).masked_fill(full, False)
    left = k - share.sum(1, keepdim=True)
    return share if known_zero(left) else share + _fill(room - share, left)


def _fill(room: Tensor, count: int | Tensor) -> Tensor:
    """`count`, or one [U, 1] for each row, over the parts from the left, each filled up before the next."""
    filled = room.cumsum(1).clamp_max(count)
    return filled - F.pad(filled, (1, -1))
