# SPDX-License-Identifier: Apache-2.0
"""At which similarity the tokens of a frame join each other, at every threshold at once, and those of the frame before."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.match import match
from ..kernels.match.rule import inverse_norms, without_huge
from ..kernels.ragged import padded
from .segments import Places

PAIRS = 1 << 24
"""Pairs of tokens whose cosines are held at a time."""
NONE = float("-inf")
ALONE, TAKEN = -3.0, -9.0
"""In the place of cosines: of a token that has none, and of one that is in the tree."""


@torch.no_grad()
def levels(x: Tensor, at: Places) -> Tensor:
    """The cosines of the edges of a heaviest spanning tree of each frame of x [1, N, C], and -inf: [at least N] float32.

    At a threshold the tokens hang together, each frame for itself, in N components less one for each level above it. Cost n^2 C
    for a frame of n and log2 n rounds over its table (on the CPU one), which is held if it has at most 2^24 pairs and else made
    anew in each round, in blocks.
    """
    packed = at.packed()
    rows, n = packed.rows(x), packed.most
    many = max(1, PAIRS // (n * n))
    found = []
    for first in range(0, len(packed.ends) - 1, many):
        part, real = padded(rows, packed.ends[first : first + many + 1], n)
        scale = inverse_norms(part)
        part = without_huge(part, scale).float() * scale[..., None]
        found.append(_joins(part, real & ~scale.isnan()).flatten())
    return torch.cat(found)


@torch.no_grad()
def links(x: Tensor, at: Places) -> Tensor:
    """The cosine of each token of x [1, N, C] to the one of the frame before that is most like it, [N] float32 in any order; -inf
    where there is none. Cost n^2 C for a frame of n, in blocks."""
    packed = at.packed()
    rows, before = packed.rows(x), F.pad(packed.ends[:-1], (1, 0))
    return match(rows, rows, cu_seqlens_a=packed.ends, cu_seqlens_b=before)[0]


def _joins(x: Tensor, real: Tensor) -> Tensor:
    """Levels of groups of unit vectors x [G, n, C], those of the edge by which each component joined another one: [G, n]."""
    groups, n, _ = x.shape
    if x.device.type == "cpu" and groups * n * n <= PAIRS:
        return _grown(_cosines(x, real, 0, n))
    number = torch.arange(n, device=x.device).expand(groups, n)
    height = n if groups * n * n <= PAIRS else max(1, PAIRS // n)
    whole = _cosines(x, real, 0, n) if height == n else None
    root, level = number, torch.full(x.shape[:2], NONE, device=x.device)
    for _ in range(max(0, n - 1).bit_length()):
        parts = [
            (_cosines(x, real, i, height) if whole is None else whole)
            .masked_fill_(root[:, i : i + height, None] == root[:, None], NONE)
            .max(dim=2)
            for i in range(0, n, height)
        ]
        best, other = (torch.cat([part[i] for part in parts], 1) for i in range(2))
        top = torch.full_like(best, NONE).scatter_reduce(1, root, best, "amax")
        goal = torch.where((best > NONE) & (best == top.gather(1, root)), root.gather(1, other), n)
        goal = torch.full_like(root, n).scatter_reduce(1, root, goal, "amin")
        joins = goal < n
        if x.device.type == "cpu" and not joins.any().tolist():
            break
        # each goes where its goal goes, and so on into a circle of equal edges, most often one of two, of which the lowest stays
        low, goal = number, torch.where(joins, goal, number)
        for _ in range(n.bit_length()):
            low, goal = torch.minimum(low, low.gather(1, goal)), goal.gather(1, goal)
        stays = low.gather(1, goal)
        level = torch.where(joins & (stays != number), top, level)
        root = stays.gather(1, root)
    return level


def _grown(table: Tensor) -> Tensor:
    """As `_joins`, on the CPU: one tree grows from the first token on, by the nearest of those that are not in it."""
    cosines, level = table.numpy(), np.full(table.shape[:2], NONE, np.float32)
    group, best = np.arange(len(level)), np.maximum(cosines[:, 0], ALONE)
    best[:, :1] = TAKEN
    for step in range(1, level.shape[1]):
        new = best.argmax(1)
        level[:, step] = best[group, new]
        best[group, new] = TAKEN
        np.maximum(best, cosines[group, new], out=best, where=best > TAKEN)
    level[level == ALONE] = NONE
    return torch.from_numpy(level)


def _cosines(x: Tensor, real: Tensor, first: int, height: int) -> Tensor:
    """Those of `height` rows from `first` with all, [G, height, n], -inf where one of both is not real."""
    part = slice(first, first + height)
    return (x[:, part] @ x.transpose(1, 2)).masked_fill_(~(real[:, part, None] & real[:, None]), NONE)
