# SPDX-License-Identifier: Apache-2.0
"""`match` in one pass over tiles of scores: every program holds the lists of a block of rows; nothing else is stored."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from ..dispatch import interpreted
from .rule import Rule

_WANTED = 256
"""Programs that fill a large GPU: with fewer blocks of rows the columns are split up too."""
_NONE = tl.constexpr(float("-inf"))
_FAR = tl.constexpr(2**31 - 1)


@triton.jit
def _inverse_norm_kernel(X, OUT, x_g, x_r, rows, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in range(0, width, WIDTH):
        x = load_rows(X + group.to(tl.int64) * x_g, row, row < rows, x_r, start, width, WIDTH).to(tl.float32)
        squares += x * x
    norm = tl.maximum(tl.sqrt_rn(tl.sum(squares, 1)), 1e-12)
    tl.store(OUT + group.to(tl.int64) * rows + row, tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), norm), mask=row < rows)


@triton.jit
def load_rows(X, row, live, step, start, width, WIDTH: tl.constexpr):
    """Columns from `start` of the rows `row` of a matrix [..., width]; zeros outside and where not `live`."""
    at = start + tl.arange(0, WIDTH)
    return tl.load(
        X + row[:, None].to(tl.int64) * step + at[None, :], mask=live[:, None] & (at < width)[None, :], other=0
    )


@triton.jit
def segment_of(CU, row, segments, STEPS: tl.constexpr):
    """The last of the segments that begins at or before each row."""
    bottom = tl.zeros_like(row)
    top = bottom + segments
    for _ in tl.static_range(STEPS):
        middle = (bottom + top) // 2
        behind = tl.load(CU + middle).to(tl.int32) <= row
        bottom = tl.where(behind, middle, bottom)
        top = tl.where(behind, top, middle)
    return bottom


@triton.jit
def place_of(CU_A, CU_B, row, live, columns, segments, STEPS: tl.constexpr, RAGGED: tl.constexpr):
    """Of each row: its place in its segment, where the columns of that begin and end, and whether it is in a segment."""
    if RAGGED:
        segment = segment_of(CU_A, row, segments, STEPS)
        begin = tl.load(CU_A + segment).to(tl.int32)
        live = live & (row < tl.load(CU_A + segment + 1).to(tl.int32))
        return row - begin, tl.load(CU_B + segment).to(tl.int32), tl.load(CU_B + segment + 1).to(tl.int32), live
    return row, tl.zeros_like(row), tl.zeros_like(row) + columns, live


@triton.jit
def insert(best, place, score, column, M2: tl.constexpr):
    """Put one candidate per row into the lists [R, M2] if it beats the worst there, of equals the last; and whether it did."""
    slot = tl.arange(0, M2)[None, :]
    worst = tl.min(best, 1)
    better = score > worst
    low = best == worst[:, None]
    latest = tl.max(tl.where(low, place, -2), 1)
    chosen = tl.max(tl.where(low & (place == latest[:, None]), slot, -1), 1)
    hit = better[:, None] & (slot == chosen[:, None])
    return tl.where(hit, score[:, None], best), tl.where(hit, column[:, None], place), better


@triton.jit
def empty_lists(ROWS: tl.constexpr, M: tl.constexpr, M2: tl.constexpr):
    """Lists of `M` nothings; slots beyond that are never the worst."""
    best = tl.zeros((ROWS, M2), tl.float32)
    return best + tl.where(tl.arange(0, M2) < M, _NONE, -_NONE)[None, :], tl.full((ROWS, M2), -1, tl.int32)


@triton.jit
def insert_tile(best, place, score, column, M: tl.constexpr, M2: tl.constexpr):
    """Put the columns of a tile [R, C] into the lists: those of the tile come after all that are in them."""
    go = tl.full((), 1, tl.int32)
    while go > 0:
        top = tl.max(score, 1)
        first = tl.min(tl.where(score == top[:, None], column[None, :], _FAR), 1)
        best, place, better = insert(best, place, top, first, M2)
        score = tl.where(column[None, :] == first[:, None], _NONE, score)
        go = tl.max(better.to(tl.int32), 0)
        if M == 1:
            go = go * 0
    return best, place


@triton.jit
def _store(VALUE, INDEX, best, place, at, row_ok, scale, M: tl.constexpr, M2: tl.constexpr, SIGN: tl.constexpr):
    """Write the lists, best first; scores times `scale`, whose sign SIGN turns around."""
    real = tl.arange(0, M2)[None, :] < M
    best = tl.where(real, best, _NONE)
    for t in tl.static_range(M):
        top = tl.max(best, 1)
        found = real & (best == top[:, None])
        column = tl.min(tl.where(found, place, _FAR), 1)
        none = top == _NONE
        value = tl.where(none, _NONE, tl.where(none, 0.0, top) * scale) * SIGN
        tl.store(VALUE + at.to(tl.int64) * M + t, value, mask=row_ok)
        tl.store(INDEX + at.to(tl.int64) * M + t, tl.where(none, -1, column).to(tl.int64), mask=row_ok)
        taken = found & (place == column[:, None])
        best = tl.where(taken, _NONE, best)


@triton.jit
def _match_kernel(
    A, B, IA, IB, CU_A, CU_B, QUERY, KEY, VALUE, INDEX,
    a_g, a_r, b_g, b_r, rows, columns, width, segments, row_blocks, frame, low, high, total,
    RAGGED: tl.constexpr, STEPS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, OTHERS: tl.constexpr,
    NORMALIZE: tl.constexpr, SIGN: tl.constexpr, LAST: tl.constexpr, HAS_QUERY: tl.constexpr, HAS_KEY: tl.constexpr,
    WIDEN: tl.constexpr, M: tl.constexpr, M2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // row_blocks
    row = (tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    at = group * rows + row
    live = inside
    if HAS_QUERY:
        live = live & (tl.load(QUERY + at, mask=inside, other=0) != 0)
    own, origin, limit, live = place_of(CU_A, CU_B, tl.where(inside, row, 0), live, columns, segments, STEPS, RAGGED)
    first, last = origin, limit
    if LOW:
        first = tl.maximum(first, origin + (own // frame + low) * frame)
    if HIGH:
        last = tl.minimum(last, origin + (own // frame + high + 1) * frame)
    first, last = tl.where(live, first, _FAR), tl.where(live, last, 0)
    start, stop = tl.min(first, 0), tl.max(last, 0)
    share = tl.cdiv(tl.cdiv(tl.maximum(stop - start, 0), COLUMNS), tl.num_programs(1)) * COLUMNS
    start += tl.program_id(1) * share
    stop = tl.minimum(stop, start + share)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if NORMALIZE:
        scale = tl.load(IA + at, mask=live, other=0)
    solid = live & (scale != 0)
    A += group.to(tl.int64) * a_g
    B += group.to(tl.int64) * b_g
    best, place = empty_lists(ROWS, M, M2)
    for c in range(start, stop, COLUMNS):
        column = c + tl.arange(0, COLUMNS)
        known = column < stop
        if HAS_KEY:
            known = known & (tl.load(KEY + group * columns + column, mask=known, other=0) != 0)
        factor = tl.full((COLUMNS,), 1.0, tl.float32)
        if NORMALIZE:
            factor = tl.load(IB + group * columns + column, mask=known, other=0)
        score = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, width, WIDTH):
            x = load_rows(A, row, solid, a_r, k, width, WIDTH)
            y = load_rows(B, column, known & (factor != 0), b_r, k, width, WIDTH)
            if WIDEN:  # the interpreter multiplies bfloat16 as if it were integers
                x, y = x.to(tl.float32), y.to(tl.float32)
            score = tl.dot(x, tl.trans(y), score, input_precision="ieee")
        score = score * factor[None, :] * SIGN
        seen = (column[None, :] >= first[:, None]) & (column[None, :] < last[:, None]) & known[None, :]
        if OTHERS:
            seen = seen & (column[None, :] != (origin + own)[:, None])
        best, place = insert_tile(best, place, tl.where(seen, score, _NONE), column, M, M2)
    out = tl.program_id(1) * total + at
    if LAST:
        _store(VALUE, INDEX, best, place, out, inside, scale, M, M2, SIGN)
    else:
        _store(VALUE, INDEX, best, place, out, inside, tl.full((ROWS,), 1.0, tl.float32), M, M2, 1)


@triton.jit
def _same_cell_kernel(
    A, B, IA, IB, CU_A, CU_B, QUERY, KEY, VALUE, INDEX,
    a_g, a_r, b_g, b_r, rows, columns, width, segments, row_blocks, frame, low, high,
    RAGGED: tl.constexpr, STEPS: tl.constexpr, OTHERS: tl.constexpr, NORMALIZE: tl.constexpr, SIGN: tl.constexpr,
    HAS_QUERY: tl.constexpr, HAS_KEY: tl.constexpr, M: tl.constexpr, M2: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0) // row_blocks
    row = (tl.program_id(0) % row_blocks) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    at = group * rows + row
    live = inside
    if HAS_QUERY:
        live = live & (tl.load(QUERY + at, mask=inside, other=0) != 0)
    own, origin, limit, live = place_of(CU_A, CU_B, tl.where(inside, row, 0), live, columns, segments, STEPS, RAGGED)
    scale = tl.full((ROWS,), 1.0, tl.float32)
    if NORMALIZE:
        scale = tl.load(IA + at, mask=live, other=0)
    A += group.to(tl.int64) * a_g
    B += group.to(tl.int64) * b_g
    best, place = empty_lists(ROWS, M, M2)
    for step in range(low, high + 1):
        column = origin + own + step * frame
        known = live & (column >= origin) & (column < limit)
        if OTHERS:
            known = known & (column != origin + own)
        if HAS_KEY:
            known = known & (tl.load(KEY + group * columns + column, mask=known, other=0) != 0)
        factor = tl.full((ROWS,), 1.0, tl.float32)
        if NORMALIZE:
            factor = tl.load(IB + group * columns + column, mask=known, other=0)
        solid = known & (scale != 0) & (factor != 0)
        total = tl.zeros((ROWS, WIDTH), tl.float32)
        for k in range(0, width, WIDTH):
            x = load_rows(A, row, solid, a_r, k, width, WIDTH).to(tl.float32)
            total += x * load_rows(B, column, solid, b_r, k, width, WIDTH).to(tl.float32)
        score = tl.where(known, tl.sum(total, 1) * factor * SIGN, _NONE)
        best, place, _ = insert(best, place, score, column, M2)
    _store(VALUE, INDEX, best, place, at, inside, scale, M, M2, SIGN)


def match(
    a: Tensor,
    b: Tensor,
    rule: Rule,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_a: Tensor | None = None,
    cu_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    a, b = (a, b) if a.dtype == b.dtype else (a.float(), b.float())
    a, b = ready(a), ready(b)
    left, right = (x if cu_a is None else x[None] for x in (a, b))
    groups, rows, width = left.shape
    columns, shape = right.shape[1], (*a.shape[:-1], rule.m)
    none = float("-inf") if rule.largest else float("inf")
    if not groups * rows * columns or (cu_a is not None and len(cu_a) < 2):
        return a.new_full(shape, none, dtype=torch.float32), torch.full(shape, -1, device=a.device)
    options = dict(config("match" if a.element_size() < 4 else "match_float32", a.device))
    height, across, deep = options.pop("rows"), options.pop("columns"), options.pop("width")
    segments = 0 if cu_a is None else len(cu_a) - 1
    ia, ib = (inverse_norms(x) for x in (left, right)) if rule.normalize else (None, None)
    blocks = triton.cdiv(rows, height)
    arguments: dict[str, Any] = {
        "A": left, "B": right, "IA": ia, "IB": ib, "CU_A": cu_a, "CU_B": cu_b,
        "QUERY": as_bytes(query_mask), "KEY": as_bytes(key_mask),
        "a_g": left.stride(0), "a_r": left.stride(1), "b_g": right.stride(0), "b_r": right.stride(1),
        "rows": rows, "columns": columns, "width": width, "segments": segments, "row_blocks": blocks, "frame": rule.frame,
        "RAGGED": cu_a is not None, "STEPS": max(0, segments - 1).bit_length(), "OTHERS": rule.exclude_self,
        "NORMALIZE": rule.normalize, "SIGN": 1 if rule.largest else -1,
        "HAS_QUERY": query_mask is not None, "HAS_KEY": key_mask is not None,
        "M": rule.m, "M2": triton.next_power_of_2(rule.m), "ROWS": height, "WIDTH": deep, **options,
    }  # fmt: skip
    if rule.same_cell:
        steps, splits = rule.steps(rows, columns), 1
        value, index = _lists(a, 1, groups * rows, rule.m)
        with torch.cuda.device_of(a):
            _same_cell_kernel[(groups * blocks,)](
                VALUE=value, INDEX=index, low=steps.start, high=steps.stop - 1, **arguments
            )
        return value.view(shape), index.view(shape)
    splits = max(1, min(triton.cdiv(_WANTED, groups * blocks), triton.cdiv(columns, across)))
    value, index = _lists(a, splits, groups * rows, rule.m)
    with torch.cuda.device_of(a):
        _match_kernel[(groups * blocks, splits)](
            VALUE=value, INDEX=index, low=rule.low or 0, high=rule.high or 0, total=groups * rows, LAST=splits == 1,
            LOW=rule.low is not None, HIGH=rule.high is not None, COLUMNS=across,
            WIDEN=interpreted() and a.dtype == torch.bfloat16, **arguments,
        )  # fmt: skip
    if splits > 1:
        value, index = _join(value, index, rule.m)
        if ia is not None:
            value = value * ia.view(-1, 1)
        value = value.masked_fill(index < 0, float("-inf"))
        value = value if rule.largest else -value
    return value.view(shape), index.view(shape)


def _lists(a: Tensor, splits: int, rows: int, m: int) -> tuple[Tensor, Tensor]:
    value = a.new_empty(splits, rows, m, dtype=torch.float32)
    return value, torch.empty(value.shape, dtype=torch.int64, device=a.device)


def _join(value: Tensor, index: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The best of the lists [splits, rows, m] of parts of the columns, in order: [rows, m]."""
    value, index = (x.transpose(0, 1).flatten(1) for x in (value, index))
    best, order = value.max(1, keepdim=True) if m == 1 else value.sort(dim=1, descending=True, stable=True)
    return best[:, :m], index.gather(1, order[:, :m])


def inverse_norms(x: Tensor) -> Tensor:
    """As `rule.inverse_norms`, of [G, n, D]: [G, n] float32, in one launch."""
    groups, rows, width = x.shape
    out = x.new_empty(groups, rows, dtype=torch.float32)
    deep = max(16, min(1024, triton.next_power_of_2(width)))
    height = max(1, 2048 // deep)
    with torch.cuda.device_of(x):
        _inverse_norm_kernel[(triton.cdiv(rows, height), groups)](
            x, out, x.stride(0), x.stride(1), rows, width, ROWS=height, WIDTH=deep
        )
    return out


def ready(x: Tensor) -> Tensor:
    """`x` in a type that the kernels read, with its last dimension dense."""
    x = x if x.dtype in (torch.float16, torch.bfloat16, torch.float32) else x.float()
    return x if x.stride(-1) == 1 else x.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
