# SPDX-License-Identifier: Apache-2.0
"""Features without their common direction, how untypical each is, and a choice that weighs distances by it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .diversity import nearest_distance
from .ties import argmax_first

_BLOCK = 4096
"""Largest number of tokens whose similarities are held as one matrix."""
_ROUNDING = 1e-6
"""A token of which no larger part than this is left without the mean is the mean, and has no direction of its own."""


def centred(x: Tensor) -> Tensor:
    """`x` [U, N, D] less the mean of its tokens, float32; zero where that leaves only rounding."""
    x = x.float()
    rest = x - x.mean(1, keepdim=True)
    nothing = rest.norm(dim=-1, keepdim=True) <= _ROUNDING * x.norm(dim=-1, keepdim=True)
    return rest.masked_fill(nothing, 0)


def distinctiveness(x: Tensor) -> Tensor:
    """How little a token is like the others: minus its mean cosine to them, brought to (0, 1] per visual, [U, N] float32.

    x [U, N, D]. 1 for all where all are alike. Cost N D, no N x N.
    """
    unit = F.normalize(x.float(), dim=-1)
    own = unit.square().sum(-1)
    rare = (own - (unit @ unit.sum(1)[..., None])[..., 0]) / max(1, x.shape[1] - 1)
    low, high = rare.amin(1, keepdim=True), rare.amax(1, keepdim=True)
    alike = high - low < 10 * _ROUNDING
    scaled = (rare - low + 1e-6) / (high - low).masked_fill(alike, 1)
    return scaled.masked_fill(alike, 1).clamp_max(1)


def weighted_max_min(features: Tensor, weight: Tensor, k: int) -> Tensor:
    """Greedy max-min diversity with weights: `k` tokens per row in the order they are picked, [U, k] int64.

    features [U, N, D], weight [U, N] >= 0. The first pick is the token farthest from its nearest neighbour, whatever it
    weighs; each next one has the largest weight times cosine distance to the nearest token picked so far. No token twice;
    ties go to the lower index. Cost O(N^2 D) and N^2 memory up to 4096 tokens, above that O(N k D) after one pass in
    blocks; float32.
    """
    unit = F.normalize(features.float(), dim=-1)
    table = unit @ unit.transpose(1, 2) if unit.shape[1] <= _BLOCK else None

    def distance_to(pick: Tensor) -> Tensor:
        at = pick[:, None, None]
        if table is not None:
            return 1 - table.gather(1, at.expand(-1, 1, unit.shape[1]))[:, 0]
        return 1 - (unit @ unit.gather(1, at.expand(-1, 1, unit.shape[2])).transpose(1, 2))[..., 0]

    picks = [argmax_first(nearest_distance(unit))]
    nearest = torch.full_like(weight, float("inf"))
    gone = torch.zeros_like(weight, dtype=torch.bool)
    for _ in range(k - 1):
        nearest = torch.minimum(nearest, distance_to(picks[-1]))
        gone = gone.scatter(1, picks[-1][:, None], True)
        picks.append(argmax_first((weight * nearest).masked_fill(gone, float("-inf"))))
    return torch.stack(picks, 1)
