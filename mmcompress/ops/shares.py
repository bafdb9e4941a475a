# SPDX-License-Identifier: Apache-2.0
"""Sharing a budget out over parts, exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Array: TypeAlias = "np.ndarray[Any, Any]"


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
        return torch.zeros_like(worth, dtype=torch.int64) + k
    worth = worth.detach().float()
    if worth.device.type == "cpu" and not torch.compiler.is_compiling():
        count = k.numpy() if isinstance(k, Tensor) else k
        return torch.from_numpy(_on_host(worth.numpy(), np.broadcast_to(room.numpy(), worth.shape), count))
    return _on_device(worth, room.expand(worth.shape), k)


def _on_device(worth: Tensor, room: Tensor, k: int | Tensor) -> Tensor:
    """`worth_shares` in calls that wait for nothing."""
    worth = torch.maximum(worth, (1e-12 * worth.amax(1, keepdim=True)).clamp_min(1e-30))
    order = (room / worth).sort(dim=1, stable=True).indices
    size, weight = room.gather(1, order), worth.gather(1, order)
    left = k - (size.cumsum(1) - size)
    rate = left / weight.flip(1).cumsum(1).flip(1)
    full = (rate * weight >= size).cumprod(1).sum(1, keepdim=True)
    rate = rate.gather(1, full.clamp_max(worth.shape[1] - 1))
    share = torch.minimum((rate * worth).floor(), room).long()
    share = fill_up(share, k)  # rounding must never give out more than k

    by_worth = worth.masked_fill(share >= room, -1).sort(dim=1, descending=True, stable=True).indices
    one = fill_up((share < room).gather(1, by_worth), k - share.sum(1, keepdim=True))
    share = share.scatter_add(1, by_worth, one)
    return share + fill_up(room - share, k - share.sum(1, keepdim=True))


def fill_up(room: Tensor, count: Tensor | int) -> Tensor:
    """`count`, or one [U, 1] for each row, over the parts from the left, each filled up before the next."""
    filled = room.cumsum(1).clamp(max=count)
    return filled - F.pad(filled, (1, -1))


def _on_host(worth: Array, room: Array, k: int | Array) -> Array:
    """`_on_device` number by number, where each of its calls takes longer than all that is to be done."""
    kind, take = np.float32, np.take_along_axis
    worth = np.maximum(worth, np.maximum(kind(1e-12) * worth.max(1, keepdims=True), kind(1e-30)))
    order = np.argsort(room.astype(kind) / worth, 1, kind="stable")
    size, weight = take(room, order, 1), take(worth, order, 1)
    left = k - (size.cumsum(1) - size)
    rate = left.astype(kind) / weight[:, ::-1].cumsum(1, np.float64).astype(kind)[:, ::-1]
    full = (rate * weight >= size.astype(kind)).cumprod(1).sum(1, keepdims=True)
    rate = take(rate, np.minimum(full, worth.shape[1] - 1), 1)
    share = np.minimum(np.floor(rate * worth), room.astype(kind)).astype(np.int64)
    share = _filled(share, k)
    by_worth = np.argsort(-np.where(share >= room, kind(-1), worth), 1, kind="stable")
    one = _filled(take(share < room, by_worth, 1), k - share.sum(1, keepdims=True))
    np.put_along_axis(share, by_worth, take(share, by_worth, 1) + one, 1)
    return share + _filled(room - share, k - share.sum(1, keepdims=True))


def _filled(room: Array, count: int | Array) -> Array:
    filled = np.minimum(room.cumsum(1), count)
    return np.diff(filled, axis=1, prepend=0)
