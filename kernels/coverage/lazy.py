# SPDX-License-Identifier: Apache-2.0
"""Maximum coverage on the CPU: gains are computed again only for tokens that can be the next pick.

A gain can only shrink (coverage is submodular), rounding included, since it is a sum of the same terms in the same order, none
of them larger: an old gain is an upper bound, and the picks are those of the plain greedy loop (Minoux 1978). The columns of
all tokens are held as rows of a second table, and only the tokens with the largest bounds are looked at. The control flow reads
values, which only waits where there is a device: use `blocked.py` there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .naive import LANES

SMALL = 1 << 16
"""Cells of a table up to which all gains are computed for every pick: fewer steps, and none of them long."""
POOL = 128
"""Tokens that are looked at, until another can be the next."""
BATCH = 16
"""Gains that are computed together at first; each time that they do not settle a pick, twice as many."""


def max_coverage(table: Tensor, k: int, last: Tensor | None, weight: Tensor | None = None) -> Tensor:
    return torch.stack(
        [_pick(x, k, *(None if y is None else y[u] for y in (last, weight))) for u, x in enumerate(table)]
    )


def _pick(table: Tensor, k: int, last: Tensor | None, weight: Tensor | None) -> Tensor:
    (rows, count), columns = table.shape, table.T.contiguous().numpy()
    factor = None if weight is None else weight.numpy()
    if table.numel() <= SMALL:
        return _pick_among_all(columns, k, None if last is None else last.numpy(), factor)
    bound = _add_up(columns)  # nothing is covered
    if factor is not None:
        bound = bound * factor
    if last is not None:
        bound[last.numpy()] = -1.0
    picks, done, size = np.zeros(k, np.int64), 0, min(POOL, count)
    best = np.zeros(rows, columns.dtype)
    while done < k:
        order = np.argsort(-bound, kind="stable")[: size + 1]
        limit = (bound[order[size]], -order[size]) if size < count else (-np.inf, 1)
        pool = np.sort(order[:size])
        gain, fresh, batch = bound[pool], np.zeros(size, bool), BATCH
        while done < k:
            place = gain.argmax()  # the first of equals
            if gain[place] == -np.inf or (gain[place], -pool[place]) < limit:
                break
            if fresh[place]:
                picks[done] = pool[place]
                done += 1
                np.maximum(best, columns[pool[place]], out=best)
                gain[place] = -np.inf
                fresh[:], batch = False, BATCH
                continue
            some = np.argsort(np.where(fresh, np.inf, -gain), kind="stable")[:batch]
            batch *= 2
            more = columns[pool[some]]
            more -= best
            found = _add_up(np.maximum(more, 0, out=more))
            found = found if factor is None else found * factor[pool[some]]
            gain[some] = np.minimum(gain[some], found)  # what comes last stays there, and what is taken
            fresh[some] = True
        bound[pool] = gain
    return torch.from_numpy(picks)


def _pick_among_all(columns: Any, k: int, last: Any, factor: Any) -> Tensor:
    picks, free = np.zeros(k, np.int64), np.zeros(len(columns), columns.dtype)  # free: or -inf
    columns = _in_lanes(columns)
    best, more = np.zeros(columns.shape[1:], columns.dtype), np.empty_like(columns)
    for step in range(k):
        np.subtract(columns, best, out=more)
        gain = _sum_of_lanes(np.maximum(more, 0, out=more))
        gain = gain if factor is None else gain * factor
        if last is not None:
            gain[last] = -1.0
        gain += free
        picks[step] = pick = gain.argmax()  # the first of equals
        free[pick] = -np.inf
        np.maximum(best, columns[pick], out=best)
    return torch.from_numpy(picks)


def _add_up(x: Any) -> Any:
    """Sums of the rows of `x` [n, R] in the order of `naive.LANES`."""
    return _sum_of_lanes(_in_lanes(x))


def _in_lanes(x: Any) -> Any:
    """`x` [n, R] filled up with zeros, [n, times, lanes]; no more lanes than a power of two that holds R: others would be 0."""
    rows = x.shape[1]
    lanes = min(LANES, 1 << max(1, rows - 1).bit_length())
    times = max(1, -(-rows // lanes))
    if times * lanes != rows:
        filled = np.zeros((len(x), times * lanes), x.dtype)
        filled[:, :rows] = x
        x = filled
    return x.reshape(len(x), times, lanes)


def _sum_of_lanes(x: Any) -> Any:
    """Sums of `x` [n, times, lanes]: along the times one after the other, then half of the lanes to the other."""
    lanes = x[:, 0] if x.shape[1] == 1 else np.add.reduce(x, 1)  # in order: the axis is not the last
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
