# SPDX-License-Identifier: Apache-2.0
"""Tokens of a crop that say the same: how many there are of each, and folding those that go into those that stay."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.components import degrees
from ..kernels.match import match
from .groups import group_sum


def first_of(order: Tensor, count: Tensor) -> Tensor:
    """The first `count` [B, 1] places of each `order` [B, n] as a mask [B, n]."""
    first = torch.arange(order.shape[1], device=order.device) < count
    return torch.zeros_like(first).scatter(1, order, first)


def similar_count(keys: Tensor, tau: float) -> Tensor:
    """How many others of `keys` [B, n, d] have a cosine above `tau` to each of them, [B, n] int64. Cost n^2 d / 2, memory n."""
    return degrees(keys, tau) - 1


@torch.no_grad()
def absorb(keys: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token goes, [B, n] int64, and its share in what becomes of that, [B, n] float32.

    keys [B, n, d], kept [B, n] bool. A token that is kept goes to itself with weight 1, any other one to the kept one with
    the most similar key (the lower of equals), weighted by that cosine if it is positive; shares are weights over their
    sum. Where nothing is kept, all shares are 0. Cost n^2 d, memory n.
    """
    cosine, nearest = match(keys, keys, query_mask=~kept, key_mask=kept)
    place = torch.arange(kept.shape[1], device=kept.device)
    target = torch.where(kept, place, nearest.clamp_min(0))
    weight = cosine.clamp_min(0).masked_fill(kept, 1.0)
    total = group_sum(weight, target, kept.shape[1]).clamp_min(1)
    return target, weight / total.gather(1, target)
