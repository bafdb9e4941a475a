# SPDX-License-Identifier: Apache-2.0
"""Coverage on a GPU: the table in two launches, then one launch per pick. Each of a launch's programs finds the last pick again
from what those of the launch before left behind, and computes the gains of its own tokens. How many launches there are depends
on sizes alone: all of it can be captured in a CUDA graph."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from ..dispatch import interpreted
from .naive import LANES

_NONE = tl.constexpr(float("-inf"))
_LANES = tl.constexpr(LANES)


@triton.jit
def _length_kernel(X, LENGTH, x_u, x_n, x_d, count, width, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Length of each row, at least 1e-8."""
    u = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for d in range(0, width, DEPTH):
        dims = d + tl.arange(0, DEPTH)
        at = X + u * x_u + rows[:, None].to(tl.int64) * x_n + dims[None, :] * x_d
        x = tl.load(at, mask=(rows < count)[:, None] & (dims < width)[None, :], other=0).to(tl.float32)
        total += x * x
    tl.store(LENGTH + u * count + rows, tl.maximum(tl.sqrt(tl.sum(total, 1)), 1e-8), mask=rows < count)


@triton.jit
def _cosine_kernel(
    A, B, A_LENGTH, B_LENGTH, OUT, a_u, a_n, a_d, b_u, b_n, b_d, targets, count, width, temperature,
    WIDEN: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Cosines of targets and tokens over the temperature; vectors too long to be measured count as zero."""
    u = tl.program_id(2).to(tl.int64)
    rows, cols = tl.program_id(0) * SIDE + tl.arange(0, SIDE), tl.program_id(1) * SIDE + tl.arange(0, SIDE)
    total = tl.zeros([SIDE, SIDE], tl.float32)
    for d in range(0, width, DEPTH):
        dims = d + tl.arange(0, DEPTH)
        inside = dims < width
        a = tl.load(
            A + u * a_u + rows[:, None].to(tl.int64) * a_n + dims[None, :] * a_d,
            mask=(rows < targets)[:, None] & inside[None, :], other=0,
        )  # fmt: skip
        b = tl.load(
            B + u * b_u + cols[None, :].to(tl.int64) * b_n + dims[:, None] * b_d,
            mask=(cols < count)[None, :] & inside[:, None], other=0,
        )  # fmt: skip
        if WIDEN:  # two types, or the interpreter, which multiplies bfloat16 as if it were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    a_length = tl.load(A_LENGTH + u * targets + rows, mask=rows < targets, other=1)
    b_length = tl.load(B_LENGTH + u * count + cols, mask=cols < count, other=1)
    scale = a_length[:, None] * b_length[None, :]
    at = OUT + (u * targets + rows[:, None]) * count + cols[None, :]
    cosine = tl.where(scale < float("inf"), total / scale, 0)
    tl.store(at, cosine / temperature, mask=(rows < targets)[:, None] & (cols < count)[None, :])


@triton.jit
def _softmax_kernel(TABLE, targets, count, BLOCK: tl.constexpr):
    """Softmax of one row in place, over the number of rows."""
    TABLE += tl.program_id(0).to(tl.int64) * count
    top, total = tl.full([BLOCK], _NONE, tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(TABLE + at, mask=at < count, other=_NONE))
    highest = tl.max(top, 0)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(TABLE + at, mask=at < count, other=_NONE) - highest)
    share = tl.sum(total, 0) * targets
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(
            TABLE + at, tl.exp(tl.load(TABLE + at, mask=at < count, other=_NONE) - highest) / share, mask=at < count
        )


@triton.jit
def _add_lanes(lanes, LANES: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over the first axis, its second half added to the first until one is left."""
    if LANES == 1:
        total = tl.reshape(lanes, [BLOCK])
    else:
        halves = tl.permute(tl.reshape(lanes, [2, LANES // 2, BLOCK]), [1, 2, 0])
        first, second = tl.split(halves)
        total = _add_lanes(first + second, LANES // 2, BLOCK)
    return total


@triton.jit(do_not_specialize=["step"])
def _gain_kernel(
    TABLE, LAST, WEIGHT, TAKEN, COVERED, COVER, BEFORE, BEFORE_AT, BEST, AT, PICKS, t_u, t_r, t_n, rows, count, blocks, k, step,
    LATER: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Pick number `step` - 1, and what the tokens of a block add after it. COVERED [U, R]: how well the picks before cover each
    target; the first program writes what it is with the last pick to COVER."""
    block, u = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    there = token < count
    TABLE += u * t_u
    pick = step * 0
    if step > 0:
        lane = tl.arange(0, SPAN)
        lead = tl.argmax(tl.load(BEFORE + u * blocks + lane, mask=lane < blocks, other=_NONE), 0, tie_break_left=True)
        pick = tl.load(BEFORE_AT + u * blocks + lead)
        if block == 0:
            tl.store(PICKS + u * k + step - 1, pick.to(tl.int64))
    if step < k:
        lanes = tl.zeros([_LANES, BLOCK], tl.float32)
        for first in range(0, rows, _LANES):
            row = first + tl.arange(0, _LANES)
            covered = tl.zeros([_LANES], tl.float32)
            if step > 0:
                own = tl.load(TABLE + row.to(tl.int64) * t_r + pick.to(tl.int64) * t_n, mask=row < rows, other=0).to(
                    tl.float32
                )
                covered = tl.maximum(tl.load(COVERED + u * rows + row, mask=row < rows, other=0), own)
            if block == 0:
                tl.store(COVER + u * rows + row, covered, mask=row < rows)
            at = TABLE + row[:, None].to(tl.int64) * t_r + token[None, :].to(tl.int64) * t_n
            tile = tl.load(at, mask=(row < rows)[:, None] & there[None, :], other=0).to(tl.float32)
            lanes += tl.maximum(tile - covered[:, None], 0)
        gain = _add_lanes(lanes, _LANES, BLOCK)
        if WEIGHTED:
            gain *= tl.load(WEIGHT + u * count + token, mask=there, other=0)
        taken = tl.load(TAKEN + u * count + token, mask=there, other=1) != 0
        if step > 0:
            taken = taken | (token == pick)
        tl.store(TAKEN + u * count + token, taken.to(tl.int8), mask=there)
        if LATER:
            gain = tl.where(tl.load(LAST + u * count + token, mask=there, other=0) != 0, -1.0, gain)
        gain = tl.where(taken, _NONE, gain)
        lead = tl.argmax(gain, 0, tie_break_left=True)
        tl.store(BEST + u * blocks + block, tl.max(gain, 0))
        tl.store(AT + u * blocks + block, block * BLOCK + lead)


def _lengths(x: Tensor, depth: int) -> Tensor:
    length = x.new_empty(x.shape[:2], dtype=torch.float32)
    rows = 16
    _length_kernel[triton.cdiv(x.shape[1], rows), len(x)](x, length, *x.stride(), *x.shape[1:], ROWS=rows, DEPTH=depth)
    return length


def soft_coverage(targets: Tensor | None, tokens: Tensor, temperature: float) -> Tensor:
    targets = tokens if targets is None else targets
    size = config("coverage", tokens.device)
    (visuals, count, width), rows = tokens.shape, targets.shape[1]
    table = tokens.new_empty(visuals, rows, count, dtype=torch.float32)
    if not table.numel():
        return table
    wide = max(16, triton.next_power_of_2(width))
    lengths = [_lengths(x, min(256, wide)) for x in (targets, tokens)]
    side = size["side"]
    mixed = targets.dtype != tokens.dtype or (interpreted() and tokens.dtype == torch.bfloat16)
    _cosine_kernel[triton.cdiv(rows, side), triton.cdiv(count, side), visuals](
        targets, tokens, *lengths, table, *targets.stride(), *tokens.stride(), rows, count, width, temperature,
        WIDEN=mixed, SIDE=side, DEPTH=min(size["depth"], wide), num_warps=size["num_warps"], num_stages=size["num_stages"],
    )  # fmt: skip
    _softmax_kernel[(visuals * rows,)](table, rows, count, BLOCK=min(2048, triton.next_power_of_2(count)))
    return table


def max_coverage(table: Tensor, k: int, last: Tensor | None, weight: Tensor | None = None) -> Tensor:
    size = config("coverage", table.device)
    visuals, rows, count = table.shape
    block = size["tokens"]
    blocks = triton.cdiv(count, block)
    cover = [table.new_empty(visuals, rows, dtype=torch.float32) for _ in range(2)]
    best = [table.new_empty(visuals, blocks, dtype=torch.float32) for _ in range(2)]
    at = [table.new_empty(visuals, blocks, dtype=torch.int32) for _ in range(2)]
    taken = torch.zeros(visuals, count, dtype=torch.int8, device=table.device)
    picks = torch.empty(visuals, k, dtype=torch.int64, device=table.device)
    later = taken if last is None else last.to(torch.int8).contiguous()
    factor = cover[0] if weight is None else weight.float().contiguous()
    for step in range(k + 1):
        a, b = step % 2, 1 - step % 2
        _gain_kernel[blocks if step < k else 1, visuals](
            table, later, factor, taken, cover[a], cover[b], best[a], at[a], best[b], at[b], picks, *table.stride(), rows, count,
            blocks, k, step, LATER=last is not None, WEIGHTED=weight is not None, BLOCK=block, SPAN=triton.next_power_of_2(blocks),
            num_warps=size["pick_warps"],
        )  # fmt: skip
    return picks
