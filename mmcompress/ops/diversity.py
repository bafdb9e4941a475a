# SPDX-License-Identifier: Apache-2.0
"""Greedy choice of tokens that are far apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ties import argmax_first

_BLOCK = 4096
"""Largest number of tokens whose similarities are held as one matrix."""


def nearest_distance(unit: Tensor) -> Tensor:
    """Cosine distance of every token to its nearest other token, [U, N], from unit rows [U, N, D]; blocks of rows."""
    count = unit.shape[1]
    parts = []
    for first in range(0, count, _BLOCK):
        similar = unit[:, first : first + _BLOCK] @ unit.transpose(1, 2)
        own = torch.arange(similar.shape[1], device=unit.device)
        similar[:, own, first + own] = float("-inf")
        parts.append(1 - similar.amax(-1))
    return torch.cat(parts, 1)


def max_min_diverse(features: Tensor, k: int) -> Tensor:
    """Greedy max-min diversity: `k` tokens per row in the order they are picked, [U, k] int64.

    features [U, N, D]. The first pick is the token farthest from its nearest neighbour; each next one has the largest
    cosine distance to the nearest token picked so far. A token is never picked twice; ties go to the lower index.
    Cost O(N^2 D) and N^2 memory up to 4096 tokens, above that O(N k D) after one pass in blocks; float32.
    """
    unit = F.normalize(features.float(), dim=-1)
    picks = [argmax_first(nearest_distance(unit))]
    similar = unit @ unit.transpose(1, 2) if unit.shape[1] <= _BLOCK else None

    def distance_to(pick: Tensor) -> Tensor:
        if similar is not None:
            return 1 - similar.gather(1, pick[:, None, None].expand(-1, 1, unit.shape[1]))[:, 0]
        row = unit.gather(1, pick[:, None, None].expand(-1, 1, unit.shape[2]))
        return 1 - (unit @ row.transpose(1, 2))[..., 0]

    nearest = distance_to(picks[0]).scatter(1, picks[0][:, None], float("-inf"))
    for _ in range(k - 1):
        pick = argmax_first(nearest)
        picks.append(pick)
        nearest = torch.minimum(nearest, distance_to(pick)).scatter(1, pick[:, None], float("-inf"))
    return torch.stack(picks, 1)
