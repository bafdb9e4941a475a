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
    batch, flat = len(index), index.flatten()
    number = torch.arange(batch, device=index.device)[:, None] if batch > 1 else index
    found = []
    for x in tensors:
        shape, at = x.shape, flat
        if shape[0] > 1:  # as one sample: the rows of all, one behind the other
            x, at = x.flatten(0, 1)[None], (index + number * shape[1]).flatten()
        picked = x.index_select(1, at)
        if batch != 1:
            picked = picked.view(*index.shape, *shape[2:])
        if valid is not None:
            picked.masked_fill_(~valid.view(*valid.shape, *[1] * (x.dim() - 2)), 0)
        found.append(picked)
    return found
