# SPDX-License-Identifier: Apache-2.0
"""Which values of a row stand out above the others."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def iqr_threshold(x: Tensor, factor: float = 1.5) -> Tensor:
    """Q3 + factor (Q3 - Q1) of every row of `x` [U, N], [U, 1] float32: what is larger is an outlier (Tukey's fence).

    Quartiles are interpolated linearly. About a quarter of a row can be larger, none where all are equal. Cost N log N.
    """
    ordered, last = x.float().sort(dim=1).values, x.shape[1] - 1
    low, high = (_between(ordered, part * last) for part in (0.25, 0.75))
    return high + factor * (high - low)


def _between(ordered: Tensor, place: float) -> Tensor:
    """The value of the rows of `ordered` [U, N] at a place between two columns, [U, 1]."""
    left = int(place)
    right = min(left + 1, ordered.shape[1] - 1)
    below, above = ordered[:, left : left + 1], ordered[:, right : right + 1]
    return below + (place - left) * (above - below)


def local_outlier_factor(x: Tensor, neighbours: int, among: Tensor | None = None) -> Tensor:
    """How much denser the values are around the neighbours of each value than around itself, [U, N] float64: about -1 for a
    value like others, below that where it stands apart (the negative factor of Breunig et al., "LOF", SIGMOD 2000).

    x [U, N]; neighbours: how many count, at most all others; among [U, N] bool: the values that take part (all without it),
    the others get -1. In one dimension all neighbours lie within `neighbours` places of a sorted row. Cost N log N, and
    N times neighbours of memory.
    """
    n, reach = x.shape[1], max(1, min(neighbours, x.shape[1] - 1))
    at, outside = (table.to(x.device, non_blocking=True) for table in _beside(n, reach))
    values = x.double()
    if among is not None:
        values = values.masked_fill(~among, _NOT)
    ordered, order = values.sort(dim=1, stable=True)  # those that take no part come last
    far = (ordered[:, at] - ordered[..., None]).abs().masked_fill(outside, _NOT)
    if among is not None:
        far = far.nan_to_num(nan=_NOT, posinf=_NOT)
    far, which = (t[..., :reach] for t in far.sort(dim=2, stable=True))
    at = at.expand(len(x), -1, -1).gather(2, which).flatten(1)

    def across(row: Tensor) -> Tensor:
        """What a `row` [U, N] has of the neighbours of each, [U, N, reach]."""
        return row.gather(1, at).view(far.shape)

    none = far == _NOT
    size = (reach - none.sum(2)).clamp_min(1)
    far = far.masked_fill(none, 0)
    density = size / (torch.maximum(far, across(far.amax(2))).masked_fill(none, 0).sum(2) + 1e-10 * size)
    factor = -across(density).masked_fill(none, 0).sum(2) / size / density
    factor = factor.masked_fill(none.all(2), -1.0)
    return torch.empty_like(factor).scatter(1, order, factor)


_NOT = float("inf")


@functools.lru_cache(maxsize=16)
@torch.inference_mode(False)
def _beside(n: int, reach: int) -> tuple[Tensor, Tensor]:
    """The places in a row of `n` within `reach` of each, [n, 2 reach], and which of them there are not; on the CPU."""
    steps = torch.arange(1, reach + 1)
    at = torch.arange(n)[:, None] + torch.cat([-steps, steps])
    return at.clamp(0, n - 1), (at < 0) | (at >= n)


def stands_apart(x: Tensor, neighbours: int, among: Tensor | None = None) -> Tensor:
    """Which values are outliers by their local density, [U, N] bool: scikit-learn's rule, a factor below -1.5."""
    return local_outlier_factor(x, neighbours, among) < -1.5
