# SPDX-License-Identifier: Apache-2.0
"""Whole rows are copied, of all samples at once: several times as fast as a gather of elements."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compact(tensors: Sequence[Tensor], index: Tensor, valid: Tensor | None) -> list[Tensor]:
    """Tensors [B or 1, S, ...] to [B, M, ...]."""
    if valid is not None:
        index = index.masked_fill(~valid, 0)
    number = torch.arange(len(index), device=index.device)[:, None]
    found = []
    for x in tensors:
        shared = len(x) == 1
        rows = x[0] if shared else x.flatten(0, 1)
        at = index if shared else index + number * x.shape[1]
        picked = rows.index_select(0, at.flatten()).unflatten(0, index.shape)
        if valid is not None:
            picked.masked_fill_(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), 0)
        found.append(picked)
    return found
