# SPDX-License-Identifier: Apache-2.0
"""Greedy choices of different tokens in plain torch, for devices without Triton: nothing waits for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gather import gather
from .naive import SPENT, first_largest, own_part

_BLOCK = 2**24
"""Numbers in a block of similarities."""

TABLE = 4096
"""Up to so many tokens `expand` makes all cosines at once."""


def nearest_distance(unit: Tensor) -> Tensor:
    """Cosine distance of every token to its nearest other token, [U, N], from unit rows [U, N, D]; blocks of rows."""
    visuals, count, _ = unit.shape
    step = max(1, _BLOCK // max(1, visuals * count))
    parts = []
    for first in range(0, count, step):
        similar = unit[:, first : first + step] @ unit.transpose(1, 2)
        own = torch.arange(similar.shape[1], device=unit.device)
        similar[:, own, first + own] = float("-inf")
        parts.append(1 - similar.amax(-1))
    return torch.cat(parts, 1)


def _row(unit: Tensor, pick: Tensor) -> Tensor:
    """Cosines of all tokens to the pick [U, 1] of each visual, [U, N]."""
    own = gather(unit, pick)
    return (unit @ own.transpose(1, 2))[..., 0]


def max_min(
    features: Tensor, k: int, weight: Tensor | None, first: Tensor | None = None, nearest: bool = False
) -> tuple[Tensor, Tensor | None]:
    unit = F.normalize(features.float(), dim=-1)
    weight = None if weight is None else weight.float()
    pick = (first_largest(nearest_distance(unit)) if first is None else first)[:, None]
    picks, near = [pick], torch.full_like(unit[..., 0], float("-inf"))
    owner = torch.full_like(near, unit.shape[1], dtype=torch.int64)
    free = torch.ones_like(near, dtype=torch.bool)
    for done in range(k if nearest else k - 1):
        row = _row(unit, pick)
        if nearest:
            owner = torch.where((row > near) | ((row == near) & (pick < owner)), pick, owner)
        near, free = torch.maximum(near, row), free.scatter(1, pick, False)
        if done + 1 < k:
            value = 1 - near if weight is None else weight * (1 - near)
            pick = first_largest(value.masked_fill(~free, float("-inf")))[:, None]
            picks.append(pick)
    found = torch.cat(picks, 1)
    return found, owner.scatter(1, found, found) if nearest else None


def expand(
    features: Tensor, k: int, weight: Tensor, offset: Tensor, cap: float, start: Tensor, sizes: Tensor, together: int
) -> Tensor:
    unit = F.normalize(features.float(), dim=-1)
    table = unit @ unit.transpose(1, 2) if unit.shape[1] <= TABLE else None
    least = torch.full_like(unit[..., 0], cap)
    free = torch.ones_like(least, dtype=torch.bool)
    picks: list[Tensor] = []
    done = 0
    while done < k:
        worth = torch.addcmul(offset, weight, least).masked_fill_(~free, float("-inf"))
        count = 1 if done < start.shape[1] else min(together, k - done)
        if count == 1:
            pick = first_largest(worth)[:, None]
        else:
            pick = worth.sort(dim=1, descending=True, stable=True).indices[:, :count]
        if done < start.shape[1]:
            pick = torch.where(done < sizes[:, None], start[:, done : done + 1], pick)
        picks.append(pick)
        done += count
        free = free.scatter(1, pick, False)
        if table is not None:
            rows = gather(table, pick)
        else:
            own = gather(unit, pick)
            rows = own @ unit.transpose(1, 2)
        least = torch.minimum(least, 1 - rows.amax(1))
    return torch.cat(picks, 1)


def greedy_map(features: Tensor, log_quality: Tensor, k: int) -> Tensor:
    unit, worth = F.normalize(features.float(), dim=-1), 2 * log_quality.float().clamp_min(-1e30)
    left = own_part(features)
    free = torch.ones_like(left, dtype=torch.bool)
    factor, picks = unit.new_empty(len(unit), k, unit.shape[1]), []
    for step in range(k):
        new = (left > SPENT) & free
        gain = worth + torch.where(new, left, 1.0).log()
        pool = torch.where(new.any(1, keepdim=True), new, free)
        pick = first_largest(gain.masked_fill(~pool, float("-inf")))[:, None]
        before = factor[:, :step]
        known = before.gather(2, pick[..., None].expand(-1, step, 1))
        pivot = (
            torch.where(new, left, float("inf")).gather(1, pick).sqrt()
        )  # what is not new adds nothing to the factor
        factor[:, step] = (_row(unit, pick) - (known.transpose(1, 2) @ before)[:, 0]) / pivot
        left = left - factor[:, step].square()
        free = free.scatter(1, pick, False)
        picks.append(pick)
    return torch.cat(picks, 1)
