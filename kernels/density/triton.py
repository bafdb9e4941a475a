# SPDX-License-Identifier: Apache-2.0
"""Density peaks with squared distances from a Triton kernel: sums of squared differences in float32, which lose nothing where
tokens nearly agree and are the same for equal tokens wherever they stand."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from ..match.blocked import COLUMNS, round_up
from ..ragged import packed, padded
from .blocked import closest, peaks

ELEMENTS = 1 << 24
"""Distances in a block: 64 MiB."""
_UNROLL = 8
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _squares_kernel(
    X, Y, OUT, x_g, x_d, y_g, y_d, o_g, o_r, rows, columns, across, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    x_at, y_at = X + group * x_g + row, Y + group * y_g + column
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, width, UNROLL):
        part = tl.zeros((ROWS, COLUMNS), tl.float32)  # sums of few terms first: smaller errors
        for _u in tl.static_range(UNROLL):
            x = tl.load(x_at, mask=row < rows, other=0)
            y = tl.load(y_at, mask=column < columns, other=0)
            apart = x[:, None] - y[None, :]
            part += apart * apart
            x_at += x_d
            y_at += y_d
        total += part
    out = tl.where((column < columns)[None, :], -tl.minimum(total, _LARGEST), float("-inf"))
    at = OUT + group * o_g + row[:, None].to(tl.int64) * o_r + column[None, :]
    tl.store(at, out, mask=(row < rows)[:, None] & (column < across)[None, :])


def squares(x: Tensor, y: Tensor | None = None, known: Tensor | None = None) -> Tensor:
    """`blocked.Squares`."""
    groups, rows, columns = *x.shape[:2], (x if y is None else y).shape[1]
    left = _columns_of(x)
    right = left if y is None else _columns_of(y)
    options = dict(config("density", x.device))
    high, wide = options.pop("rows"), options.pop("columns")
    out = torch.empty(groups, rows, round_up(columns, COLUMNS), device=x.device)
    with torch.cuda.device_of(x):
        _squares_kernel[(triton.cdiv(out.shape[2], wide), triton.cdiv(rows, high), groups)](
            left, right, out, left.stride(0), left.stride(1), right.stride(0), right.stride(1), out.stride(0), out.stride(1),
            rows, columns, out.shape[2], left.shape[1], ROWS=high, COLUMNS=wide, UNROLL=_UNROLL, **options,
        )  # fmt: skip
    return out


def _columns_of(x: Tensor) -> Tensor:
    """Coordinates [G, C', n] float32, C' a multiple of the steps of the kernel, filled up with zeros."""
    out = torch.empty(x.shape[0], round_up(x.shape[2], _UNROLL), x.shape[1], device=x.device)
    out[:, : x.shape[2]].copy_(x.transpose(1, 2))
    out[:, x.shape[2] :].zero_()
    return out


def density_peaks(
    x: Tensor, k: int, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, longest: int | None = None
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return peaks(x, k, mask, squares, ELEMENTS)
    rows, real = padded(x, cu_seqlens, longest)
    known = real if mask is None else real & padded(mask, cu_seqlens, rows.shape[1])[0]
    spread, gap = peaks(rows, k, known, squares, ELEMENTS)
    return packed(spread, cu_seqlens, len(x), float("inf")), packed(gap, cu_seqlens, len(x), 0)


def nearest(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    cu_x: Tensor | None = None,
    cu_y: Tensor | None = None,
    longest: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    if cu_x is None or cu_y is None:
        return closest(x, y, mask, squares, ELEMENTS)
    wide, high = longest or (None, None)
    left, _ = padded(x, cu_x, wide)
    right, real = padded(y, cu_y, high)
    known = real if mask is None else real & padded(mask, cu_y, right.shape[1])[0]
    distance, index = closest(left, right, known, squares, ELEMENTS)
    index = torch.where(index < 0, -1, index + cu_y[:-1, None])
    return packed(distance, cu_x, len(x), float("inf")), packed(index, cu_x, len(x), -1)
