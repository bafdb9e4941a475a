# SPDX-License-Identifier: Apache-2.0
"""Squared distances on the CPU: a matrix product in float32, and float64 where it decides.

A product loses digits where tokens nearly agree: such pairs are computed again from their differences. It also leaves open which
of two tokens is the denser where their spreads nearly agree, and which of two centres is the nearer: these rows of the table are
made again in float64 (`settle`). Where there are many such pairs, or few tokens (`small`), the whole table is float64. The control
flow reads values, which only waits where there is a device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..gather import gather
from ..match.blocked import COLUMNS, ROWS, first_max, round_up
from . import blocked, small
from .naive import clearest

NEAR = 1 / 8
"""Pairs with a smaller part of the sum of their squared norms as squared distance are computed from differences."""
MANY = 1 / 64
"""Part of all pairs from which on the whole table is."""
CLOSE = 8e-7
"""Part of the largest squared distance of a token that float32 leaves open of its others: three times the largest error seen."""
_CELLS = 1 << 20
"""Differences that are held at a time."""


def density_peaks(
    x: Tensor, k: int, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, longest: int | None = None
) -> tuple[Tensor, Tensor]:
    return blocked.density_peaks(x, k, mask, cu_seqlens, longest, _peaks)


def nearest(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    cu_x: Tensor | None = None,
    cu_y: Tensor | None = None,
    longest: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    return blocked.nearest(x, y, mask, cu_x, cu_y, longest, _nearest)


def _peaks(x: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if small.few(x, x):
        return small.density_peaks(x, k, mask)
    return blocked.peaks(x, k, mask, products, blocked.ELEMENTS, settle)


def _nearest(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    if small.few(x, y):
        return small.nearest(x, y, mask)
    return blocked.closest(x, y, mask, products, blocked.ELEMENTS, settle_nearest)


def clusters(x: Tensor, count: int, k: int) -> tuple[Tensor, Tensor]:
    """As `kernels.density.clusters`, from one table where that is no more than a block."""
    if small.few(x, x):
        return small.clusters(x, count, k)
    centres = torch.empty(len(x), min(count, x.shape[1]), dtype=torch.int64)
    into = torch.empty(x.shape[:2], dtype=torch.int64)
    for group in blocked.together(x, blocked.ELEMENTS) if x.shape[1] else ():
        part = x[group]
        spread, gap, table = blocked.peaks_and_table(part, k, None, products, blocked.ELEMENTS, settle)
        centres[group] = chosen = clearest(spread, gap, count)
        found = gather(part, chosen)
        into[group] = _nearest(part, found, None)[1] if table is None else _nearest_in(table, part, found, chosen)
    return centres, into


def _nearest_in(table: Tensor, x: Tensor, y: Tensor, centres: Tensor) -> Tensor:
    """As `_nearest` of x [G, n, C] and y [G, m, C], its tokens `centres` [G, m], the places alone: from their own table."""
    near, second, place = (torch.empty(x.shape[:2], dtype=kind) for kind in (*2 * (torch.float32,), torch.int64))
    every = np.arange(x.shape[1])
    for g, chosen in enumerate(centres):
        rows = table[g].index_select(0, chosen)[:, : x.shape[1]].numpy()
        best = rows.argmax(0)  # the first of equals
        place[g], near[g] = torch.from_numpy(best), torch.from_numpy(rows[best, every])
        rows[best, every] = -np.inf
        second[g] = torch.from_numpy(rows).amax(0)
    _settle_nearest(x, y, None, second, near, place)
    return place


def products(x: Tensor, y: Tensor | None = None, known: Tensor | None = None) -> Tensor:
    """`blocked.Squares`. Of a table of tokens with themselves one half is made, a strip of rows at a time, and mirrored."""
    other = x if y is None else y
    (groups, rows, _), columns = x.shape, other.shape[1]
    out = x.new_empty(groups, round_up(rows, ROWS), round_up(columns, COLUMNS), dtype=torch.float32)
    middle = other.mean(1, keepdim=True, dtype=torch.float32)
    right = _filled(other, middle, out.shape[2])
    left = right if y is None else _filled(x, middle, out.shape[1])
    across, norms = right.transpose(1, 2), torch.linalg.vector_norm(right, dim=2).square_().neg_()
    own = norms if y is None else torch.linalg.vector_norm(left, dim=2).square_().neg_()
    reach = (own + norms.amin(1, keepdim=True)).mul_(NEAR).numpy()
    step = out.shape[1] if y is not None else max(blocked.LOW, round_up(rows // 16, COLUMNS))
    close: list[list[Any]] = [[] for _ in range(groups)]
    for r in range(0, rows, step):
        end = min(r + step, out.shape[1])
        begin = r if y is None else 0
        part = out[:, r:end, begin:]
        torch.add(own[:, r:end, None], norms[:, None, begin:], out=part)
        part.baddbmm_(left[:, r:end], across[..., begin:], alpha=2).clamp_(max=0)
        part[..., columns - begin :] = float("-inf")
        if y is None:
            part.diagonal(dim1=1, dim2=2).fill_(float("-inf"))
            out[:, end:, r:end] = part[..., end - begin : out.shape[1] - begin].transpose(1, 2)
        most = part.amax(2).numpy()[:, : rows - r]
        for g in range(groups):
            among = np.flatnonzero(most[g] > reach[g, r : r + most.shape[1]])  # these rows may have somebody near
            if len(among):
                i, j = _near(part[g].numpy()[among], own[g, r + among].numpy(), norms[g, begin:].numpy())
                i = among[i] + r
                j += begin
                counts = j > i if y is None else np.ones(len(i), bool)
                if known is not None:
                    counts &= known[g].numpy()[j]
                    if y is None:
                        counts &= known[g].numpy()[i]
                close[g].append((i[counts], j[counts]))
    if y is None:
        out.diagonal(dim1=1, dim2=2)[:, :rows] = 0
    sound = torch.isfinite(norms.sum(1) + own.sum(1)).numpy()
    for g in range(groups):
        i, j = (np.concatenate(x) for x in zip((np.empty(0, np.int64),) * 2, *close[g], strict=True))
        if not sound[g] or len(i) > MANY * rows * columns:
            out[g] = blocked.products(x[g : g + 1], None if y is None else y[g : g + 1])[0]
        elif len(i):
            i, j = torch.from_numpy(i), torch.from_numpy(j)
            out[g, i, j] = apart = _apart(x[g], other[g], i, j)
            if y is None:
                out[g, j, i] = apart
    return out


def _near(table: Any, own: Any, norms: Any) -> tuple[Any, Any]:
    """Rows and columns of `table` [r, c], minus squared distances, that are near; own [r], norms [c]: minus squared norms."""
    near = np.add(own[:, None], norms)
    near *= NEAR
    return np.divmod(np.flatnonzero(table > near), len(norms))


def _filled(x: Tensor, middle: Tensor, rows: int) -> Tensor:
    """What is left of x [G, n, C] without `middle`, filled up to `rows` with zeros, float32."""
    found = middle.new_empty(len(x), rows, x.shape[2])
    torch.sub(x, middle, out=found[:, : x.shape[1]])
    found[:, x.shape[1] :] = 0
    return found


def _apart(x: Tensor, y: Tensor, i: Tensor, j: Tensor) -> Tensor:
    """Minus the squared distances of the rows `i` of x [n, C] and `j` of y [m, C], float32."""
    found = torch.empty(len(i))
    step = max(1, _CELLS // max(1, x.shape[1]))
    for first in range(0, len(i), step):
        part = slice(first, first + step)
        apart = x.index_select(0, i[part]).double().sub_(y.index_select(0, j[part]))
        found[part] = apart.square_().sum(1).neg_()
    return found.clamp_(min=-torch.finfo(torch.float32).max)


def settle(
    x: Tensor, k: int, known: Tensor | None, spread: Tensor, farthest: Tensor, tables: Tensor | None = None
) -> None:
    """Compute `spread` [G, n] of tokens x [G, n, C] again, in place, where it nearly agrees with another's. farthest [G, n]: the
    largest squared distance of each. tables [G, n, C'], if they are held: minus the squared distances; then only where the other is
    nearer than all that are surely denser, since else it does not matter which of both is."""
    for g, (values, most) in enumerate(zip(spread.numpy(), farthest.numpy(), strict=True)):
        order, room = np.argsort(values, kind="stable"), CLOSE / x.shape[2] * most
        rising = values[order]
        with np.errstate(invalid="ignore"):
            close = np.diff(rising) <= room[order][1:]
        close &= (rising[1:] > 0) & np.isfinite(rising[1:])
        rows = np.unique(np.concatenate([order[1:][close], order[:-1][close]]))
        if tables is not None and len(rows):
            rows = _undecided(values, room[rows, None], rows, tables[g].numpy()[rows, : len(values)])
        if len(rows):
            index, mask = torch.from_numpy(rows), None if known is None else known[g : g + 1]
            whole = 2 * len(rows) > len(values)  # half of it is mirrored
            table = blocked.products(x[g : g + 1]) if whole else _exact(x[g, index][None], x[g : g + 1])
            table = table[:, index] if whole else table[:, : len(rows)]
            spread[g, index] = blocked.row_statistics(table, len(values), k, mask, x.shape[2])[0][0]


def _exact(x: Tensor, y: Tensor) -> Tensor:
    """Minus the squared distances of a few rows x [1, r, C] and y [1, m, C], as `blocked.products` makes them."""
    return torch.from_numpy(-small.squares(x, y)) if small.few(x, y) else blocked.products(x, y)


def _undecided(values: Any, room: Any, rows: Any, table: Any) -> Any:
    """Those of `rows` whose nearest denser token may be one that is as dense but for `room`, and these. values [n]: spreads; table
    [rows, n]: minus the squared distances."""
    with np.errstate(invalid="ignore"):
        more = values - values[rows, None]
        open_, denser = np.abs(more) <= room, more < -room
    open_[np.arange(len(rows)), rows] = False
    nearest, sure = (np.where(these, table, -np.inf).max(1) for these in (open_, denser))
    decides = (nearest > -np.inf) & (nearest >= sure * (1 + CLOSE / NEAR))
    return np.unique(np.concatenate([rows[decides], np.flatnonzero(open_[decides].any(0))]))


def settle_nearest(x: Tensor, y: Tensor, known: Tensor | None, table: Tensor, near: Tensor, place: Tensor) -> None:
    """Find the nearest rows of y [G, m, C] again for rows of x [G, n, C], in place, where another one is nearly as near. table:
    minus the squared distances, which is spoiled; near, place [G, n]: its largest values and their columns."""
    _settle_nearest(x, y, known, table.scatter_(2, place[..., None], float("-inf")).amax(2), near, place)


def _settle_nearest(x: Tensor, y: Tensor, known: Tensor | None, second: Tensor, near: Tensor, place: Tensor) -> None:
    """second [G, n]: the largest values but `near`."""
    for g, (best, other) in enumerate(zip(near.numpy(), second.numpy(), strict=True)):
        best, other = best[: x.shape[1]], other[: x.shape[1]]
        with np.errstate(invalid="ignore"):
            rows = np.flatnonzero((best - other <= -CLOSE / NEAR * other) & (best < 0) & (other > -np.inf))
        if len(rows):
            index = torch.from_numpy(rows)
            exact = _exact(x[g, index][None], y[g : g + 1])
            if known is not None:
                exact[..., : y.shape[1]].masked_fill_(~known[g, None, None], float("-inf"))
            best, column = first_max(exact)
            near[g, index], place[g, index] = best[0, : len(rows)], column[0, : len(rows)]
