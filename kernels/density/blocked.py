# SPDX-License-Identifier: Apache-2.0
"""Density peaks from blocks of rows of the table of distances, with plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ..match.blocked import COLUMNS, ROWS, first_max, group_width, round_up
from ..ragged import segments

ELEMENTS = 1 << 26
"""Distances in a block: as long as the whole table is no more (8,192 tokens) it is made once, else one and a half times."""
DEEP = 1 << 24
"""Numbers of the float64 copy of the tokens that is held at a time."""
LOW = 128
"""Rows of a strip at least: products of fewer are slower."""
_PARTED = 1 << 16
"""Distances that are parted at a time: the copy stays near the processor."""
_STRIP = {"cpu": 1 << 18}
"""Distances among which denser tokens are looked for at a time, by device; elsewhere 2**24."""
SAME = 1e-13
"""Squared norms (of what lies around the mean) count so much less, so that the distance of equal tokens is 0 and not rounding."""


class Squares(Protocol):
    """Minus the squared distances of x [G, r, C] and y [G, c, C] (None: x itself), [G, R, C'] float32: more rows than asked for may
    follow, and more columns, which are -inf; C' is a multiple of 32. known [G, c] bool: rows of `y` that count; distances of others
    may be rough."""

    def __call__(self, x: Tensor, y: Tensor | None = None, known: Tensor | None = None) -> Tensor: ...


def density_peaks(
    x: Tensor, k: int, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, longest: int | None = None,
    dense: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dense(x, k, mask): the same of x [G, n, C]."""
    dense = dense or (lambda x, k, mask: peaks(x, k, mask, products, ELEMENTS))
    if cu_seqlens is None:
        return dense(x, k, mask)
    spread, gap = (x.new_full(x.shape[:1], value, dtype=torch.float32) for value in (float("inf"), 0))
    for begin, end in segments(cu_seqlens):
        if mask is not None and x.device.type == "cpu" and not mask[begin:end].any().tolist():
            continue
        part = dense(x[None, begin:end], k, None if mask is None else mask[None, begin:end])
        spread[begin:end], gap[begin:end] = part[0][0], part[1][0]
    return spread, gap


def nearest(
    x: Tensor, y: Tensor, mask: Tensor | None = None, cu_x: Tensor | None = None, cu_y: Tensor | None = None,
    longest: tuple[int, int] | None = None, dense: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """dense(x, y, mask): the same of x [G, n, C]."""
    dense = dense or (lambda x, y, mask: closest(x, y, mask, products, ELEMENTS))
    if cu_x is None or cu_y is None:
        return dense(x, y, mask)
    distance, index = x.new_full(x.shape[:1], float("inf"), dtype=torch.float32), x.new_full(x.shape[:1], -1).long()
    for (x0, x1), (y0, y1) in zip(segments(cu_x), segments(cu_y), strict=True):
        near, place = dense(x[None, x0:x1], y[None, y0:y1], None if mask is None else mask[None, y0:y1])
        distance[x0:x1], index[x0:x1] = near[0], torch.where(place[0] < 0, -1, place[0] + y0)
    return distance, index


def products(x: Tensor, y: Tensor | None = None, known: Tensor | None = None) -> Tensor:
    """`Squares` by matrix products in float64 of what is left of the tokens without their mean (of `y`), so that distances which
    are small beside the norms are exact to float32. Of a table of tokens with themselves one half is made, a strip of rows at a
    time, and mirrored in float32."""
    other = x if y is None else y
    (groups, rows, width), columns = x.shape, other.shape[1]
    out = torch.empty(groups, round_up(rows, ROWS), round_up(columns, COLUMNS), device=x.device)
    norms = torch.zeros(groups, out.shape[2], dtype=torch.float64, device=x.device)
    deep = max(64, DEEP // max(1, groups * out.shape[2]))
    chunks = [slice(first, first + deep) for first in range(0, width, deep)]
    for chunk in chunks:
        right, middle = _centred(other[..., chunk], out.shape[2])
        norms.add_(torch.linalg.vector_norm(right, dim=2).square_(), alpha=1 - SAME)
    step = out.shape[1] if y is not None else max(LOW, round_up(rows // 16, COLUMNS))
    strip = norms.new_empty(groups * min(step, out.shape[1]) * out.shape[2])
    for r in range(0, rows, step):
        end = min(r + step, out.shape[1])
        begin, own = (0, norms.new_zeros(groups, end - r)) if y is not None else (r, norms[:, r:end])
        part = strip[: groups * (end - r) * (out.shape[2] - begin)].view(groups, end - r, -1)
        torch.add(own[..., None], norms[:, None, begin:], out=part).neg_()
        for chunk in chunks:
            if len(chunks) > 1:
                right, middle = _centred(other[..., chunk], out.shape[2])
            left = right[:, r:end]
            if y is not None:
                left = norms.new_zeros(groups, end - r, right.shape[2])
                torch.sub(x[:, r:end, chunk], middle, out=left[:, : rows - r])
                part.sub_(torch.linalg.vector_norm(left, dim=2).square_()[..., None], alpha=1 - SAME)
            part.baddbmm_(left, right[:, begin:].transpose(1, 2), alpha=2)
        out[:, r:end, begin:].copy_(part)
        out[:, r:end, begin:].clamp_(-torch.finfo(torch.float32).max, 0)
        if y is None:
            out[:, end:, r:end].copy_(out[:, r:end, end : out.shape[1]].transpose(1, 2))
    out[..., columns:] = float("-inf")
    return out


def _centred(x: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """What is left of x [G, n, c] without its mean, filled up to `rows` with zeros, and the mean [G, 1, c], float64."""
    middle = x.mean(1, keepdim=True, dtype=torch.float32).double()  # any centre does
    found = middle.new_empty(len(x), rows, x.shape[2])
    torch.sub(x, middle, out=found[:, : x.shape[1]])
    found[:, x.shape[1] :] = 0
    return found, middle


@torch.no_grad()
def peaks(
    x: Tensor, k: int, mask: Tensor | None, squares: Squares, elements: int, settle: Callable[..., None] | None = None
) -> tuple[Tensor, Tensor]:
    """`density_peaks` of x [G, n, C] with distances by `squares`. settle(x, k, mask, spread, farthest, table): decide, in place,
    which of two tokens is the denser, where `squares` leaves it open."""
    spread, gap = (x.new_zeros(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if not x.shape[1]:
        return spread, gap
    if mask is not None:
        x = x.masked_fill(~mask[..., None], 0)
    for group in together(x, elements):
        known = None if mask is None else mask[group]
        spread[group], gap[group], _ = peaks_and_table(x[group], k, known, squares, elements, settle)
    return spread, gap if mask is None else gap.masked_fill_(~mask, 0)


def together(x: Tensor, elements: int) -> list[slice]:
    """Which of x [G, n, C] are looked at together."""
    many = max(1, elements // (x.shape[1] * round_up(x.shape[1], COLUMNS)))
    return [slice(g, g + many) for g in range(0, len(x), many)]


def peaks_and_table(
    x: Tensor, k: int, known: Tensor | None, squares: Squares, elements: int, settle: Callable[..., None] | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As `peaks` for those of one block, and the table that it comes from, if that is no more than a block."""
    groups, n, width = x.shape
    whole = n * round_up(n, COLUMNS) <= elements
    step = n if whole else max(ROWS, elements // n // ROWS * ROWS)
    spread, farthest = (x.new_empty(groups, n, dtype=torch.float32) for _ in range(2))
    for first in range(0, n, step):
        rows = slice(first, first + step)
        table = squares(x[:, rows], None if whole else x, known)[:, : min(step, n - first)]
        spread[:, rows], farthest[:, rows] = row_statistics(table, n, k, known, width)
    if known is not None:
        spread.masked_fill_(~known, float("inf"))
        farthest.masked_fill_(~known, 0)
    if settle is not None:
        settle(x, k, known, spread, farthest, table if whole else None)
    order = spread.sort(dim=1, stable=True).indices
    gap = _gap_in(table, order) if whole else _gap_again(x, order, step, squares, known)
    gap.scatter_(1, order[:, :1], farthest.amax(1, keepdim=True))
    return spread, (gap.double() / width).sqrt_().float(), table if whole else None


def row_statistics(table: Tensor, n: int, k: int, mask: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """Mean of the `k` smallest squared distances of each row, over `width`, and the largest one; masked columns become -inf."""
    farthest = table[..., :n]
    count: Tensor | int = min(k, n)
    if mask is not None:
        farthest = farthest.masked_fill(~mask[:, None], 0)
        count = mask.sum(1, keepdim=True).clamp(1, k)
        table[..., :n].masked_fill_(~mask[:, None], float("-inf"))
    close = _largest(table, min(k, n))
    if mask is not None:
        close = close.masked_fill_(close.isinf(), 0)
    close = close.sum(2, dtype=torch.float64).neg_()
    return (close / (count * width)).float(), farthest.amin(2).neg_()


def _largest(table: Tensor, k: int) -> Tensor:
    """The `k` largest values of each row, in any order."""
    wide, columns = group_width(table.shape[2]), table.shape[2]
    if columns < 8 * k * wide:
        if table.device.type != "cpu" or k == columns:
            return table.topk(k, sorted=False).values
        found = table.new_empty(*table.shape[:2], k)  # NumPy parts rows several times as fast
        numbers, out = table.numpy(), found.numpy()
        for rows in _strips(table, _PARTED):
            out[:, rows] = np.partition(numbers[:, rows], columns - k, -1)[..., columns - k :]
        return found
    fine = table.reshape(-1, wide)  # the k largest lie in the k groups with the largest maxima
    coarse = fine.amax(1).view(*table.shape[:2], -1)
    start = torch.arange(0, len(fine), coarse.shape[2], device=table.device).view(*table.shape[:2], 1)
    members = fine.index_select(0, (start + coarse.topk(k, sorted=False).indices).flatten())
    return members.view(*table.shape[:2], -1).topk(k, sorted=False).values


def _strips(table: Tensor, numbers: int) -> list[slice]:
    """Rows of `table` [G, n, C'] that make so many numbers."""
    step = max(1, numbers // (len(table) * table.shape[2]))
    return [slice(first, first + step) for first in range(0, table.shape[1], step)]


def _gap_in(table: Tensor, order: Tensor) -> Tensor:
    """Squared distance of each token to the nearest denser one, for the densest anything, from the whole table. order [G, n]: by
    falling density. Tokens that are not denser are pushed out of sight by arithmetic: a fill by a mask takes ten times as long."""
    n = order.shape[1]
    rank = torch.empty(order.shape, device=order.device)
    rank.scatter_(1, order, torch.arange(n, device=order.device, dtype=rank.dtype).expand_as(order))
    gap, after, most = torch.empty_like(rank), (rank + 1)[:, None], torch.finfo(torch.float32).max
    for rows in _strips(table, _STRIP.get(table.device.type, 1 << 24)):
        hidden = (after - rank[:, rows, None]).clamp_(min=0)
        gap[:, rows] = torch.add(table[:, rows, :n], hidden, alpha=-most, out=hidden).amax(2).neg_()
    return gap


def _gap_again(x: Tensor, order: Tensor, step: int, squares: Squares, known: Tensor | None) -> Tensor:
    """As `_gap_in`, of one group x [1, n, C]: by falling density, so that denser tokens are those before."""
    x, sorted_gap = x[:, order[0]], x.new_empty(order.shape, dtype=torch.float32)
    known = None if known is None else known[:, order[0]]
    for first in range(0, x.shape[1], step):
        end = min(first + step, x.shape[1])
        table = squares(x[:, first:end], x[:, :end], None if known is None else known[:, :end])[:, : end - first]
        place = torch.arange(end - first, device=x.device)
        table[..., first:end].masked_fill_(place >= place[:, None], float("-inf"))
        sorted_gap[:, first:end] = table.amax(2).neg_()
    return torch.empty_like(sorted_gap).scatter_(1, order, sorted_gap)


@torch.no_grad()
def closest(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    squares: Squares,
    elements: int,
    settle: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor]:
    """`nearest` of x [G, n, C] and y [G, m, C] with distances by `squares`. settle(x, y, mask, table, near, place): decide, in
    place, which of two rows is the nearer."""
    (groups, n, width), columns = x.shape, y.shape[1]
    distance = x.new_full((groups, n), float("inf"), dtype=torch.float32)
    index = torch.full((groups, n), -1, device=x.device)
    if not (groups and n and columns):
        return distance, index
    if mask is not None:
        y = y.masked_fill(~mask[..., None], 0)
    step = max(ROWS, elements // round_up(columns, COLUMNS) // ROWS * ROWS)
    many = max(1, step // n)
    for g in range(0, groups, many):
        group = slice(g, g + many)
        for first in range(0, n, step):
            rows = slice(first, first + step)
            known = None if mask is None else mask[group]
            table = squares(x[group, rows], y[group], known)
            if known is not None:
                table[..., :columns].masked_fill_(~known[:, None], float("-inf"))
            near, place = first_max(table)
            if settle is not None:
                settle(x[group, rows], y[group], known, table, near, place)
            near, place = near[:, : min(step, n - first)], place[:, : min(step, n - first)]
            none = near == float("-inf")
            distance[group, rows] = (near.double().neg_() / width).sqrt_().float()
            index[group, rows] = place.masked_fill(none, -1)
    return distance, index
