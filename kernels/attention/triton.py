# SPDX-License-Identifier: Apache-2.0
"""Attention statistics in two passes over tiles of the map: the log-sum-exp of every row, then sums down the columns. Nothing
of the map is ever stored, nothing waits for the device, and every output is written by one program.

Every row sees the keys of one interval [lo, hi), which serves causal masks, packed segments and parts of the columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from ..dispatch import interpreted
from .blocked import GONE, LOG2E
from .naive import HIDDEN

_HIDDEN = tl.constexpr(HIDDEN)
_GONE = tl.constexpr(GONE)
TILE = 1 << 14
"""Bytes of queries or keys in a tile: three of them fit the shared memory of every GPU."""
WANTED = 512
"""Programs that fill a large GPU: with fewer rows and heads than that, keys are split up too."""


@triton.jit
def _tile(X, place, count, step, dim_step, width, BLOCK: tl.constexpr):
    """Rows `place` of a matrix [count, width], zeros outside."""
    dims = tl.arange(0, BLOCK)
    at = X + place[:, None].to(tl.int64) * step + dims[None, :] * dim_step
    return tl.load(at, mask=(place < count)[:, None] & (dims < width)[None, :], other=0)


@triton.jit
def _logits(q, k, B, rows, cols, lo, hi, b_q, b_s, queries, scale, BIAS: tl.constexpr, WIDEN: tl.constexpr):
    """Logits in base 2 of a tile, and which cells of it are seen."""
    if WIDEN:  # the interpreter multiplies bfloat16 as if it were integers
        q, k = q.to(tl.float32), k.to(tl.float32)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = (cols[None, :] >= lo[:, None]) & (cols[None, :] < hi[:, None])
    if BIAS == 1:  # of keys
        inside = cols < tl.max(hi, 0)
        bias = tl.load(B + cols * b_s, mask=inside, other=0)[None, :]
        s += bias
        seen = seen & (bias > _HIDDEN)
    if BIAS == 2:  # of cells
        at = B + rows[:, None].to(tl.int64) * b_q + cols[None, :] * b_s
        bias = tl.load(at, mask=seen & (rows < queries)[:, None], other=0)
        s += bias
        seen = seen & (bias > _HIDDEN)
    return s, seen


@triton.jit
def _lse_kernel(
    Q, K, B, LO, HI, OUT, q_n, q_h, q_t, q_d, k_n, k_h, k_t, k_d, b_n, b_h, b_q, b_s, r_n,
    heads, group, queries, keys, width, span, pairs, scale,
    BIAS: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, ROWS)
    pair, block, split = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1)
    n, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    lo = tl.load(LO + n * r_n + rows, mask=rows < queries, other=0)
    hi = tl.load(HI + n * r_n + rows, mask=rows < queries, other=0)
    q = _tile(Q + n * q_n + h * q_h, rows, queries, q_t, q_d, width, WIDTH)
    begin = split * span
    start = tl.maximum(begin, tl.min(tl.where(hi > lo, lo, keys), 0) // COLUMNS * COLUMNS)
    stop = tl.minimum(begin + span, tl.max(hi, 0))
    top = tl.full([ROWS], _GONE, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for c in range(start, stop, COLUMNS):
        cols = c + tl.arange(0, COLUMNS)
        k = _tile(K + n * k_n + h // group * k_h, cols, keys, k_t, k_d, width, WIDTH)
        s, seen = _logits(q, k, B + n * b_n + h * b_h, rows, cols, lo, hi, b_q, b_s, queries, scale, BIAS, WIDEN)
        s = tl.where(seen, s, _GONE)
        higher = tl.maximum(top, tl.max(s, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.where(seen, tl.exp2(s - higher[:, None]), 0), 1)
        top = higher
    lse = tl.where(total > 0, top + tl.log2(tl.where(total > 0, total, 1)), _GONE)
    tl.store(OUT + (split * pairs + pair).to(tl.int64) * queries + rows, lse, mask=rows < queries)


@triton.jit
def _columns_kernel(
    Q, K, B, LO, HI, LSE, W, OUT, q_n, q_h, q_t, q_d, k_n, k_h, k_t, k_d, b_n, b_h, b_q, b_s, r_n, w_n, w_h, w_q,
    heads, group, queries, keys, width, scale,
    BIAS: tl.constexpr, WIDEN: tl.constexpr, MAX: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(keys, COLUMNS)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    first = block * COLUMNS
    cols = first + tl.arange(0, COLUMNS)
    k = _tile(K + n * k_n + h // group * k_h, cols, keys, k_t, k_d, width, WIDTH)
    found = tl.zeros([COLUMNS], tl.float32)
    for r in range(0, queries, ROWS):
        rows = r + tl.arange(0, ROWS)
        there = rows < queries
        lo = tl.load(LO + n * r_n + rows, mask=there, other=0)
        hi = tl.load(HI + n * r_n + rows, mask=there, other=0)
        lse = tl.load(LSE + pair.to(tl.int64) * queries + rows, mask=there, other=_GONE)
        weight = tl.load(W + n * w_n + h * w_h + rows * w_q, mask=there, other=0).to(tl.float32)
        counts = (weight != 0) & (lse > _HIDDEN)
        if (tl.max(tl.where(counts, hi, 0), 0) > first) & (tl.min(tl.where(counts, lo, keys), 0) < first + COLUMNS):
            q = _tile(Q + n * q_n + h * q_h, rows, queries, q_t, q_d, width, WIDTH)
            s, seen = _logits(q, k, B + n * b_n + h * b_h, rows, cols, lo, hi, b_q, b_s, queries, scale, BIAS, WIDEN)
            p = tl.exp2(tl.where(seen & counts[:, None], s - lse[:, None], _GONE))
            if MAX:
                found = tl.maximum(found, tl.max(p, 0))
            else:
                found += tl.sum(p * weight[:, None], 0)
    tl.store(OUT + pair.to(tl.int64) * keys + cols, found, mask=cols < keys)


@triton.jit
def _map_kernel(
    Q, K, B, LO, HI, LSE, OUT, q_n, q_h, q_t, q_d, k_n, k_h, k_t, k_d, b_n, b_h, b_q, b_s, r_n,
    heads, group, queries, keys, width, scale,
    BIAS: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, ROWS)
    pair, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    rows = block * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = rows < queries
    lo = tl.load(LO + n * r_n + rows, mask=there, other=0)
    hi = tl.load(HI + n * r_n + rows, mask=there, other=0)
    lse = tl.load(LSE + pair.to(tl.int64) * queries + rows, mask=there, other=_GONE)
    q = _tile(Q + n * q_n + h * q_h, rows, queries, q_t, q_d, width, WIDTH)
    k = _tile(K + n * k_n + h // group * k_h, cols, keys, k_t, k_d, width, WIDTH)
    s, seen = _logits(q, k, B + n * b_n + h * b_h, rows, cols, lo, hi, b_q, b_s, queries, scale, BIAS, WIDEN)
    p = tl.exp2(tl.where(seen & (lse > _HIDDEN)[:, None], s - lse[:, None], _GONE))
    at = OUT + (pair.to(tl.int64) * queries + rows[:, None]) * keys + cols[None, :]
    tl.store(at, p, mask=there[:, None] & (cols < keys)[None, :])


class _Map:
    """Queries, keys, bias and intervals of one call, and what all kernels need of them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        scale: float,
        bias: Tensor | None,
        lo: Tensor | None = None,
        hi: Tensor | None = None,
    ) -> None:
        self.q, self.k, self.device = q, k, q.device
        self.n, self.heads, self.queries, self.width = q.shape
        self.keys, self.pairs = k.shape[2], self.n * self.heads
        whole = torch.zeros(1, self.queries, dtype=torch.int32, device=q.device)
        self.lo = whole if lo is None else lo.to(torch.int32)
        self.hi = whole + self.keys if hi is None else hi.to(torch.int32)
        self.lo, self.hi = (t.contiguous() for t in torch.broadcast_tensors(self.lo, self.hi))
        self.bias_kind = 0 if bias is None else 1 if bias.shape[2] == 1 else 2
        self.bias = q if bias is None else bias.expand(self.n, self.heads, self.queries, self.keys)
        rows = 0 if len(self.lo) == 1 else self.queries
        self.strides = (*q.stride(), *k.stride(), *self.bias.stride(), rows)
        self.sizes = (self.heads, self.heads // k.shape[1], self.queries, self.keys, self.width)
        self.scale = scale * LOG2E
        table, width = config("attention", q.device), max(16, triton.next_power_of_2(self.width))
        most = max(16, TILE // (width * q.element_size()))
        self.rows, self.columns = min(table["rows"], most), min(table["columns"], most)
        self.options: dict[str, Any] = {
            "BIAS": self.bias_kind, "WIDEN": interpreted(), "ROWS": self.rows, "COLUMNS": self.columns,
            "WIDTH": width,
            "num_warps": table["num_warps"], "num_stages": table["num_stages"],
        }  # fmt: skip

    def lse(self) -> Tensor:
        """Log-sum-exp of the rows in base 2, [n, heads, Q]; GONE for rows that see nothing."""
        blocks = triton.cdiv(self.queries, self.rows) * self.pairs
        splits = max(1, min(triton.cdiv(WANTED, blocks), self.keys // (4 * self.columns)))
        span = triton.cdiv(triton.cdiv(self.keys, splits), self.columns) * self.columns
        splits = triton.cdiv(self.keys, span)
        parts = self.q.new_empty(splits, self.n, self.heads, self.queries, dtype=torch.float32)
        _lse_kernel[(blocks, splits)](
            self.q, self.k, self.bias, self.lo, self.hi, parts, *self.strides, *self.sizes, span, self.pairs, self.scale,
            **self.options,
        )  # fmt: skip
        if splits == 1:
            return parts[0]
        top = parts.amax(0)
        return top + (parts - top).exp2().sum(0).log2()

    def columns_of(self, lse: Tensor, weight: Tensor, maximum: bool) -> Tensor:
        """Weighted sum or maximum over the rows, [n, heads, S]; weight [n, heads, Q]."""
        found = self.q.new_empty(self.n, self.heads, self.keys, dtype=torch.float32)
        _columns_kernel[(triton.cdiv(self.keys, self.columns) * self.pairs,)](
            self.q, self.k, self.bias, self.lo, self.hi, lse, weight, found, *self.strides, *weight.stride(), *self.sizes,
            self.scale, MAX=maximum, **self.options,
        )  # fmt: skip
        return found

    def table(self, lse: Tensor) -> Tensor:
        found = self.q.new_empty(self.n, self.heads, self.queries, self.keys, dtype=torch.float32)
        grid = (triton.cdiv(self.queries, self.rows) * self.pairs, triton.cdiv(self.keys, self.columns))
        _map_kernel[grid](
            self.q, self.k, self.bias, self.lo, self.hi, lse, found, *self.strides, *self.sizes, self.scale, **self.options
        )  # fmt: skip
        return found


def attention_received(
    q: Tensor,
    k: Tensor,
    scale: float,
    reduce: str,
    weight: Tensor | None,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    at: Tensor | None,
    offset: int | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """[n, heads, S] float32."""
    (n, heads, queries, _), keys = q.shape, k.shape[2]
    if not n * heads * queries * keys:
        return q.new_zeros(n, heads, keys, dtype=torch.float32)
    bias = _in_base_2(key_bias)
    if key_mask is not None:
        bias = torch.where(key_mask, 0.0 if bias is None else bias, GONE)
    lo, hi = segment = None, None
    if cu_seqlens is not None:
        lo, hi = segment = _segments(cu_seqlens, keys)
    row = torch.arange(queries, device=q.device)[None] if at is None else at
    if at is not None or offset is not None:
        last = (row + 1 + (offset or 0)).clamp(0, keys)
        hi = last if hi is None else torch.minimum(last, hi)
    table = _Map(q, k, scale, None if bias is None else bias[:, None, None], lo, hi)
    lse = table.lse()
    given = q.new_ones(1, 1, 1, dtype=torch.float32) if weight is None else weight.float()
    given = given.expand(n, heads, queries)
    found = table.columns_of(lse, given, reduce == "max")
    if reduce != "mean":
        return found
    counted = (given * (lse > HIDDEN)).double()
    if segment[0] is None or segment[1] is None:
        total = counted.sum(2, keepdim=True)
    else:
        until = torch.nn.functional.pad(counted.cumsum(2), (1, 0))
        total = until[..., segment[1][0]] - until[..., segment[0][0]]
    return found / torch.where(total > 0, total, 1).float()


def attention_marginals(q: Tensor, k: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    """([n, heads, S - prefix], [n, heads, Q])."""
    (n, heads, queries, _), keys = q.shape, k.shape[2]
    if not n * heads * queries * keys:
        return q.new_zeros(n, heads, keys - prefix, dtype=torch.float32), q.new_zeros(n, heads, queries).float()
    table = _Map(q, k, scale, None)
    lse = table.lse()
    received = table.columns_of(lse, lse.new_ones(1, 1, 1).expand_as(lse), False)[..., prefix:]
    given = torch.ones_like(lse)
    if prefix:
        part = _Map(q, k, scale, None, torch.full((1, queries), prefix, device=q.device, dtype=torch.int32))
        given = (part.lse() - lse).exp2()
    return received / queries, given


def attention_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """[n, heads, Q, S] float32."""
    shape = *q.shape[:3], k.shape[2]
    if 0 in shape:
        return q.new_zeros(shape, dtype=torch.float32)
    if mask is not None:
        mask = torch.where(mask, 0.0, GONE) if mask.dtype == torch.bool else _in_base_2(mask)
    table = _Map(q, k, scale, mask)
    return table.table(table.lse())


def _in_base_2(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else (bias.float() * LOG2E).clamp_min(GONE)


def _segments(cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Begin and end of the segment of every token, [1, T] int64; both 0 for tokens behind the last segment."""
    place = torch.arange(tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    number = torch.searchsorted(cu_seqlens, place, right=True)
    inside = (number > 0) & (number < len(cu_seqlens))
    begin, end = (
        cu_seqlens[at].long() * inside for at in ((number - 1).clamp_min(0), number.clamp_max(len(cu_seqlens) - 1))
    )
    return begin[None], end[None]
