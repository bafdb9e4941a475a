# SPDX-License-Identifier: Apache-2.0
"""Cells: every token goes to the nearest of a few anchors, and none is thrown away."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.match import match
from .groups import group_sizes


@torch.no_grad()
def nearest_cells(features: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """The anchor of every token, and the share of each token in the mean of its cell: both [U, N], int64 and float32.

    features [U, N, D]; anchors [U, k] int64, no slot twice: token i goes to number `assign[i]` of them, that of the largest cosine
    (ties to the lower number), an anchor to itself. Cost N k D, memory O(N); nothing waits for the device.
    """
    rows = anchors[..., None].expand(-1, -1, features.shape[2])
    _, assign = match(features, features.gather(1, rows))
    number = torch.arange(anchors.shape[1], device=anchors.device).expand_as(anchors)
    assign = assign.scatter(1, anchors, number)
    return assign, mean_weights(assign, anchors.shape[1])


def mean_weights(assign: Tensor, k: int) -> Tensor:
    """The share of each token in the mean of its cell, [U, N] float32; assign [U, N]: numbers of cells, below k."""
    return 1 / group_sizes(assign, k).gather(1, assign).float()
