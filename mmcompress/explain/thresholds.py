# SPDX-License-Identifier: Apache-2.0
"""Maps as 8-bit pictures: resizing and thresholds, in the arithmetic of OpenCV."""

from __future__ import annotations

import torch
from torch import Tensor


def quantised(maps: Tensor) -> Tensor:
    """Maps from 0 to 1 as whole numbers 0..255, cut off, not rounded: uint8."""
    return (maps.float() * 255).to(torch.uint8)


def resize_map(values: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [h, w] at `size`, bilinear in the fixed-point arithmetic of OpenCV (weights of 11 bits), uint8 [height, width]."""
    (height, width), (rows, columns) = values.shape, size
    y, down = _grid_points(height, rows)
    x, along = _grid_points(width, columns)
    along = torch.where((x < 0) | (x >= width - 1), 0, along)
    x = x.clamp(0, width - 1)
    wide = values.long()
    wide = wide[:, x] * _eleven_bits(1 - along) + wide[:, (x + 1).clamp_max(width - 1)] * _eleven_bits(along)
    parts = [
        (_eleven_bits(weight)[:, None] * (wide[at.clamp(0, height - 1)] >> 4)) >> 16
        for weight, at in ((1 - down, y), (down, y + 1))
    ]
    return ((parts[0] + parts[1] + 2) >> 2).to(torch.uint8)


def _grid_points(cells: int, points: int) -> tuple[Tensor, Tensor]:
    """For each of the points the cell before it and how far behind that cell it is, float32."""
    at = ((torch.arange(points, dtype=torch.float64) + 0.5) * (1.0 / (points / cells)) - 0.5).float()
    return at.floor().long(), at - at.floor()


def _eleven_bits(weight: Tensor) -> Tensor:
    return (weight * 2048).round().long()


def otsu_threshold(values: Tensor) -> int:
    """The threshold t (uint8 values of any shape, at least one) for which "above t" and "up to t" differ most: the largest variance
    between the two; 0 if all values are equal."""
    counts = torch.bincount(values.flatten().long(), minlength=256).double() / values.numel()
    below = counts.cumsum(0)
    mass = (counts * torch.arange(256)).cumsum(0)
    tiny = torch.finfo(torch.float32).eps
    there = (below > tiny) & (below < 1 - tiny)
    low, high = mass / below.clamp_min(tiny), (mass[-1] - mass) / (1 - below).clamp_min(tiny)
    between = (below * (1 - below) * (low - high).square()).masked_fill(~there, 0)
    return int(between.argmax())


def resize_nearest(values: Tensor, size: tuple[int, int]) -> Tensor:
    """[h, w] at `size`: the value of the cell that each pixel's centre is in."""
    rows, columns = (
        ((torch.arange(n) + 0.5) * (cells / n)).long() for n, cells in zip(size, values.shape, strict=True)
    )
    return values[rows][:, columns]
