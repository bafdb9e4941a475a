# SPDX-License-Identifier: Apache-2.0
"""Determinantal point processes: choose tokens that are good by themselves and unlike each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ties import argmax_first

_SPENT = 1e-6
"""A token of which no larger part than this is new to what is picked differs from it by rounding only."""


@torch.no_grad()
def greedy_map(features: Tensor, log_quality: Tensor, k: int) -> Tensor:
    """Greedy MAP of a DPP: `k` tokens per visual in the order they are picked, [U, k] int64.

    features [U, N, D]; log_quality [U, N] (-inf is fine): logarithm of q in the kernel L_ij = q_i cos(i, j) q_j. Each pick
    raises log det L of the picked tokens most: by 2 log q plus the logarithm of the part that is new, which an
    incremental Cholesky factor of the cosines gives (Chen et al., arXiv 1709.05135). When nothing is new any more (equal
    or zero tokens, k above the rank), the rest follows by quality. No token twice; ties go to the lower index. A row of
    cosines is made when its token is picked: cost k N (D + k), memory N (D + k) float32 and no N x N.
    """
    unit, worth = F.normalize(features.float(), dim=-1), 2 * log_quality.float().clamp_min(-1e30)
    left = unit.square().sum(-1)  # the part of a token that is new: the squared pivots of the factor
    free = torch.ones_like(left, dtype=torch.bool)
    factor = unit.new_zeros(len(unit), k, unit.shape[1])
    picks: list[Tensor] = []
    for step in range(k):
        new = (left > _SPENT) & free
        pool = torch.where(new.any(1, keepdim=True), new, free)
        gain = worth + torch.where(new, left, 1.0).log()
        picks.append(argmax_first(torch.where(pool, gain, float("-inf"))))
        at = picks[-1][:, None]
        free.scatter_(1, at, False)
        own = unit.gather(1, at[..., None].expand(-1, 1, unit.shape[2]))
        row = (unit @ own.transpose(1, 2))[..., 0]
        before = factor[:, :step]
        known = before.gather(2, at[..., None].expand(-1, step, 1))
        pivot = torch.where(new, left, float("inf")).gather(1, at).sqrt()  # what is not new adds nothing to the factor
        factor[:, step] = (row - (known.transpose(1, 2) @ before)[:, 0]) / pivot
        left -= factor[:, step].square()
    return torch.stack(picks, 1)
