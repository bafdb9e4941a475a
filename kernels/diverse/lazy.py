# SPDX-License-Identifier: Apache-2.0
"""Greedy choices of different tokens on the CPU: similarities are computed only where they can decide a pick.

What a token adds can only shrink while others are picked, so an old value is an upper bound. The tokens with the largest
bounds form a pool; the pool is brought up to date, and picks are made from it for as long as its best token beats every
bound outside. The picks are those of the plain greedy loop: nothing is approximated. The control flow reads values, which
costs nothing on a CPU and would wait for the device anywhere else: `blocked.py` is for those.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from . import table
from .naive import SPENT
from .rows import UnitRows, loneliest

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

FEW = 1024
"""So many tokens have a table of cosines that is no more than a block (4 MB): faster than deciding which of them matter."""
POOL = 512
"""Tokens that are kept up to date together."""
SHORT = 32
"""A product with few rows takes as long as if it had so many more: what it is multiplied with has to be read."""
AHEAD = 16
"""Tokens of a pool whose similarities to it are made in one product, since they are likely to be the next picks. A product for each
pick reads the whole pool for one number per token, and with several threads waits for all of them, which takes long where others
have the cores. So few that what is left to do per pick is too small for NumPy's BLAS to wake threads (AHEAD x POOL below 9,216)."""
LOW, HIGH = 16, 64
"""With fewer picks than that from one pool more tokens are brought up to date before the next, with more of them fewer."""


def max_min(
    features: Tensor, k: int, weight: Tensor | None, first: Tensor | None = None, nearest: bool = False
) -> tuple[Tensor, Tensor | None]:
    """As `kernels.diverse.anchors`. Memory beside the result: POOL + k rows of D and O(N)."""
    out, near = torch.empty(len(features), k, dtype=torch.int64), torch.empty(features.shape[:2], dtype=torch.int64)
    for u, x in enumerate(features):
        own, begun = None if weight is None else weight[u], None if first is None else int(first[u])
        if len(x) <= FEW:
            picks, owner = table.max_min(x, k, own, begun, nearest)
        else:
            rows = UnitRows(x)
            begun = loneliest(rows) if begun is None else begun
            state = _Distance(rows, k, begun, own)
            picks, owner = _greedy(rows, k, state, [begun], nearest), state.owner
            owner[picks] = picks
        out[u], near[u] = torch.from_numpy(picks), torch.from_numpy(owner)
    return out, near if nearest else None


def greedy_map(features: Tensor, log_quality: Tensor, k: int) -> Tensor:
    """As `kernels.diverse.greedy_map`. Memory beside the result: POOL + k rows of D, k x k, N x k at most."""
    out = torch.empty(len(features), k, dtype=torch.int64)
    for u, x in enumerate(features):
        worth = (2 * log_quality[u].float().clamp_min(-1e30)).numpy()
        if len(x) <= FEW:
            picks = table.greedy_map(x, worth, k)
        else:
            rows = UnitRows(x)
            picks = _greedy(rows, k, _NewPart(rows, k, worth), [])
        if len(picks) < k:  # nothing is new any more
            order = np.argsort(-worth, kind="stable")
            picks = np.concatenate([picks, order[~np.isin(order, picks)]])
        out[u] = torch.from_numpy(picks[:k])
    return out


class _State(Protocol):
    """What the tokens add to the picks made so far; `bound` [N] is never less, and -inf where nothing is to be picked."""

    bound: Floats

    def enter(self, pool: Indices, own: Tensor, spans: list[tuple[int, int, int]], done: int) -> Floats:
        """What each token of the pool adds after `done` picks. `own` are its rows; spans (first, last, seen) say which of
        them know the first `seen` picks already."""

    def pick(self, place: int, done: int) -> Floats:
        """The same with one pick more, that at `place` in the pool."""

    def leave(self, done: int) -> None:
        """Write down what was found out about the pool."""


