# SPDX-License-Identifier: Apache-2.0
"""The definition of density peaks: the whole table of distances."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ragged import segments


def density_peaks(
    x: Tensor, k: int, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, longest: int | None = None
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return _peaks(x, k, mask)
    spread, gap = (x.new_full(x.shape[:1], value, dtype=torch.float32) for value in (float("inf"), 0))
    for begin, end in segments(cu_seqlens):
        part = _peaks(x[None, begin:end], k, None if mask is None else mask[None, begin:end])
        spread[begin:end], gap[begin:end] = part[0][0], part[1][0]
    return spread, gap


def nearest(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None = None,
    cu_x: Tensor | None = None,
    cu_y: Tensor | None = None,
    longest: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    if cu_x is None or cu_y is None:
        return _nearest(x, y, mask)
    distance, index = x.new_full(x.shape[:1], float("inf"), dtype=torch.float32), x.new_full(x.shape[:1], -1).long()
    for (x0, x1), (y0, y1) in zip(segments(cu_x), segments(cu_y), strict=True):
        near, place = _nearest(x[None, x0:x1], y[None, y0:y1], None if mask is None else mask[None, y0:y1])
        distance[x0:x1], index[x0:x1] = near[0], torch.where(place[0] < 0, -1, place[0] + y0)
    return distance, index


def clearest(spread: Tensor, gap: Tensor, count: int) -> Tensor:
    """The tokens with the largest products of density and gap [U, n], the clearest first, [U, count]. Compared by their logarithm:
    densities of tokens that lie far apart would all be 0."""
    return (gap.log() - spread).sort(dim=1, descending=True, stable=True).indices[:, :count]


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances [B, n, m] float32."""
    distance = torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square().clamp_max(torch.finfo(torch.float32).max).float()


def _peaks(x: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    (_, n, width), index = x.shape, torch.arange(x.shape[1], device=x.device)
    if not n:
        return 2 * (x.new_zeros(x.shape[:2], dtype=torch.float32),)
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
    square = _squares(x, x).masked_fill(~(mask[:, None] & mask[:, :, None]), float("inf"))
    close = square.sort(dim=2).values[..., :k].double()
    close = close.masked_fill(close.isinf(), 0)
    spread = close.sum(2) / (mask.sum(1, keepdim=True).clamp(1, k) * width)
    spread = spread.float().masked_fill(~mask, float("inf"))
    denser = spread[:, None] < spread[:, :, None]
    denser |= (spread[:, None] == spread[:, :, None]) & (index < index[:, None])
    gap = square.masked_fill(~denser, float("inf")).amin(2)
    farthest = square.masked_fill(square.isinf(), 0).flatten(1).amax(1, keepdim=True)
    gap = torch.where(gap.isinf(), farthest, gap).double() / width
    return spread, gap.sqrt().float().masked_fill(~mask, 0)


def _nearest(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    square = _squares(x, y)
    square = square if mask is None else square.masked_fill(~mask[:, None], float("inf"))
    if not square.shape[2]:
        square = square.new_full((*square.shape[:2], 1), float("inf"))
    near, index = square.min(2)
    none = near.isinf()
    distance = (near.double() / x.shape[2]).sqrt().float()
    return distance.masked_fill(none, float("inf")), index.masked_fill(none, -1)
