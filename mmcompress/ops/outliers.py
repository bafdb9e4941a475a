# SPDX-License-Identifier: Apache-2.0
"""Which values of a row stand out above the others."""

from __future__ import annotations

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
    values = x.double()
    count = torch.full_like(values[:, :1], n)
    if among is not None:
        values, count = values.masked_fill(~among, float("inf")), among.sum(1, keepdim=True)
    ordered, order = values.sort(dim=1, stable=True)
    steps = torch.arange(1, reach + 1, device=x.device)
    place = torch.arange(n, device=x.device)
    at = place[:, None] + torch.cat([-steps, steps])
    there = (at >= 0) & (at < count[:, :, None]) & (place < count)[:, :, None]
    at = at.clamp(0, n - 1).expand(len(x), -1, -1)

    def across(row: Tensor) -> Tensor:
        """Values [U, N] of the places in `at`."""
        return row.gather(1, at.flatten(1)).unflatten(1, at.shape[1:])

    far = (across(ordered) - ordered[..., None]).abs().masked_fill(~there, float("inf"))
    far, which = (t[..., :reach] for t in far.sort(dim=2, stable=True))
    at, is_there = at.gather(2, which), far.isfinite()
    size = is_there.sum(2).clamp_min(1)
    far = far.masked_fill(~is_there, 0)
    density = size / (torch.maximum(far, across(far.amax(2))).masked_fill(~is_there, 0).sum(2) + 1e-10 * size)
    factor = -across(density).masked_fill(~is_there, 0).sum(2) / size / density
    factor = factor.masked_fill(~is_there.any(2), -1.0)
    return torch.empty_like(factor).scatter(1, order, factor)


def stands_apart(x: Tensor, neighbours: int, among: Tensor | None = None) -> Tensor:
    """Which values are outliers by their local density, [U, N] bool: scikit-learn's rule, a factor below -1.5."""
    return local_outlier_factor(x, neighbours, among) < -1.5
