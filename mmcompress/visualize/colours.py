# SPDX-License-Identifier: Apache-2.0
"""The colours of pictures and page."""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Pixels = NDArray[np.float32]

HEAT = ("#000004", "#1b0c41", "#4a0c6b", "#781c6d", "#a52c60", "#cf4446", "#ed6925", "#fb9b06", "#f7d13d", "#fcffa4")
"""From 0 to 1, evenly lighter (also in grey): after the map "inferno"."""
KEPT_EDGE, SEAM = (255, 255, 255), (255, 170, 0)
DIM = 0.22
"""Brightness of a dropped cell."""
GLOW = (0.35, 0.5)
"""How much of the lowest cell of a map is the colour of its value, and how much more of the highest."""
TINT = 0.5
"""How much of a merged cell is the colour of its cluster."""


def rgb(text: str) -> tuple[int, int, int]:
    """ "#102030" as numbers."""
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def heat(values: Pixels) -> Pixels:
    """Values from 0 to 1 as colours, [..., 3] from 0 to 255; NaN is black."""
    table = np.asarray([rgb(one) for one in HEAT], dtype=np.float32)
    at = np.nan_to_num(values).clip(0, 1) * (len(table) - 1)
    low = at.astype(int).clip(0, len(table) - 2)
    part = (at - low)[..., None]
    found: Pixels = (table[low] * (1 - part) + table[low + 1] * part).astype(np.float32)
    return found


def cluster_hue(cell: int) -> float:
    """Hue (0 to 1) of the cluster whose token stands at a cell: neighbours differ, and it is the same in every picture."""
    return cell * 0.61803398875 % 1.0


def cluster_colour(cell: int) -> tuple[float, float, float]:
    return tuple(255 * c for c in colorsys.hls_to_rgb(cluster_hue(cell), 0.55, 0.85))  # type: ignore[return-value]


def unit(values: Tensor) -> Tensor:
    """Scores brought to 0..1 by the smallest and the largest finite one; infinite ones at the ends, NaN stays; 0.5 where all are
    equal."""
    finite = values[values.isfinite()]
    if not len(finite):
        return values.clamp(0, 1)
    low, high = finite.min(), finite.max()
    return ((values - low) / (high - low)).clamp(0, 1) if high > low else values * 0 + 0.5
