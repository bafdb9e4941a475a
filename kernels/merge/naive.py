# SPDX-License-Identifier: Apache-2.0
"""Merging as published code does it: every token weighted, then added up where it belongs."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool) -> Tensor:
    """x [U, N, D] to [U, count, D]; memory of all weighted tokens in float32."""
    target = assign.remainder(count + 1)  # what is gone goes to a row more, which nobody reads
    weighted = x.float()
    if weight is not None:
        weight = weight.float()
        weighted = weighted * weight[..., None]
    shape = len(x), count + 1, x.shape[2]
    found = weighted.new_zeros(shape).scatter_add(1, target[..., None].expand_as(x), weighted)[:, :count]
    if mean:
        weight = torch.ones_like(assign, dtype=torch.float32) if weight is None else weight
        total = weight.new_zeros(shape[:2]).scatter_add(1, target, weight)[:, :count]
        found = found / total.masked_fill(total == 0, 1)[..., None]
    return found.to(x.dtype)
