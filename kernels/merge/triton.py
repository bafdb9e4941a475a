# SPDX-License-Identifier: Apache-2.0
"""Merging in one launch: a program adds up a piece of one output, in the order of its slots; no atomics."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from .members import members


@triton.jit
def _kernel(
    X, W, ORDER, FIRST, OUT, width,
    WEIGHTED: tl.constexpr, MEAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    output = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    begin, end = tl.load(FIRST + output), tl.load(FIRST + output + 1)
    found = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for member in range(begin, end, ROWS):
        place = member + tl.arange(0, ROWS)
        there = place < end
        slot = tl.load(ORDER + place, mask=there, other=0)
        if WEIGHTED:
            weight = tl.load(W + slot, mask=there, other=0).to(tl.float32)
        else:
            weight = there.to(tl.float32)
        at = X + slot[:, None] * width + columns[None, :]
        x = tl.load(at, mask=there[:, None] & (columns < width)[None, :], other=0).to(tl.float32)
        found += tl.sum(x * weight[:, None], 0)
        total += weight
    if MEAN:
        sum = tl.sum(total, 0)
        found = found / tl.where(sum == 0, 1, sum)
    tl.store(OUT + output * width + columns, found, mask=columns < width)


def merge(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool) -> Tensor:
    """x [U, N, D] to [U, count, D]."""
    x, width = x.contiguous(), x.shape[2]
    found = x.new_empty(len(x), count, width)
    if not found.numel():
        return found
    order, first = members(assign, count)
    table = config("merge", x.device)
    _kernel[(len(x) * count, triton.cdiv(width, table["width"]))](
        x, x if weight is None else weight.contiguous(), order, first, found, width,
        WEIGHTED=weight is not None, MEAN=mean, ROWS=table["rows"], BLOCK=table["width"], num_warps=table["num_warps"],
    )  # fmt: skip
    return found
