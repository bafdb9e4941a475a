# SPDX-License-Identifier: Apache-2.0
"""From the relevance of visual tokens to what a compressor learns."""

from __future__ import annotations

import torch
from torch import Tensor


def relevance_target(relevance: Tensor, valid: Tensor | None = None) -> Tensor:
    """Relevance [..., N] >= 0 as a distribution on its upper half (of an odd number of tokens the larger one; ties: the lower
    token), zeros elsewhere and everywhere where nothing is relevant. valid [..., N] bool: tokens that are there."""
    values = relevance.float()
    here = torch.ones_like(values, dtype=torch.bool) if valid is None else valid
    order = values.masked_fill(~here, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    upper = here & (rank < (here.sum(-1, keepdim=True) + 1) // 2)
    kept = values.where(upper, torch.zeros_like(values))
    return kept / kept.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def target_divergence(target: Tensor, log_chance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of `target` [..., N] from the distribution exp(log_chance) [..., N], over the tokens that the
    target has: [...]."""
    there = target > 0
    safe = target.where(there, torch.ones_like(target))
    return (safe * (safe.log() - log_chance)).where(there, torch.zeros_like(target)).sum(-1)
