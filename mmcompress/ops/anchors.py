# SPDX-License-Identifier: Apache-2.0
"""Tokens averaged into the anchors of each of several frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.gather import gather
from .precision import wide
from .ties import argmax_first

_ELEMENTS = 1 << 22
"""Largest number of similarities that are held at a time."""


def into_anchors(
    x: Tensor,
    pool: Tensor,
    segment: Tensor,
    frame: Tensor,
    anchors: Tensor,
    real: Tensor,
    beta: float,
    own: bool,
    frames: int,
) -> tuple[Tensor, Tensor]:
    """Anchors with what is most like them mixed in, [U, M, C] in the type of `x`; and the anchor that each token of the pool is
    most like, [U, N] int64, -1 without one.

    x [U, N, C]; pool [U, N] bool; segment and frame [U, N] int64, frames in [0, `frames`); anchors [U, M] int64 ascending,
    those that `real` [U, M] leaves out may be any. Of each frame of a segment that has anchors, every token of the segment's
    pool goes to the one with the largest cosine (the lower of equals): it goes to as many as there are such frames. An anchor c
    of n tokens becomes w c + (1 - w) mean, w = max(beta, 1 / (n + 1)). own: whether the anchors of a frame are in its own pool.
    Cost 2 N M C, in blocks.
    """
    (visuals, tokens), count = pool.shape, anchors.shape[1]
    if not count:
        return x[:, :0], torch.full_like(segment, -1)
    unit = F.normalize(wide(x.detach()), dim=-1)
    chosen, at, part = gather(unit, anchors).transpose(1, 2), frame.gather(1, anchors), segment.gather(1, anchors)
    is_anchor = torch.zeros_like(pool).scatter(1, anchors, real)
    column = torch.arange(count, device=x.device)
    total = torch.zeros(visuals, count, x.shape[2], dtype=unit.dtype, device=x.device)
    members, best = unit.new_zeros(visuals, count), []
    step = max(1, _ELEMENTS // (visuals * count))
    where = at[:, None]
    for first in range(0, tokens, step):
        rows = slice(first, first + step)
        like = unit[:, rows] @ chosen
        can = (segment[:, rows, None] == part[:, None]) & pool[:, rows, None] & real[:, None]
        if not own:
            can = can & ~(is_anchor[:, rows, None] & (frame[:, rows, None] == where))
        like = like.masked_fill(~can, float("-inf"))
        index = where.expand_as(like)
        most = like.new_full((*like.shape[:2], frames), float("-inf")).scatter_reduce(2, index, like, "amax")
        hit = (like == most.gather(2, index)) & can
        lowest = torch.full_like(most, count, dtype=torch.int64)
        lowest = lowest.scatter_reduce(2, index, torch.where(hit, column, count), "amin")
        goes = (lowest.gather(2, index) == column).to(unit.dtype)
        total = total + goes.transpose(1, 2) @ wide(x[:, rows])
        members = members + goes.sum(1)
        found = argmax_first(like)
        best.append(torch.where(can.any(2), found, -1))
    weight = torch.clamp(1 / (members + 1), min=beta)[..., None]
    mean = total / members.clamp_min(1)[..., None]
    made = weight * wide(gather(x, anchors)) + (1 - weight) * mean
    made = torch.where(members[..., None] > 0, made, wide(gather(x, anchors)))
    return made.to(x.dtype), torch.cat(best, 1)
