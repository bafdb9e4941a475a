# SPDX-License-Identifier: Apache-2.0
"""The rank-Gaussian filter as it is defined: every window sorted, every rank weighted."""

from __future__ import annotations

import torch
from torch import Tensor


def reflected(length: int, reach: int, device: torch.device) -> Tensor:
    """Places [length + 2 reach] of an axis padded by reflection at its ends, back and forth where it is shorter than `reach`;
    an axis of length 1 is repeated."""
    place = torch.arange(-reach, length + reach, device=device)
    if length == 1:
        return torch.zeros_like(place)
    place = place.remainder(2 * length - 2)
    return torch.minimum(place, 2 * length - 2 - place)


def rank_filter(maps: Tensor, kernel: int, valid: Tensor | None) -> Tensor:
    """maps [B, H, W] float32, valid [B or 1, H, W] bool. Memory kernel^2 maps."""
    height, width = maps.shape[1:]
    rows, columns = (reflected(n, kernel // 2, maps.device) for n in (height, width))
    seen = torch.ones_like(maps, dtype=torch.bool) if valid is None else valid.expand_as(maps)
    window, seen = (
        x[:, rows][:, :, columns].unfold(1, kernel, 1).unfold(2, kernel, 1).flatten(3) for x in (maps, seen)
    )
    ordered = window.masked_fill(~seen, float("inf")).sort(dim=3).values
    count = seen.sum(3, keepdim=True)
    rank = torch.arange(kernel**2, device=maps.device)
    inside = rank < count
    ordered = ordered.masked_fill(~inside, 0)
    size = count.clamp_min(1)
    mean = ordered.sum(3, keepdim=True) / size
    relative = ordered / torch.where(mean > 0, mean, 1)
    variance = (relative - 1).square().masked_fill(~inside, 0).sum(3, keepdim=True) / size
    far = (rank - (count - 1) / 2).square()
    far = far - far.amin(3, keepdim=True)  # a constant window has variance 0: its middle gets all the weight
    gauss = (-far / (2 * variance.clamp_min(1e-30))).exp().masked_fill(~inside, 0)
    found = (gauss * ordered).sum(3) / gauss.sum(3).clamp_min(1e-30)
    return torch.where(mean[..., 0] > 0, found, 0)
