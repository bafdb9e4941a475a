# SPDX-License-Identifier: Apache-2.0
"""Components in one pass: every tile of the graph joins the trees of its edges with atomic minima.

The parent of a token is never above it, so the root of a finished tree is the lowest token of its component whatever the order
in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from ..dispatch import interpreted
from ..match.triton import as_bytes, inverse_norms, load_rows, ready
from ..ragged import packed, padded


@triton.jit
def _roots(PARENT, token, live):
    parent = tl.load(PARENT + token, mask=live, other=0, volatile=True)
    parent = tl.where(live, parent, token)
    while tl.max(tl.max((parent != token).to(tl.int32), 1), 0) > 0:
        token = parent
        parent = tl.where(live, tl.load(PARENT + token, mask=live, other=0, volatile=True), token)
    return token


@triton.jit
def _link_kernel(
    X, SCALE, MASK, PARENT, DEGREE, x_g, x_r, n, width, threshold,
    HAS_MASK: tl.constexpr, WIDEN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(2)
    top, begin = tl.program_id(1) * ROWS, tl.program_id(0) * COLUMNS
    if begin + COLUMNS - 1 > top:  # above the diagonal
        row, column = top + tl.arange(0, ROWS), begin + tl.arange(0, COLUMNS)
        below, across = row < n, column < n
        if HAS_MASK:
            below = below & (tl.load(MASK + group * n + row, mask=below, other=0) != 0)
            across = across & (tl.load(MASK + group * n + column, mask=across, other=0) != 0)
        left = tl.load(SCALE + group * n + row, mask=below, other=0)
        right = tl.load(SCALE + group * n + column, mask=across, other=0)
        X += group.to(tl.int64) * x_g
        cosine = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, width, WIDTH):
            x = load_rows(X, row, below & (left != 0), x_r, k, width, WIDTH)
            y = load_rows(X, column, across & (right != 0), x_r, k, width, WIDTH)
            if WIDEN:  # the interpreter multiplies bfloat16 as if it were integers
                x, y = x.to(tl.float32), y.to(tl.float32)
            cosine = tl.dot(x, tl.trans(y), cosine, input_precision="ieee")
        cosine = cosine * right[None, :] * left[:, None]
        edge = (cosine > threshold) & below[:, None] & across[None, :] & (column[None, :] > row[:, None])
        outgoing, incoming = tl.sum(edge.to(tl.int32), 1), tl.sum(edge.to(tl.int32), 0)
        tl.atomic_add(DEGREE + group * n + row, outgoing, mask=outgoing > 0)
        tl.atomic_add(DEGREE + group * n + column, incoming, mask=incoming > 0)
        PARENT += group.to(tl.int64) * n
        a = tl.zeros((ROWS, COLUMNS), tl.int32) + row[:, None]
        b = tl.zeros((ROWS, COLUMNS), tl.int32) + column[None, :]
        while tl.max(tl.max(edge.to(tl.int32), 1), 0) > 0:
            a, b = _roots(PARENT, a, edge), _roots(PARENT, b, edge)
            high, low = tl.maximum(a, b), tl.minimum(a, b)
            edge = edge & (high != low)
            old = tl.atomic_min(PARENT + high, low, mask=edge)
            edge = edge & (old != high)  # no root any more: what it hung on is joined next
            a, b = tl.where(edge, old, a), tl.where(edge, low, b)


@triton.jit
def _label_kernel(PARENT, LABEL, n, total, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < total
    base = at // n * n
    token = at - base
    parent = tl.load(PARENT + at, mask=live, other=0)
    while tl.max(tl.where(live & (parent != token), 1, 0), 0) > 0:
        token = parent
        parent = tl.load(PARENT + base + token, mask=live, other=0)
    tl.store(LABEL + at, token.to(tl.int64), mask=live)


def components(
    x: Tensor,
    threshold: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return _dense(x, threshold, mask)
    rows, real = padded(x, cu_seqlens, longest)
    known = real if mask is None else real & padded(mask, cu_seqlens, rows.shape[1])[0]
    label, degree = _dense(rows, threshold, known)
    label = torch.where(label < 0, -1, label + cu_seqlens[:-1, None])
    return packed(label, cu_seqlens, len(x), -1), packed(degree, cu_seqlens, len(x), 0)


def _dense(x: Tensor, threshold: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    x = ready(x)
    groups, n, width = x.shape
    label = torch.empty(groups, n, dtype=torch.int64, device=x.device)
    degree = torch.ones(groups, n, dtype=torch.int32, device=x.device)
    if not groups * n:
        return label, degree.long()
    parent = torch.arange(n, dtype=torch.int32, device=x.device).repeat(groups, 1)
    options = dict(config("components" if x.element_size() < 4 else "components_float32", x.device))
    high, wide, deep = options.pop("rows"), options.pop("columns"), options.pop("width")
    with torch.cuda.device_of(x):
        _link_kernel[(triton.cdiv(n, wide), triton.cdiv(n, high), groups)](
            x, inverse_norms(x), as_bytes(mask), parent, degree, x.stride(0), x.stride(1), n, width, threshold,
            HAS_MASK=mask is not None, WIDEN=interpreted() and x.dtype == torch.bfloat16,
            ROWS=high, COLUMNS=wide, WIDTH=deep, **options,
        )  # fmt: skip
        _label_kernel[(triton.cdiv(groups * n, 1024),)](parent, label, n, groups * n, BLOCK=1024)
    if mask is not None:
        label, degree = label.masked_fill_(~mask, -1), degree.masked_fill_(~mask, 0)
    return label, degree.long()
