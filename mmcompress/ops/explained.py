# SPDX-License-Identifier: Apache-2.0
"""From the relevance of visual tokens to what a compressor learns, and what it is built of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class Depthwise(nn.Module):
    """A convolution of each channel by itself over the tokens of [U, N, C], an odd number of them, zeros beyond both ends."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        bound = kernel**-0.5
        self.weight = nn.Parameter(torch.empty(kernel, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        around = F.pad(x, (0, 0, len(self.weight) // 2, len(self.weight) // 2))
        return sum((around[:, i : i + x.shape[1]] * w for i, w in enumerate(self.weight)), self.bias.expand_as(x))
