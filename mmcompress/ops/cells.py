# SPDX-License-Identifier: Apache-2.0
"""Cells: every token goes to the nearest of a few anchors, and none is thrown away."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.gather import gather
from ..kernels.match import match
from .crops import joined
from .groups import group_sizes, of_cells
from .precision import normalized, wide
from .ties import argmax_first

_BLOCK = {"cpu": 2**20}
"""Numbers of features of a visual that are compared at a time; elsewhere a few launches for all."""


@torch.no_grad()
def outermost(features: Tensor) -> Tensor:
    """The token least like the mean of all at length 1, the lowest of equals: features [U, N, D] to [U] int64.

    Reads them three times, in blocks of tokens; equal tokens compare equal wherever they stand.
    """
    step = max(1, _BLOCK.get(features.device.type, 2**26) // max(1, features.shape[2]))
    blocks = features.split(step, dim=1)
    scales = [torch.linalg.vector_norm(wide(x), dim=-1, keepdim=True).clamp_min(1e-12).reciprocal() for x in blocks]
    pairs = list(zip(blocks, scales, strict=True))
    sums = [(wide(x) * scale).sum(1, keepdim=True) for x, scale in pairs]
    mean = (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)) / -features.shape[1]
    away = [torch.addcmul(mean, wide(x), scale).square_().sum(-1) for x, scale in pairs]
    return argmax_first(joined(away))


@torch.no_grad()
def placed(features: Tensor, boxes: Tensor, slots: Tensor | None, share: float) -> Tensor:
    """Tokens at length 1 with their places beside them, [U, N, D + 4] float32: cosines compare both.

    features [U, N, D]; boxes [cells, 4] of the picture, and which cell each token is, `slots` [U, N], None: in order. A place is a
    point on half a circle for each axis, at a scale at which places are spread `share` times as wide as tokens: the spread is the
    mean of 1 - cosine over all pairs. Tokens that all lie at one place are compared by what they are.
    """
    unit = normalized(features)
    angle = (boxes[:, :2] + boxes[:, 2:]) * (math.pi / 2)
    circle = torch.cat([angle.cos(), angle.sin()], 1) / math.sqrt(2)
    place = torch.stack([of_cells(column, slots, features) for column in circle.T], -1)
    tokens, places = ((1 - x.mean(1, keepdim=True).square().sum(-1, keepdim=True)).clamp_min(0) for x in (unit, place))
    scale = torch.where(places > 1e-6, share * tokens / places.clamp_min(1e-6), 0)
    return torch.cat([unit, place * scale.sqrt()], -1)


@torch.no_grad()
def nearest_cells(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """The anchor of every token, and the share of each token in the mean of its cell: both [U, N], int64 and float32.

    features [U, N, D]; anchors [U, k] int64, no slot twice: token i goes to number `assign[i]` of them, that of the largest cosine
    (ties to the lower number), an anchor to itself. Cost N k D, memory O(N); nothing waits for the device.
    """
    assign = nearest_of(features, anchors)
    return assign, mean_weights(assign, anchors.shape[1])


@torch.no_grad()
def nearest_of(features: Tensor, anchors: Tensor) -> Tensor:
    """The anchor of every token alone, [U, N] int64: see `nearest_cells`."""
    assign = match(features, gather(features, anchors))[1]
    number = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
    return assign.scatter(1, anchors, number)


@torch.no_grad()
def numbered(nearest: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """As `nearest_cells`, where the slot of every token's anchor is known: nearest [U, N] int64, anchors [U, k] ascending."""
    number = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
    assign = torch.zeros_like(nearest).scatter(1, anchors, number).gather(1, nearest)
    return assign, mean_weights(assign, anchors.shape[1])


def mean_weights(assign: Tensor, k: int) -> Tensor:
    """The share of each token in the mean of its cell, [U, N] float32; assign [U, N]: numbers of cells, below k."""
    return group_sizes(assign, k, torch.float32).gather(1, assign).reciprocal()
