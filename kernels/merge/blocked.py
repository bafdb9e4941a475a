# SPDX-License-Identifier: Apache-2.0
"""Merging output by output: the tokens of each are read once and added up at once; weighted tokens are never stored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..dispatch import plain
from . import naive
from .members import members

CELLS = 1 << 20
"""Half-precision features are widened so many at a time."""


def merge(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool) -> Tensor:
    """x [U, N, D] to [U, count, D]."""
    if plain("merge", x.shape[1] * x.shape[2]):
        return (_few if x.device.type == "cpu" else naive.merge)(x, assign, count, weight, mean)
    rows, width = x.flatten(0, 1), x.shape[2]
    order, first = members(assign, count)
    weights = None if weight is None else weight.float().reshape(-1, 1)
    scale = None
    if mean:
        sizes = first.diff()[:, None].float() if weights is None else _sums(weights, order, first, None)
        scale = sizes.masked_fill_(sizes == 0, 1)
    share = None if weights is None else weights[:, 0][order]
    if x.dtype == torch.float32:
        found = _sums(rows, order, first, share, scale)
    else:
        found = x.new_empty(len(first) - 1, width)
        step = max(1, CELLS // max(1, len(rows)))
        for begin in range(0, width, step):
            part = slice(begin, begin + step)
            found[:, part] = _sums(rows[:, part].float(), order, first, share, scale)
    return found.view(len(x), count, width)


def _few(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool) -> Tensor:
    """The same on the CPU with the rounding of the naive twin, in a third of its calls: weighted tokens are made."""
    order, first = members(assign, count)
    rows = x.float().flatten(0, 1)
    if weight is not None:
        weight = weight.float().reshape(-1, 1)
        rows = rows * weight
    found = _sums(rows, order, first, None)
    if mean and weight is not None:
        total = _sums(weight, order, first, None)
        found.div_(total.masked_fill_(total == 0, 1))
    elif mean:
        sizes = np.diff(first.numpy()).clip(1).astype(np.float32)
        found.div_(torch.from_numpy(sizes[:, None]))
    return found.to(x.dtype).view(len(x), count, -1)


def _sums(x: Tensor, order: Tensor, first: Tensor, share: Tensor | None, scale: Tensor | None = None) -> Tensor:
    """Sums of the rows `order` of x [R, D], times `share`, from each of `first` [n + 1] to the next, over `scale`: [n, D]."""
    found = torch.embedding_bag(x, order, first, False, 0, False, share, True)[0]
    return found if scale is None else found.div_(scale)
