# SPDX-License-Identifier: Apache-2.0
"""Coverage in plain torch, a block of targets at a time; nothing waits for the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .naive import LANES, add_lanes, first_largest

BLOCK = {"cpu": 2**19}
"""Numbers of a table that are worked on at a time, by device: what its cache holds; elsewhere 2**25."""
_SIDE = 256
"""Rows of a table that are multiplied at a time where half of it is mirrored."""


def soft_coverage(targets: Tensor | None, tokens: Tensor, temperature: float) -> Tensor:
    """As `naive`; where tokens are their own targets, half of the cosines are computed and mirrored."""
    tokens = F.normalize(tokens.float(), dim=-1, eps=1e-8)
    mine = tokens if targets is None else F.normalize(targets.float(), dim=-1, eps=1e-8)
    (visuals, count, _), across = mine.shape, tokens.transpose(1, 2)
    step = max(1, BLOCK.get(tokens.device.type, 2**25) // max(1, visuals * tokens.shape[1]))
    if 0 < count <= min(step, _SIDE):
        return (mine @ across).div_(temperature).softmax(-1).div_(count)
    table = tokens.new_empty(visuals, count, tokens.shape[1])
    if targets is None:
        for first in range(0, count, _SIDE):
            part = tokens[:, first : first + _SIDE] @ across[..., first:]
            table[:, first : first + _SIDE, first:] = part
            table[:, first + _SIDE :, first : first + _SIDE] = part[..., _SIDE:].transpose(1, 2)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        part = table[:, rows] if targets is None else mine[:, rows] @ across
        table[:, rows] = (part / temperature).softmax(-1).div_(count)
    return table


def gains(table: Tensor, best: Tensor) -> Tensor:
    """What each token adds to targets that are covered as `best` [U, R] says, [U, N]: the sum of `naive.LANES`."""
    lanes = table.new_zeros(len(table), LANES, table.shape[2])
    more = torch.empty_like(lanes)
    for first in range(0, table.shape[1], LANES):
        rows = slice(first, min(first + LANES, table.shape[1]))
        part = more[:, : rows.stop - first]
        torch.sub(table[:, rows], best[:, rows, None], out=part)
        lanes[:, : part.shape[1]] += part.relu_()
    return add_lanes(lanes)


def max_coverage(table: Tensor, k: int, last: Tensor | None, weight: Tensor | None = None) -> Tensor:
    best = table.new_zeros(table.shape[:2])
    taken = torch.zeros(len(table), table.shape[2], dtype=torch.bool, device=table.device)
    picks: list[Tensor] = []
    for _ in range(k):
        gain = gains(table, best)
        if weight is not None:
            gain *= weight
        if last is not None:
            gain.masked_fill_(last, -1.0)
        picks.append(first_largest(gain.masked_fill_(taken, float("-inf"))))
        taken.scatter_(1, picks[-1], True)
        own = table.gather(2, picks[-1][..., None].expand(-1, table.shape[1], -1))[..., 0]
        best = torch.maximum(best, own)
    return torch.cat(picks, 1)
