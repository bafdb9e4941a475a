# SPDX-License-Identifier: Apache-2.0
"""Lengths and cosines of tokens on a GPU: the whole table, half of it computed and mirrored, or the nearest neighbours only."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from ..dispatch import interpreted

_NONE = tl.constexpr(float("-inf"))


@triton.jit
def _measure_kernel(X, LENGTH, OWN, x_u, x_n, x_d, count, width, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Length of each row, at least 1e-12, and its square after normalisation: 1 and not nearly so, or 0 for zeros."""
    u = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = rows < count
    total = tl.zeros([ROWS, DEPTH], tl.float32)
    for d in range(0, width, DEPTH):
        dims = d + tl.arange(0, DEPTH)
        at = X + u * x_u + rows[:, None].to(tl.int64) * x_n + dims[None, :] * x_d
        x = tl.load(at, mask=there[:, None] & (dims < width)[None, :], other=0).to(tl.float32)
        total += x * x
    length = tl.sqrt(tl.sum(total, 1))
    share = length / 1e-12
    tl.store(LENGTH + u * count + rows, tl.maximum(length, 1e-12), mask=there)
    part = tl.where(length >= 1e-12, 1.0, share * share)
    tl.store(OWN + u * count + rows, tl.where(length < float("inf"), part, 0), mask=there)


@triton.jit
def length_of(LENGTH, index, count):
    return tl.load(LENGTH + index, mask=index < count, other=1)


@triton.jit
def _cosines(
    X, LENGTH, rows, cols, count, width, x_n, x_d,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """A tile of cosines; rows too long to be measured count as zero."""
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for d in range(0, width, DEPTH):
        dims = d + tl.arange(0, DEPTH)
        inside = dims < width
        a = tl.load(
            X + rows[:, None].to(tl.int64) * x_n + dims[None, :] * x_d,
            mask=(rows < count)[:, None] & inside[None, :],
            other=0,
        )
        b = tl.load(
            X + cols[None, :].to(tl.int64) * x_n + dims[:, None] * x_d,
            mask=(cols < count)[None, :] & inside[:, None],
            other=0,
        )
        if WIDEN:  # the interpreter multiplies bfloat16 as if it were integers
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    scale = length_of(LENGTH, rows, count)[:, None] * length_of(LENGTH, cols, count)[None, :]
    return tl.where(scale < float("inf"), total / scale, 0)


@triton.jit
def _table_kernel(
    X, LENGTH, OUT, NEAR, x_u, x_n, x_d, count, width,
    NEAREST: tl.constexpr, WIDEN: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One tile of the table on or above the diagonal, and its mirror image; NEAR [U, tiles, N]: the largest cosine of each
    token to another one of the tile."""
    a, b, u = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if b >= a:
        rows, cols = a * SIDE + tl.arange(0, SIDE), b * SIDE + tl.arange(0, SIDE)
        s = _cosines(X + u * x_u, LENGTH + u * count, rows, cols, count, width, x_n, x_d, WIDEN, SIDE, SIDE, DEPTH)
        inside = (rows < count)[:, None] & (cols < count)[None, :]
        OUT += u * count * count
        tl.store(OUT + rows[:, None].to(tl.int64) * count + cols[None, :], s, mask=inside)
        if NEAREST:
            other = tl.where(inside & (rows[:, None] != cols[None, :]), s, _NONE)
            NEAR += u * tl.num_programs(0) * count
            tl.store(NEAR + b * count + rows, tl.max(other, 1), mask=rows < count)
        if b > a:
            tl.store(OUT + cols[None, :].to(tl.int64) * count + rows[:, None], s, mask=inside)
            if NEAREST:
                tl.store(NEAR + a * count + cols, tl.max(other, 0), mask=cols < count)


@triton.jit
def _nearest_kernel(
    X, LENGTH, NEAR, x_u, x_n, x_d, count, width, WIDEN: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr
):
    """The largest cosine of each token to another one, without the table."""
    u = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * SIDE + tl.arange(0, SIDE)
    near = tl.full([SIDE], _NONE, tl.float32)
    for b in range(0, count, SIDE):
        cols = b + tl.arange(0, SIDE)
        s = _cosines(X + u * x_u, LENGTH + u * count, rows, cols, count, width, x_n, x_d, WIDEN, SIDE, SIDE, DEPTH)
        near = tl.maximum(
            near, tl.max(tl.where((cols < count)[None, :] & (rows[:, None] != cols[None, :]), s, _NONE), 1)
        )
    tl.store(NEAR + u * count + rows, near, mask=rows < count)


class Tokens:
    """Measured features [U, N, D] and how to launch kernels on them."""

    def __init__(self, features: Tensor) -> None:
        self.x, (self.visuals, self.count, self.width) = features, features.shape
        self.size: dict[str, Any] = dict(config("diverse", features.device))
        self.widen = interpreted() and features.dtype == torch.bfloat16
        self.length, self.own_part = features.new_empty(2, self.visuals, self.count, dtype=torch.float32)
        rows, depth = 16, self.depth(256)
        _measure_kernel[triton.cdiv(self.count, rows), self.visuals](
            self.x, self.length, self.own_part, *self.x.stride(), self.count, self.width, ROWS=rows, DEPTH=depth
        )

    def depth(self, most: int) -> int:
        """Columns of features that are read at a time."""
        return min(most, max(16, triton.next_power_of_2(self.width)))

    def options(self) -> dict[str, int]:
        return {
            "WIDEN": self.widen, "SIDE": self.size["side"], "DEPTH": self.depth(self.size["depth"]),
            "num_warps": self.size["num_warps"], "num_stages": self.size["num_stages"],
        }  # fmt: skip

    def table(self, nearest: bool) -> tuple[Tensor, Tensor]:
        """Cosines [U, N, N]; the largest one of each token within each tile, [U, tiles, N], if wanted."""
        tiles = triton.cdiv(self.count, self.size["side"])
        table = self.length.new_empty(self.visuals, self.count, self.count)
        near = self.length.new_empty(self.visuals, tiles if nearest else 0, self.count)
        _table_kernel[tiles, tiles, self.visuals](
            self.x,
            self.length,
            table,
            near,
            *self.x.stride(),
            self.count,
            self.width,
            NEAREST=nearest,
            **self.options(),
        )
        return table, near

    def nearest(self) -> Tensor:
        near = torch.empty_like(self.length)
        _nearest_kernel[triton.cdiv(self.count, self.size["side"]), self.visuals](
            self.x, self.length, near, *self.x.stride(), self.count, self.width, **self.options()
        )
        return near

    def blocks(self, block: int) -> tuple[tuple[int, int], dict[str, int]]:
        """Grid and constants of kernels in which each program has `block` tokens."""
        blocks = triton.cdiv(self.count, block)
        constants = {"BLOCK": block, "SPAN": triton.next_power_of_2(blocks), "DEPTH": self.depth(self.size["reach"])}
        return (blocks, self.visuals), constants
