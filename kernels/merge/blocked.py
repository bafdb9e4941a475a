# SPDX-License-Identifier: Apache-2.0
"""Merging output by output: the tokens of each are read once and added up at once; weighted tokens are never stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import naive
from .members import members

CELLS = 1 << 20
"""Half-precision features are widened so many at a time."""
SMALL = 1 << 14
"""Up to so many numbers in a row of the batch a sort costs more than it saves."""


def merge(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool) -> Tensor:
    """x [U, N, D] to [U, count, D]."""
    if x.shape[1] * x.shape[2] <= SMALL:
        return naive.merge(x, assign, count, weight, mean)
    rows, width = x.flatten(0, 1), x.shape[2]
    found = x.new_empty(len(x) * count, width)
    order, first = members(assign, count)
    given = None if weight is None else weight.float().flatten()[order]
    step = max(1, width if x.dtype == torch.float32 else CELLS // max(1, len(rows)))
    scale = None
    if mean:
        sizes = first.diff().float() if given is None else _sums(given[:, None], first)[:, 0]
        scale = torch.where(sizes == 0, 1, sizes)[:, None]
    for begin in range(0, width, step):
        part = slice(begin, begin + step)
        made = F.embedding_bag(
            order, rows[:, part].float(), first, mode="sum", per_sample_weights=given, include_last_offset=True
        )
        found[:, part] = made if scale is None else made.div_(scale)
    return found.view(len(x), count, width)


def _sums(x: Tensor, first: Tensor) -> Tensor:
    """Sums of the rows of x [R, D] from each of `first` [n + 1] to the next, [n, D]."""
    place = torch.arange(len(x), device=x.device)
    return F.embedding_bag(place, x, first, mode="sum", include_last_offset=True)
