# SPDX-License-Identifier: Apache-2.0
"""What the operations mean: the full matrix of cosines, then one pick after the other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SPENT = 1e-6
"""A token of which no larger part than this is new to what is picked (of its squared length, which is 1) counts as nothing new.

Rounding moves that part by some 1e-7, and by more after picks that were nearly nothing new themselves: divided by the least
part that a pick added. A token so close to SPENT may count as new in one implementation and not in another, with another
order of the picks from there on. Where all parts are far from SPENT, as with tokens that are equal, at right angles or zero,
the picks are defined to the last one.
"""


def first_largest(x: Tensor) -> Tensor:
    """Index of the maximum along the last dimension, the lowest one of equals."""
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), index, x.shape[-1]).amin(-1)


def own_part(features: Tensor) -> Tensor:
    """Squared length [U, N] of each row after normalisation: 1 and not nearly so, lest rounding decide; 0 for zeros."""
    length = features.float().norm(dim=-1)
    return (length / length.clamp_min(1e-12)).square().nan_to_num(0)


def max_min(
    features: Tensor, k: int, weight: Tensor | None, first: Tensor | None = None, nearest: bool = False
) -> tuple[Tensor, Tensor | None]:
    """first [U]: the first pick, where it is another one. Picks [U, k], and the nearest one of each token [U, N] if asked."""
    unit = F.normalize(features.float(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    distance = 1 - cosine
    itself = torch.eye(unit.shape[1], dtype=torch.bool, device=unit.device)
    pick = first_largest(distance.masked_fill(itself, float("inf")).amin(-1)) if first is None else first
    chosen, least = [pick], torch.full_like(distance[:, 0], float("inf"))
    free = torch.ones_like(least, dtype=torch.bool)
    for _ in range(k - 1):
        row = distance.gather(1, pick[:, None, None].expand_as(distance[:, :1]))[:, 0]
        least, free = torch.minimum(least, row), free.scatter(1, pick[:, None], False)
        worth = least if weight is None else weight.float() * least
        pick = first_largest(worth.masked_fill(~free, float("-inf")))
        chosen.append(pick)
    picks = torch.stack(chosen, 1)
    if not nearest:
        return picks, None
    slots = picks.sort(dim=1).values
    to = cosine.gather(2, slots[:, None].expand(-1, cosine.shape[1], -1))
    return picks, slots.gather(1, first_largest(to)).scatter(1, picks, picks)


def expand(
    features: Tensor, k: int, weight: Tensor, offset: Tensor, cap: float, start: Tensor, sizes: Tensor, together: int
) -> Tensor:
    unit = F.normalize(features.float(), dim=-1)
    distance = 1 - unit @ unit.transpose(1, 2)
    least, free = torch.full_like(distance[:, 0], cap), torch.ones_like(distance[:, 0], dtype=torch.bool)
    picks: list[Tensor] = []
    done = 0
    while done < k:
        worth = (weight * least + offset).masked_fill(~free, float("-inf"))
        pick = worth.sort(dim=1, descending=True, stable=True).indices[:, : min(together, k - done)]
        if done < start.shape[1]:
            pick = torch.where(done < sizes[:, None], start[:, done : done + 1], pick[:, :1])
        picks.append(pick)
        done += pick.shape[1]
        free = free.scatter(1, pick, False)
        for column in pick.T:
            row = distance.gather(1, column[:, None, None].expand_as(distance[:, :1]))[:, 0]
            least = torch.minimum(least, row)
    return torch.cat(picks, 1)


def greedy_map(features: Tensor, log_quality: Tensor, k: int) -> Tensor:
    unit, worth = F.normalize(features.float(), dim=-1), 2 * log_quality.float().clamp_min(-1e30)
    cosine = unit @ unit.transpose(1, 2)
    left = own_part(features)  # squared pivots: the part of each token that is new
    free = torch.ones_like(left, dtype=torch.bool)
    factor, picks = unit.new_zeros(len(unit), k, unit.shape[1]), []
    for step in range(k):
        new = (left > SPENT) & free
        pool = torch.where(new.any(1, keepdim=True), new, free)
        gain = worth + torch.where(new, left, 1.0).log()
        pick = first_largest(gain.masked_fill(~pool, float("-inf")))[:, None]
        row = cosine.gather(1, pick[..., None].expand_as(cosine[:, :1]))
        known = factor.gather(2, pick[..., None].expand(-1, k, 1))
        row = row[:, 0] - (known.transpose(1, 2) @ factor)[:, 0]
        factor[:, step] = row / torch.where(new, left, float("inf")).gather(1, pick).sqrt()
        left, free = left - factor[:, step].square(), free.scatter(1, pick, False)
        picks.append(pick[:, 0])
    return torch.stack(picks, 1)
