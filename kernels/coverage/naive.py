# SPDX-License-Identifier: Apache-2.0
"""What the operations mean."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LANES = 256
"""A gain is a sum over targets in one order for all tokens and all implementations, so that equal columns have equal gains: lane
i adds targets i, i + LANES, i + 2 LANES ... one after the other, and then the second half of the lanes is added to the first
until one is left. (Library sums round the last columns of a table differently.)"""


def add_lanes(lanes: Tensor) -> Tensor:
    """The sum of `lanes` [U, LANES, N] over the lanes, [U, N]."""
    while lanes.shape[1] > 1:
        first, second = lanes.chunk(2, 1)
        lanes = first + second
    return lanes[:, 0]


def first_largest(x: Tensor) -> Tensor:
    """Index of the maximum of each row, the lowest one of equals, [U, 1]."""
    index = torch.arange(x.shape[1], device=x.device)
    return torch.where(x == x.amax(1, keepdim=True), index, x.shape[1]).amin(1, keepdim=True)


def soft_coverage(targets: Tensor | None, tokens: Tensor, temperature: float) -> Tensor:
    targets = tokens if targets is None else targets
    targets, tokens = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (targets, tokens))
    return (targets @ tokens.transpose(1, 2) / temperature).softmax(-1) / targets.shape[1]


def max_coverage(table: Tensor, k: int, last: Tensor | None, weight: Tensor | None = None) -> Tensor:
    visuals, rows, tokens = table.shape
    best = table.new_zeros(visuals, rows)
    taken = torch.zeros(visuals, tokens, dtype=torch.bool, device=table.device)
    picks: list[Tensor] = []
    for _ in range(k):
        lanes = table.new_zeros(visuals, LANES, tokens)
        for part in (table - best[..., None]).relu().split(LANES, 1):
            lanes[:, : part.shape[1]] += part
        gain = add_lanes(lanes) if weight is None else add_lanes(lanes) * weight
        if last is not None:
            gain = gain.masked_fill(last, -1.0)
        picks.append(first_largest(gain.masked_fill(taken, float("-inf"))))
        taken = taken.scatter(1, picks[-1], True)
        own = table.gather(2, picks[-1][..., None].expand(-1, rows, -1))[..., 0]
        best = torch.maximum(best, own)
    return torch.cat(picks, 1)
