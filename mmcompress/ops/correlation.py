# SPDX-License-Identifier: Apache-2.0
"""Tokens of a crop that say the same: how many there are of each, and folding those that go into those that stay."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .ties import argmax_first

_ELEMENTS = 1 << 22
"""Largest number of similarities that are held at a time."""


def first_of(order: Tensor, count: Tensor) -> Tensor:
    """The first `count` [B, 1] places of each `order` [B, n] as a mask [B, n]."""
    first = torch.arange(order.shape[1], device=order.device) < count
    return torch.zeros_like(first).scatter(1, order, first)


@torch.no_grad()
def similar_count(keys: Tensor, tau: float) -> Tensor:
    """How many others of `keys` [B, n, d] have a cosine above `tau` to each of them, [B, n] int64. Cost n^2 d."""
    return torch.cat([(cosine > tau).sum(2) for cosine in _cosines(keys)], 1)


@torch.no_grad()
def absorb(keys: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token goes, [B, n] int64, and its share in what becomes of that, [B, n] float32.

    keys [B, n, d], kept [B, n] bool. A token that is kept goes to itself with weight 1, any other one to the kept one with
    the most similar key (the lower of equals), weighted by that cosine if it is positive; shares are weights over their
    sum. Where nothing is kept, all shares are 0. Cost n^2 d.
    """
    best, nearest = [], []
    for cosine in _cosines(keys):
        cosine = cosine.masked_fill_(~kept[:, None], float("-inf"))
        best.append(cosine.amax(2))
        nearest.append(argmax_first(cosine))
    place = torch.arange(kept.shape[1], device=kept.device)
    target = torch.where(kept, place, torch.cat(nearest, 1))
    weight = torch.where(kept, 1.0, torch.cat(best, 1).clamp_min(0))
    total = torch.zeros_like(weight).scatter_add(1, target, weight).clamp_min(1)
    return target, weight / total.gather(1, target)


def _cosines(keys: Tensor) -> Iterator[Tensor]:
    """Cosines of `keys` [B, n, d] to each other, block after block of rows [B, rows, n]; -inf to themselves."""
    unit = F.normalize(keys.float(), dim=-1)
    batch, n, _ = unit.shape
    step = max(1, _ELEMENTS // (batch * n))
    for first in range(0, n, step):
        cosine = unit[:, first : first + step] @ unit.transpose(1, 2)
        own = torch.arange(cosine.shape[1], device=keys.device)
        cosine[:, own, first + own] = float("-inf")
        yield cosine
