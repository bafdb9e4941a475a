# SPDX-License-Identifier: Apache-2.0
"""Merging as published code does it: every token weighted, then added up where it belongs."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool) -> Tensor:
    """x [U, N, D] to [U, count, D]; memory of all weighted tokens in float32."""
    gone = assign < 0
    weight = (torch.ones_like(assign, dtype=torch.float32) if weight is None else weight.float()).masked_fill(gone, 0)
    target = assign.masked_fill(gone, 0)
    weighted = x.float().masked_fill(gone[..., None], 0) * weight[..., None]
    found = weighted.new_zeros(len(x), count, x.shape[2]).scatter_add(1, target[..., None].expand_as(x), weighted)
    if mean:
        total = weight.new_zeros(len(x), count).scatter_add(1, target, weight)
        found = found / torch.where(total == 0, 1, total)[..., None]
    return found.to(x.dtype)
