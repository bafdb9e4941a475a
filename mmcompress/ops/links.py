# SPDX-License-Identifier: Apache-2.0
"""Tokens and those at the same place before them: which are alike, and runs of them as one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.gather import gather
from .groups import group_sizes
from .precision import wide

_FAR = -3.0
"""What is added to the cosine of tokens with nothing before them at their place."""


@torch.no_grad()
def linked(x: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
    """The token before each one at its place, [U, N] int64, and their cosine, [U, N] float32.

    x [U, N, C], place [U, N] int64, any numbers; tokens of a place come in the order of time. A token with nothing before it
    gets the one before it of all, and 3 less than their cosine, so that it comes after all others; the first of all has itself
    and -inf.
    """
    number = torch.arange(x.shape[1], device=x.device).expand_as(place)
    ordered, order = place.sort(dim=1, stable=True)
    same = F.pad(ordered.diff(dim=1) == 0, (1, 0))
    before = torch.where(same, order.roll(1, 1), (order - 1).clamp_min(0))
    parent = torch.zeros_like(place).scatter(1, order, before)
    follows = torch.zeros_like(same).scatter(1, order, same)
    unit = F.normalize(wide(x), dim=-1)
    cosine = (unit * gather(unit, parent)).sum(2)
    return parent, torch.where(follows, cosine, cosine + _FAR).masked_fill(number == 0, float("-inf"))


@torch.no_grad()
def as_one(parent: Tensor, merged: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token goes, [U, N] int64, and its share there, [U, N] float32: those of the mask `merged` [U, N] into their
    parents, a lower token each, a whole run into the first of it, which becomes the plain mean."""
    number = torch.arange(parent.shape[1], device=parent.device)
    into = torch.where(merged, parent, number)
    for _ in range(max(0, parent.shape[1] - 1).bit_length()):
        into = into.gather(1, into)
    return into, 1 / group_sizes(into, parent.shape[1]).gather(1, into).float()
