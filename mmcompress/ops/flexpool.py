# SPDX-License-Identifier: Apache-2.0
"""Average pooling of a grid to any smaller grid: enlarged to a multiple of it, then cut into equal windows."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def enlarged(size: int, target: int) -> int:
    """The smallest multiple of `target` that is not below `size`."""
    return math.ceil(size / target) * target


@functools.lru_cache(maxsize=512)
def window_weights(size: int, target: int) -> Tensor:
    """What each of `target` windows takes of each of `size` cells in a row, [target, size] float32 on the CPU.

    The row is enlarged to a multiple of `target` by linear interpolation with fixed ends, and averaged over equal windows; this is
    not `adaptive_avg_pool`, unless `target` divides `size`.
    """
    wide = enlarged(size, target)
    places = torch.eye(size)[None]
    if wide != size:
        places = F.interpolate(places, wide, mode="linear", align_corners=True)
    return places[0].unflatten(1, (target, -1)).mean(2).T.contiguous()


def columns_of(k: int, rows: int, columns: int) -> tuple[int, ...]:
    """How many tokens each row of the pooled grid of exactly `k` has, for a grid of `rows` by `columns` and 1 <= k <= its cells.

    In the proportions of the grid, and equal if k allows it (a square number on a square grid: its root); else the first rows have
    one more.
    """
    least, most = math.ceil(k / columns), min(rows, k)
    height = min(max(round(math.sqrt(k * rows / columns)), least), most)
    return tuple(k // height + (i < k % height) for i in range(height))


def flexible_pool(x: Tensor, columns: tuple[int, ...]) -> Tensor:
    """Pool grids x [U, H, W, C] to len(columns) rows of so many tokens, [U, sum(columns), C], in raster order; float32."""
    x = x.float()
    down = window_weights(x.shape[1], len(columns)).to(x.device, non_blocking=True)
    rows = torch.einsum("th,uhwc->utwc", down, x)
    parts, first = [], 0
    for width in dict.fromkeys(columns):  # at most two: rows that have one more come first
        count = columns.count(width)
        across = window_weights(x.shape[2], width).to(x.device, non_blocking=True)
        parts.append(torch.einsum("sw,utwc->utsc", across, rows[:, first : first + count]).flatten(1, 2))
        first += count
    return torch.cat(parts, 1)


def pooled_cells(rows: int, columns: tuple[int, ...], width: int) -> tuple[Tensor, Tensor]:
    """Of a grid of `rows` by `width` cells: the cell in the middle of each pooled token [k], and the pooled token that each cell
    lies in [cells]."""
    height, across = len(columns), torch.tensor(columns)
    first = across.cumsum(0) - across
    row = torch.arange(rows) * height // rows
    inside = torch.arange(width) * across[row][:, None] // width
    into = (first[row][:, None] + inside).flatten()
    line = torch.repeat_interleave(torch.arange(height), across)
    column = torch.arange(sum(columns)) - first[line]
    return _middle(line, rows, torch.full_like(line, height)) * width + _middle(column, width, across[line]), into


def _middle(part: Tensor, size: int, parts: Tensor) -> Tensor:
    """The middle one of those of `size` cells that lie in `part` of `parts`."""
    begin, end = (-(-(p * size) // parts) for p in (part, part + 1))
    return (begin + end - 1) // 2
