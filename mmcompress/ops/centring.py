# SPDX-License-Identifier: Apache-2.0
"""Features without their common direction, and greedy choices that weigh tokens by how untypical they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .groups import group_sizes, group_sum
from .ties import argmax_first

_BLOCK = 4096
"""Largest number of tokens whose similarities are held as one matrix."""


def centred_unit(x: Tensor, groups: Tensor, count: int) -> Tensor:
    """Unit vectors [U, N, D] float32 of `x` less the mean of its group; zero where only rounding is left of a token."""
    x = x.float()
    mean = group_sum(x, groups, count) / group_sizes(groups, count).clamp_min(1)[..., None]
    rest = x - mean.gather(1, groups[..., None].expand_as(x))
    rounding = rest.norm(dim=-1, keepdim=True) <= 1e-6 * x.norm(dim=-1, keepdim=True)
    return F.normalize(rest, dim=-1).masked_fill(rounding, 0)


def distinctiveness(unit: Tensor, groups: Tensor, count: int) -> Tensor:
    """How little a token is like the others of its group: minus its mean cosine to them, brought to (0, 1], [U, N].

    unit [U, N, D]. 1 for all tokens of a group in which all are alike. Cost N D.
    """
    total = group_sum(unit, groups, count).gather(1, groups[..., None].expand_as(unit))
    others = (group_sizes(groups, count) - 1).clamp_min(1).gather(1, groups)
    typical = ((unit * total).sum(-1) - (unit * unit).sum(-1)) / others
    ends = torch.zeros(unit.shape[0], count, device=unit.device)
    low = ends.scatter_reduce(1, groups, -typical, "amin", include_self=False).gather(1, groups)
    high = ends.scatter_reduce(1, groups, -typical, "amax", include_self=False).gather(1, groups)
    alike = high - low < 1e-5
    return ((-typical - low + 1e-6) / (high - low).masked_fill(alike, 1)).masked_fill(alike, 1)


def weighted_max_min(unit: Tensor, weight: Tensor, groups: Tensor, turns: Tensor) -> Tensor:
    """Greedy max-min diversity in each group, with weights: tokens in the order they are picked, [U, k] int64.

    unit [U, N, D], weight and groups [U, N]; turns [U, k]: the group whose turn it is, as often as it may pick. The first
    pick of a group is the token farthest from its nearest neighbour, each next one has the largest weight times cosine
    distance to the nearest pick. Ties go to the lower index. Cost O(N^2 D), and N^2 memory up to 4096 tokens.
    """
    similar_to = _similarities(unit)
    worth = 1 - _nearest_of_group(unit, groups)
    nearest = torch.full_like(worth, float("inf"))
    free = torch.ones_like(groups, dtype=torch.bool)
    picks = []
    for turn in turns.unbind(1):
        own = groups == turn[:, None]
        pick = argmax_first(worth.masked_fill(~(own & free), float("-inf")))
        picks.append(pick)
        free = free.scatter(1, pick[:, None], False)
        nearest = torch.where(own, torch.minimum(nearest, 1 - similar_to(pick)), nearest)
        worth = torch.where(own, weight * nearest, worth)
    return torch.stack(picks, 1)


def greedy_map(unit: Tensor, quality: Tensor, groups: Tensor, turns: Tensor) -> Tensor:
    """Greedy MAP of a determinantal point process in each group: tokens in the order they are picked, [U, k] int64.

    The kernel is quality_i * cos_ij * quality_j; arguments as in `weighted_max_min`, quality [U, N] in (0, 1]. Tokens that
    the picks span already come last, by quality. Ties go to the lower index. Cost O(N k (k + D)).
    """
    similar_to = _similarities(unit)
    start = quality**2 * (unit * unit).sum(-1)
    left = start
    free = torch.ones_like(groups, dtype=torch.bool)
    factors = unit.new_zeros(unit.shape[0], 0, unit.shape[1])
    picks = []
    for turn in turns.unbind(1):
        own = groups == turn[:, None]
        spanned = left <= 1e-6 * start
        worth = torch.where(spanned, quality - 4, left)
        pick = argmax_first(worth.masked_fill(~(own & free), float("-inf")))
        picks.append(pick)
        at = pick[:, None]
        free = free.scatter(1, at, False)
        row = quality.gather(1, at) * similar_to(pick) * quality * own
        row = row - (factors.gather(2, at[:, None].expand(-1, factors.shape[1], 1)) * factors).sum(1)
        row = row / left.gather(1, at).clamp_min(1e-10).sqrt()
        row = row.masked_fill(spanned.gather(1, at) | ~own, 0)
        factors = torch.cat([factors, row[:, None]], 1)
        left = left - row**2
    return torch.stack(picks, 1)


def _similarities(unit: Tensor) -> Callable[[Tensor], Tensor]:
    """A function from one token [U] to its cosines to all tokens [U, N]."""
    tokens, width = unit.shape[1:]
    if tokens <= _BLOCK:
        table = unit @ unit.transpose(1, 2)
        return lambda pick: table.gather(1, pick[:, None, None].expand(-1, 1, tokens))[:, 0]
    return lambda pick: (unit @ unit.gather(1, pick[:, None, None].expand(-1, 1, width)).transpose(1, 2))[..., 0]


def _nearest_of_group(unit: Tensor, groups: Tensor) -> Tensor:
    """Cosine of every token to the most similar other token of its group, [U, N]; -inf where there is none."""
    parts = []
    for first in range(0, unit.shape[1], _BLOCK):
        rows = slice(first, first + _BLOCK)
        similar = unit[:, rows] @ unit.transpose(1, 2)
        similar = similar.masked_fill(groups[:, rows, None] != groups[:, None], float("-inf"))
        own = torch.arange(similar.shape[1], device=unit.device)
        similar[:, own, first + own] = float("-inf")
        parts.append(similar.amax(-1))
    return torch.cat(parts, 1)
