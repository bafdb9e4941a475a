# SPDX-License-Identifier: Apache-2.0
"""Which values of a row stand out above the others."""

from __future__ import annotations

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
