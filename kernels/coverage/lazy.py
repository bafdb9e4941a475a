# SPDX-License-Identifier: Apache-2.0
"""Maximum coverage on the CPU: gains are computed again only for tokens that can be the next pick.

A gain can only shrink (coverage is submodular), rounding included, since it is a sum of the same terms in the same order, none
of them larger: an old gain is an upper bound, and the picks are those of the plain greedy loop (Minoux 1978). The columns of
the tokens with the largest bounds are held side by side. The control flow reads values, which only waits where there is a
device: use `blocked.py` there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .blocked import gains
from .naive import LANES

POOL = 128
"""Tokens whose columns are held."""
BATCH = 16
"""Gains that are computed together."""


def max_coverage(table: Tensor, k: int, last: Tensor | None, weight: Tensor | None = None) -> Tensor:
    return torch.stack(
        [_pick(x, k, *(None if y is None else y[u] for y in (last, weight))) for u, x in enumerate(table)]
    )


def _pick(table: Tensor, k: int, last: Tensor | None, weight: Tensor | None) -> Tensor:
    rows, count = table.shape
    bound = gains(table[None], table.new_zeros(1, rows))[0]
    factor = None if weight is None else weight.numpy()
    if weight is not None:
        bound *= weight
    if last is not None:
        bound.masked_fill_(last, -1.0)
    bound = bound.numpy()
    picks, done, size = np.zeros(k, np.int64), 0, min(POOL, count)
    padded = -(-rows // LANES) * LANES
    best, columns = table.new_zeros(padded), table.new_zeros(size, padded)
    while done < k:
        order = np.argsort(-bound, kind="stable")[: size + 1]
        limit = (bound[order[size]], -order[size]) if size < count else (-np.inf, 1)
        pool = np.sort(order[:size])
        columns[:, :rows] = table[:, torch.from_numpy(pool)].T
        gain, fresh = bound[pool], np.zeros(size, bool)
        while done < k:
            place = gain.argmax()  # the first of equals
            if gain[place] == -np.inf or (gain[place], -pool[place]) < limit:
                break
            if fresh[place]:
                picks[done] = pool[place]
                done += 1
                torch.maximum(best, columns[place], out=best)
                gain[place] = -np.inf
                fresh[:] = False
                continue
            some = np.argsort(np.where(fresh, np.inf, -gain), kind="stable")[:BATCH]
            more = (columns[torch.from_numpy(some)] - best).relu_()
            found = _add_up(more.numpy())
            found = found if factor is None else found * factor[pool[some]]
            gain[some] = np.minimum(gain[some], found)  # what comes last stays there, and what is taken
            fresh[some] = True
        bound[pool] = gain
    return torch.from_numpy(picks)


def _add_up(x: Any) -> Any:
    """Sums of the rows of `x` [n, R], R a multiple of LANES, in the order of `naive.LANES`."""
    lanes = np.add.reduce(
        x.reshape(len(x), x.shape[1] // LANES, LANES), 1
    )  # one after the other: the axis is not the last
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]
