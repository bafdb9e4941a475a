# SPDX-License-Identifier: Apache-2.0
"""Tokens of a video joined over time into trees, and the tokens of each frame that are farthest apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.diverse import max_min
from ..kernels.match import match
from .groups import group_sizes, group_sum, rank_within
from .segments import Places, of_segment


@torch.no_grad()
def apart(x: Tensor, at: Places, weight: Tensor, counts: Tensor, most: int) -> Tensor:
    """`counts` [U, T] tokens of each frame by greedy max-min on weight times cosine distance, as a mask [U, N].

    x [U, N, C], weight [U, N] (below 0 it is 0); the first of a frame has the largest weight times distance to its nearest other.
    most: no row of counts sums to more. Cost n^2 C for the first of a frame of n, n C for each other one.
    """
    visuals, packed, sizes = len(x), at.packed(), at.sizes().flatten()
    rows, weight, segment = packed.rows(x), packed.rows(weight.float().clamp_min(0)), packed.segment
    near = match(rows, rows, exclude_self=True, cu_seqlens_a=packed.ends, cu_seqlens_b=packed.ends)[0]
    alone = (1 - near).nan_to_num(0, 0, 0) * weight
    top = alone.new_zeros(len(sizes)).scatter_reduce(0, segment, alone, "amax", include_self=False)
    number = torch.arange(len(rows), device=x.device).masked_fill(alone < top[segment], len(rows))
    first = torch.zeros_like(sizes).scatter_reduce(0, segment, number, "amin", include_self=False)
    # a frame of which nothing is wanted has to be asked for one all the same
    wanted = counts.flatten()
    asked = torch.minimum(wanted.clamp_min(1), sizes)
    ends = F.pad(asked.cumsum(0), (1, 0))
    picks = max_min(
        rows, min(len(rows), visuals * (most + at.frames)), weight, first=first, cu_seqlens=packed.ends, cu_picks=ends
    )
    mask = torch.zeros(len(rows) + 1, dtype=torch.bool, device=x.device).scatter(0, picks + 1, True)[1:]
    return packed.unpacked(mask & (wanted > 0)[segment])


@torch.no_grad()
def joins(x: Tensor, at: Places, segment: Tensor, free: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The token of the frame before that each token joins, [U, N] int64, -1 for none, and their cosine, [U, N] (-inf for none).

    x [U, N, C], segment [U, T]. A `free` [U, N] token joins the most similar free one of the frame before in its segment (the
    lower of equals) if their cosine is above the threshold. Cost n^2 C for a frame of n, in blocks.
    """
    packed = at.packed()
    goes_on = F.pad(segment[:, 1:] == segment[:, :-1], (1, 0))
    asks = free & goes_on.gather(1, at.frame)
    before = F.pad(packed.ends[:-1], (1, 0))
    rows = packed.rows(x)
    cosine, found = match(
        rows,
        rows,
        query_mask=packed.rows(asks),
        key_mask=packed.rows(free),
        cu_seqlens_a=packed.ends,
        cu_seqlens_b=before,
    )
    cosine, found = packed.unpacked(cosine), packed.unpacked(packed.slots(found.clamp_min(0)))
    joined = asks & (cosine > threshold)
    return found.masked_fill(~joined, -1), cosine.masked_fill(~joined, float("-inf"))


def fewer(parent: Tensor, cosine: Tensor, group: Tensor, most: Tensor) -> Tensor:
    """`parent` [U, N] with at most `most` [U, N] joins among the tokens of each `group` [U, N], those of the largest cosine."""
    return parent.masked_fill(rank_within(cosine, group) >= most, -1)


def bounded(parent: Tensor, cosine: Tensor, at: Places, segment: Tensor, budget: Tensor) -> Tensor:
    """`parent` [U, N] with so few joins that no segment [U, T] has fewer tokens left than its frames' `budget` [U, T], one more
    where that acts, as in the reference of flashvid."""
    over = of_segment(at.sizes() - budget, segment).gather(1, at.frame)
    number = segment.gather(1, at.frame)
    many = group_sum((parent >= 0).long(), number, at.frames).gather(1, number)
    return fewer(parent, cosine, number, torch.where(many > over, over - 1, many))


def roots(parent: Tensor, frames: int) -> Tensor:
    """The root of the tree of each token, [U, N] int64: parents [U, N] lie in earlier frames, -1 for a root."""
    root = torch.where(parent < 0, torch.arange(parent.shape[1], device=parent.device), parent)
    for _ in range(max(0, frames - 1).bit_length()):
        root = root.gather(1, root)
    return root


def children(parent: Tensor) -> Tensor:
    """How many tokens each one is the parent of, [U, N]."""
    return group_sizes(parent + 1, parent.shape[1] + 1)[:, 1:]