def _greedy(rows: UnitRows, k: int, state: _State, begun: Sequence[int], complete: bool = False) -> Indices:
    """`k` picks in order, less if no token is left that may be picked; `begun` are the first of them. `complete`: at the end
    the state knows of every token what all picks mean to it."""
    done, size, wide = len(begun), min(POOL, rows.count), 0
    picks, seen = np.zeros(k, np.int64), np.zeros(rows.count, np.int64)
    picks[:done] = begun

    def enter(pool: Indices) -> tuple[Indices, Floats]:
        pool = pool[np.lexsort((pool, seen[pool]))]
        edges = [0, *(np.flatnonzero(np.diff(seen[pool])) + 1).tolist(), len(pool)]
        spans = [(a, b, int(seen[pool[a]])) for a, b in pairwise(edges)]
        return pool, state.enter(pool, rows.take(torch.from_numpy(pool)), spans, done)

    def renew(stale: Indices) -> None:
        stale = stale[np.argsort(seen[stale], kind="stable")]
        for first in range(0, len(stale), POOL):
            part, _ = enter(stale[first : first + POOL])
            state.leave(done)
            seen[part] = done

    while done < k:
        order = np.argsort(-state.bound, kind="stable")
        stale = order[: wide * POOL][seen[order[: wide * POOL]] < done]
        renew(stale)
        if len(stale):
            order = np.argsort(-state.bound, kind="stable")
        if state.bound[order[0]] == -np.inf:
            break
        limit = (state.bound[order[size]], -order[size]) if size < rows.count else (-np.inf, 1)
        pool, gain = enter(order[:size])
        before = done
        while done < k:
            best = gain.max()
            equal = np.flatnonzero(gain == best)
            place = int(equal[pool[equal].argmin()])
            if best == -np.inf or (best, -pool[place]) < limit:
                break
            picks[done] = pool[place]
            gain = state.pick(place, done)
            done += 1
        state.leave(done)
        seen[pool] = done
        if done - before < LOW:  # bounds outside are too old: look further down next time
            wide = min(max(1, 2 * wide), -(-rows.count // POOL))
        elif done - before > HIGH:
            wide //= 2
    if complete:
        renew(np.flatnonzero(seen < done))
    return picks[:done]


def _likely(place: int, gain: Floats) -> Tensor:
    """Places of the pool: `place` and those with the largest gains, AHEAD in all."""
    gain = gain.copy()
    gain[place] = np.inf
    return torch.from_numpy(np.argpartition(gain, -AHEAD)[-AHEAD:] if len(gain) > AHEAD else np.arange(len(gain)))


def _by_place(likely: Tensor, similar: Tensor) -> dict[int, Floats]:
    """The columns of `similar` [pool, m] by the places `likely` [m] that they are of."""
    return dict(zip(likely.tolist(), similar.T.contiguous().numpy(), strict=True))


class _Distance:
    """Distance to the nearest pick, times a weight; and which one that is, the lowest of equals."""

    def __init__(self, rows: UnitRows, k: int, first: int, weight: Tensor | None) -> None:
        self.weight = np.ones(rows.count, np.float32) if weight is None else weight.float().numpy()
        self.near = np.full(rows.count, -3, np.float32)  # less than any cosine
        self.owner = np.full(rows.count, rows.count, np.int64)
        self.bound = self.weight * (1 - self.near)
        self.bound[first] = -np.inf
        self.picks, self.picked = np.full(k, first, np.int64), torch.empty(k, rows.width)
        self.picked[0] = rows.take(torch.tensor([first]))
        self.similar: dict[int, Floats] = {}  # by place in the pool

    def enter(self, pool: Indices, own: Tensor, spans: list[tuple[int, int, int]], done: int) -> Floats:
        self.pool, self.own, self.similar = pool, own, {}
        self.here, self.mine, self.gain = self.near[pool], self.owner[pool], self.bound[pool]
        for a, b, seen in _together(spans, done):
            if seen < done:
                similar = (own[a:b] @ self.picked[seen:done].T).numpy()
                self._meet(slice(a, b), *_leading(similar, self.picks[seen:done]))
        return self._gain()

    def pick(self, place: int, done: int) -> Floats:
        self.picks[done], self.picked[done] = self.pool[place], self.own[place]
        if place not in self.similar:
            likely = _likely(place, self.gain)
            self.similar = _by_place(likely, self.own @ self.own.index_select(0, likely).T)
        self._meet(slice(None), self.similar[place], self.pool[place])
        self.gain[place] = -np.inf
        return self._gain()

    def _meet(self, part: slice, cosine: Floats, pick: Indices) -> None:
        """Picks come in, of which the nearest to each token of the part of the pool has this cosine."""
        here, mine = self.here[part], self.mine[part]
        better = (cosine > here) | ((cosine == here) & (pick < mine))
        np.copyto(here, cosine, where=better)
        np.copyto(mine, pick, where=better)

    def _gain(self) -> Floats:
        np.multiply(self.weight[self.pool], 1 - self.here, out=self.gain, where=self.gain > -np.inf)
        return self.gain

    def leave(self, done: int) -> None:
        self.near[self.pool], self.owner[self.pool], self.bound[self.pool] = self.here, self.mine, self.gain


def _together(spans: list[tuple[int, int, int]], done: int) -> list[tuple[int, int, int]]:
    """Neighbouring spans as one that knows what the first of them knows, where one product takes less time than two."""
    found = spans[:1]
    for a, b, seen in spans[1:]:
        first, _, known = found[-1]
        if (b - a) * (seen - known) < SHORT * (done - seen):
            found[-1] = first, b, known
        else:
            found.append((a, b, seen))
    return found


def _leading(similar: Floats, picks: Indices) -> tuple[Floats, Indices]:
    """The largest of each row of `similar`, which is spoiled, and the lowest of the picks that have it."""
    rows, lead = np.arange(len(similar)), similar.argmax(1)
    best, pick = similar[rows, lead], picks[lead]
    similar[rows, lead] = -np.inf
    tied = np.flatnonzero(similar.max(1) == best)
    if len(tied):
        others = np.where(similar[tied] == best[tied, None], picks, picks.max())
        pick[tied] = np.minimum(pick[tied], others.min(1))
    return best, pick


class _NewPart:
    """Twice the logarithm of quality, plus that of the part of a token that no pick has: a Cholesky factor's squared pivots.

    Only tokens that add something are ever picked here, so all pivots of the picks are above SPENT.
    """

    def __init__(self, rows: UnitRows, k: int, worth: Floats) -> None:
        self.worth, self.left = worth, rows.own_part.numpy().copy()
        self.factor = torch.empty(rows.count, k)  # written as far as a token has been in a pool
        self.picked, self.triangle = torch.empty(k, rows.width), torch.empty(k, k)
        self.bound = _gain(worth, self.left)
        self.similar: dict[int, Floats] = {}  # by place in the pool
        self.places: list[int] = []  # picked since the last look
        self.pivots: list[float] = []

    def enter(self, pool: Indices, own: Tensor, spans: list[tuple[int, int, int]], done: int) -> Floats:
        self.pool, self.own, self.similar = pool, own, {}
        self.value, self.rest, self.gone = self.worth[pool], self.left[pool], self.bound[pool] == -np.inf
        self.known = torch.empty(len(pool), len(self.picked))
        self.known[:, :done] = self.factor[:, :done].index_select(0, torch.from_numpy(pool))
        self.written = spans[0][2]  # the spans go up
        self.since = np.empty((AHEAD, len(pool)), np.float32)  # the factor from the last look on
        for a, b, seen in spans:
            if seen < done:
                new = own[a:b] @ self.picked[seen:done].T
                new -= self.known[a:b, :seen] @ self.triangle[seen:done, :seen].T
                corner = self.triangle[seen:done, seen:done].T
                new = torch.linalg.solve_triangular(corner, new, upper=True, left=False)
                self.known[a:b, seen:done] = new
                self.rest[a:b] -= new.square_().sum(1).numpy()
        return self._gain()

    def pick(self, place: int, done: int) -> Floats:
        if place not in self.similar:
            self._look(place, done)
        since, pivot = self.since[: len(self.places)], np.sqrt(self.rest[place])
        new = self.since[len(self.places)] = (self.similar[place] - since[:, place] @ since) / pivot
        self.rest -= new * new
        self.places.append(place)
        self.pivots.append(pivot)
        self.gone[place] = True
        return self._gain()

    def _look(self, place: int, done: int) -> None:
        """What the pool has in common with `place` and others that may be next, without what the picks have of it."""
        self._write(done)
        known, likely = self.known[:, :done], _likely(place, self.gain)
        similar = self.own @ self.own.index_select(0, likely).T
        similar.addmm_(known, known.index_select(0, likely).T, alpha=-1)
        self.similar = _by_place(likely, similar)

    def _write(self, done: int) -> None:
        """Write down the picks since the last look."""
        last = slice(done - len(self.places), done)
        self.known[:, last] = torch.from_numpy(self.since[: len(self.places)]).T
        self.picked[last], self.triangle[last, :done] = self.own[self.places], self.known[self.places, :done]
        self.triangle.diagonal()[last] = torch.tensor(self.pivots)
        self.places.clear()
        self.pivots.clear()

    def _gain(self) -> Floats:
        self.gain = _gain(self.value, self.rest)
        self.gain[self.gone] = -np.inf
        return self.gain

    def leave(self, done: int) -> None:
        self._write(done)
        self.factor[torch.from_numpy(self.pool), self.written : done] = self.known[:, self.written : done]
        self.left[self.pool], self.bound[self.pool] = self.rest, self.gain


def _gain(worth: Floats, left: Floats) -> Floats:
    gain: Floats = np.log(np.maximum(left, SPENT))
    gain += worth
    gain[left <= SPENT] = -np.inf
    return gain
