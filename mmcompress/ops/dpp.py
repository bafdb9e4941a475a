# SPDX-License-Identifier: Apache-2.0
"""Determinantal point processes: choose tokens that are good by themselves and unlike each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ties import argmax_first

_SPENT = 1e-6
"""A token of which no larger part than this is new to what is picked is only rounding noise to the determinant."""


@torch.no_grad()
def greedy_map(features: Tensor, quality: Tensor, k: int) -> Tensor:
    """Greedy MAP of a DPP: `k` tokens per visual in the order they are picked, [U, k] int64.

    features [U, N, D]; quality [U, N], at least 0. The kernel is L_ij = quality_i cos(i, j) quality_j, and each pick
    raises log det L of the picked tokens most (Chen et al., arXiv 1709.05135: incremental Cholesky factor). When nothing
    new is left (equal or zero tokens, k above the rank), the rest follows by quality. No token twice; ties go to the
    lower index. Rows of L are made when their token is picked: cost k N (D + k), memory N (D + k) float32, no N x N.
    """
    quality = quality.float()
    scaled = F.normalize(features.float(), dim=-1) * quality[..., None]  # L is scaled @ scaled.T
    left = scaled.square().sum(-1)  # how much of a token is new: squared pivots of the factor
    noise = _SPENT * left
    rest = quality - quality.amax(1, keepdim=True) - 1  # below every pivot
    taken = torch.zeros_like(left, dtype=torch.bool)
    factor = scaled.new_zeros(len(scaled), k, scaled.shape[1])
    picks: list[Tensor] = []
    for step in range(k):
        new = left > noise
        picks.append(argmax_first(torch.where(new, left, rest).masked_fill_(taken, float("-inf"))))
        at = picks[-1][:, None]
        taken.scatter_(1, at, True)
        own = scaled.gather(1, at[..., None].expand(-1, 1, scaled.shape[2]))
        row = (scaled @ own.transpose(1, 2))[..., 0]
        before = factor[:, :step]
        known = before.gather(2, at[..., None].expand(-1, step, 1))
        pivot = torch.where(new, left, float("inf")).gather(1, at).sqrt()  # what is not new adds nothing to the factor
        factor[:, step] = (row - (known.transpose(1, 2) @ before)[:, 0]) / pivot
        left -= factor[:, step].square()
    return torch.stack(picks, 1)
