# SPDX-License-Identifier: Apache-2.0
"""All tensors of a batch in one launch: a program copies a piece of one row of one tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config

_AS_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _kernel(
    X, OUT, BATCH_STEPS, STEPS, WIDTHS, INDEX, VALID, slots,
    COUNT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    slot, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    sample = slot // slots
    full = slot >= 0
    if MASKED:
        full = tl.load(VALID + slot) != 0
    source = tl.load(INDEX + slot, mask=full, other=0)
    first = 0
    for t in tl.static_range(COUNT):
        pieces = tl.cdiv(WIDTHS[t], BLOCK)
        if (piece >= first) & (piece < first + pieces):
            column = (piece - first) * BLOCK + tl.arange(0, BLOCK)
            there = column < tl.where(full, WIDTHS[t], 0)
            x = tl.load(X[t] + sample * BATCH_STEPS[t] + source * STEPS[t] + column, mask=there, other=0)
            tl.store(OUT[t] + slot * WIDTHS[t] + column, x, mask=column < WIDTHS[t])
        first += pieces


def compact(tensors: Sequence[Tensor], index: Tensor, valid: Tensor | None) -> list[Tensor]:
    """Tensors [B or 1, S, ...] to [B, M, ...]."""
    samples, slots = index.shape
    found = [x.new_empty(samples, slots, *x.shape[2:]) for x in tensors]
    moved = []
    for x, out in zip(tensors, found, strict=True):
        if out.numel():
            rows = x if x.dim() == 3 and x.stride(2) == 1 else x.reshape(*x.shape[:2], -1).contiguous()
            rows, out = (t.view(_AS_INTEGER[t.element_size()]) for t in (rows, out))
            moved.append((rows, out, 0 if len(rows) == 1 else rows.stride(0), rows.stride(1), rows.shape[2]))
    if not moved:
        return found
    sources, targets, batch_steps, steps, widths = zip(*moved, strict=True)
    table = config("compact", index.device)
    block = table["width"]
    _kernel[(samples * slots, sum(triton.cdiv(width, block) for width in widths))](
        sources, targets, batch_steps, steps, widths, index.contiguous(), index if valid is None else valid.contiguous(),
        slots, COUNT=len(moved), MASKED=valid is not None, BLOCK=block, num_warps=table["num_warps"],
    )  # fmt: skip
    return found
