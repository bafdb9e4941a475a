# SPDX-License-Identifier: Apache-2.0
"""The rank-Gaussian filter on some maps at a time: a window's values are kernel^2 planes, sorted by a network of minima and
maxima over whole planes."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from . import naive
from .naive import reflected

LOG2E = math.log2(math.e)
CELLS = 1 << 14
"""Cells of a block: its planes, 9 for a kernel of 3, stay in the cache."""
FEW = 1 << 10
"""Up to so many cells the plain code is as fast."""


@functools.cache
def network(n: int) -> tuple[tuple[int, int], ...]:
    """Pairs (i, j), i < j, that sort `n` values when each in turn puts the smaller one at i: Batcher's odd-even merge sort."""
    pairs = []
    p = 1
    while p < n:
        k = p
        while k:
            for j in range(k % p, n - k, 2 * k):
                for i in range(min(k, n - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    return tuple(pairs)


def rank_filter(maps: Tensor, kernel: int, valid: Tensor | None) -> Tensor:
    """maps [B, H, W] float32, valid [B or 1, H, W] bool."""
    if maps.numel() <= FEW:
        return naive.rank_filter(maps, kernel, valid)
    found = torch.empty_like(maps)
    batch, height, width = maps.shape
    rows, columns = (reflected(n, kernel // 2, maps.device) for n in (height, width))
    row_step = min(height, max(1, CELLS // width))
    step = max(1, CELLS // (row_step * width)) if row_step == height else 1
    for first in range(0, batch, step):
        part = slice(first, min(first + step, batch))
        seen = None if valid is None else valid if len(valid) == 1 else valid[part]
        for top in range(0, height, row_step):
            inside = slice(top, min(top + row_step, height))
            around = rows[top : inside.stop + kernel - 1]
            x = maps[part].index_select(1, around).index_select(2, columns)
            mask = None if seen is None else seen.index_select(1, around).index_select(2, columns).expand_as(x)
            found[part, inside] = _filter(x, kernel, mask)
    return found


def _filter(x: Tensor, kernel: int, seen: Tensor | None) -> Tensor:
    """x [b, h + kernel - 1, w + kernel - 1]: what becomes of its inner cells [b, h, w]."""
    height, width = (s - kernel + 1 for s in x.shape[1:])
    count: Tensor | int = kernel**2
    if seen is not None:
        x = x.masked_fill(~seen, float("inf"))
        number = functools.reduce(torch.add, [seen[:, i : i + height].float() for i in range(kernel)])
        count = functools.reduce(torch.add, [number[..., i : i + width] for i in range(kernel)])
    places = itertools.product(range(kernel), repeat=2)
    planes = [x[:, i : i + height, j : j + width].clone(memory_format=torch.contiguous_format) for i, j in places]
    spare = torch.empty_like(planes[0])
    for i, j in network(len(planes)):
        torch.minimum(planes[i], planes[j], out=spare)
        torch.maximum(planes[i], planes[j], out=planes[j])
        planes[i], spare = spare, planes[i]
    beyond = [count <= i if isinstance(count, Tensor) else None for i in range(len(planes))]
    mean, variance, found, weight = (torch.zeros_like(spare) for _ in range(4))
    for plane, gone in zip(planes, beyond, strict=True):
        mean += plane if gone is None else plane.masked_fill_(gone, 0)
    size = count.clamp_min(1) if isinstance(count, Tensor) else count
    mean /= size
    unit = torch.where(mean > 0, mean, 1)
    for plane, gone in zip(planes, beyond, strict=True):
        off = torch.div(plane, unit, out=spare).sub_(1)
        variance.addcmul_(off, off if gone is None else off.masked_fill_(gone, 0))
    slope = variance.div_(size).clamp_min_(1e-30).reciprocal_().mul_(-0.5 * LOG2E)
    nearest = 0.25 * (1 - count % 2)
    for i, (plane, gone) in enumerate(zip(planes, beyond, strict=True)):
        gauss = torch.mul(slope, (i - (count - 1) / 2) ** 2 - nearest, out=spare).exp2_()
        if gone is not None:
            gauss.masked_fill_(gone, 0)
        found.addcmul_(gauss, plane)
        weight += gauss
    return found.div_(weight.clamp_min_(1e-30)).masked_fill_(mean <= 0, 0)
