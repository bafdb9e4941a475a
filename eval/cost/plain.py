# SPDX-License-Identifier: Apache-2.0
"""Algorithms as official code usually has them, in a few lines of PyTorch: peers to be as fast as, not to be used."""

from __future__ import annotations

import torch
from torch import Tensor


def density_peaks(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `ops.density.density_peaks`, from one float32 table of `torch.cdist` (which is exact to fewer digits)."""
    apart = torch.cdist(x, x) / x.shape[2] ** 0.5
    density = apart.topk(count, largest=False).values.square().mean(-1).neg().exp()
    denser = density[:, None] > density[:, :, None]
    farthest = apart.flatten(1).amax(1)[:, None, None]
    gap = torch.where(denser, apart, farthest).amin(2)
    centres = (gap * density).topk(count).indices
    near = apart.gather(1, centres[..., None].expand(-1, -1, x.shape[1]))
    into = near.argmin(1)
    return centres, into.scatter(1, centres, torch.arange(count).expand_as(centres))


def max_coverage(table: Tensor, k: int) -> Tensor:
    """As `kernels.coverage.max_coverage`, all gains anew for every pick."""
    best, taken = table.new_zeros(table.shape[:2]), torch.zeros(len(table), table.shape[2], dtype=torch.bool)
    picks: list[Tensor] = []
    for _ in range(k):
        gain = (table - best[..., None]).clamp_min(0).sum(1).masked_fill(taken, -1)
        picks.append(gain.argmax(1, keepdim=True))
        taken.scatter_(1, picks[-1], True)
        best = torch.maximum(best, table[:, :, picks[-1][:, 0]].diagonal(dim1=0, dim2=2).T)
    return torch.cat(picks, 1)
