# SPDX-License-Identifier: Apache-2.0
"""Rows of a batch by their numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` [U or 1, N, ...] at `index` [U, k] in [0, N), on the device of `x`: [U, k, ...].

    Whole rows are copied: `torch.gather` on an index as wide as they are does the same 4 to 9 times slower on a CPU. Gradients
    flow; cost: reading and writing what is taken. A number outside [0, N) raises RuntimeError, as `torch.gather` does; in compiled
    code and on a GPU, which is not waited for, one of N or more does by an assertion there.
    """
    index = index.to(x.device)
    if x.dim() == 2:
        return (x if len(x) == len(index) else x.expand(len(index), -1)).gather(1, index)
    if len(x) > 1 and (x.device.type != "cpu" or torch.compiler.is_compiling()):
        return x[torch.arange(len(x), device=x.device)[:, None], index]
    if len(x) == len(index) == 1:
        return _picked(x, 1, index[0])
    return _rows(x, index).view(*index.shape, *x.shape[2:])


def gather_into(out: Tensor, x: Tensor, index: Tensor) -> None:
    """Write the rows of `x` [U, N, D] at `index` [U, k] into `out` [U, k, D], in place; as `gather`, but on a CPU, where nothing
    learns, without a copy of them."""
    direct = out.is_contiguous() and out.dtype == x.dtype and out.device == index.device
    if direct and out.device.type == "cpu" and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        _rows(x, index, out.flatten(0, 1))
    else:
        out.copy_(gather(x, index))


def _rows(x: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Those of all samples, one behind the other, [U k, ...]: on a CPU faster than x[first, index]."""
    samples, rows = x.shape[:2]
    if samples > 1:
        numbers = index.numpy()
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < rows:
            raise RuntimeError(f"index from {numbers.min()} to {numbers.max()}: give rows of x from 0 to {rows - 1}")
        index = torch.from_numpy((numbers + np.arange(samples)[:, None] * rows).ravel())
    return _picked(x.flatten(0, 1), 0, index.flatten(), out)


def _picked(x: Tensor, dim: int, index: Tensor, out: Tensor | None = None) -> Tensor:
    try:
        return torch.index_select(x, dim, index, out=out)
    except IndexError as error:
        raise RuntimeError(f"{error}: give rows of x from 0 to {x.shape[dim] - 1}") from error
