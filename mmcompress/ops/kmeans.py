# SPDX-License-Identifier: Apache-2.0
"""Clusters of vectors that point the same way."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.gather import gather
from ..kernels.merge import merge
from .crops import joined
from .groups import group_sum
from .precision import normalized

_EQUAL = 1e-6
"""Cosines that are no farther apart than this differ by rounding only."""
_ELEMENTS = 1 << 22
"""Largest number of similarities of one row of the batch that are held at a time."""


@torch.no_grad()
def cosine_kmeans(x: Tensor, seeds: Tensor, rounds: int = 10) -> Tensor:
    """Cluster of every vector, [B, n] int64 in [0, M): k-means with cosine similarity.

    x [B, n, C]; seeds [B, M]: the vectors that the clusters begin with. A round gives every vector to the most similar centre
    (the lowest of equals) and makes each centre the direction of the sum of its members; a centre without members stays. There
    are always `rounds` of them, without a look at the values: once nothing moves, nothing moves any more. Clusters may end up
    empty. At least float32; the same in every run, also on a GPU. Cost rounds n M C.
    """
    unit = normalized(x)
    centres = gather(unit, seeds)
    count, labels = seeds.shape[1], seeds
    step = max(1, _ELEMENTS // max(1, count))
    blocks, ones = unit.split(step, 1), torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
    for round_ in range(rounds):
        if round_:
            members, total = group_sum(ones, labels, count), merge(unit, labels, count)
            centres = torch.where(members[..., None] > 0, normalized(total), centres)
        across = centres.transpose(1, 2)
        found = []
        for block in blocks:
            likeness = torch.bmm(block, across)
            found.append((likeness >= likeness.amax(2, keepdim=True) - _EQUAL).max(2).indices)  # the first of equals
        labels = joined(found)
    return labels


def cluster_means(x: Tensor, weight: Tensor, labels: Tensor, count: int) -> Tensor:
    """Weighted mean of the members of each cluster, [B, count, C] float32; zeros for an empty one.

    x [B, n, C]; weight [B, n], not negative (members without weight count alike); labels [B, n]: vectors with a label
    below 0 belong to none. Gradients reach `x`. Cost n C.
    """
    weight = weight.detach().float().clamp_min(1e-30)
    labels = labels.clamp_min(-1)
    group = labels + 1
    largest = weight.new_zeros(len(x), count + 1).scatter_reduce(1, group, weight, "amax")
    # parts of the largest weight: sums of tiny ones would lose their digits
    return merge(x.float(), labels, count, weight / largest.gather(1, group), mean=True)
