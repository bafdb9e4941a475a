# SPDX-License-Identifier: Apache-2.0
"""Maximum coverage: choose the tokens that together stand best for everything."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .ties import argmax_first

_BLOCK = {"cpu": 2**19}
"""Numbers of a coverage table that are worked on at a time, by device: what its cache holds; elsewhere 2**25."""


def _blocks(table: Tensor) -> Iterator[slice]:
    """Rows of `table` [U, R, N], block by block."""
    visuals, rows, tokens = table.shape
    step = max(1, _BLOCK.get(table.device.type, 2**25) // (visuals * tokens))
    return (slice(first, min(first + step, rows)) for first in range(0, rows, step))


@torch.no_grad()
def soft_coverage(targets: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """How well each token covers each target, [U, R, N] float32: a softmax of cosines over the tokens, 1/R per target.

    targets [U, R, C], tokens [U, N, C]. A zero vector has cosine 0. Cost R N C; memory R N and one block of rows.
    """
    count = targets.shape[1]
    targets, tokens = (F.normalize(x.float(), dim=-1, eps=1e-8) for x in (targets, tokens))
    table = tokens.new_empty(len(tokens), count, tokens.shape[1])
    for rows in _blocks(table):
        table[:, rows] = (targets[:, rows] @ tokens.transpose(1, 2) / temperature).softmax(-1) / count
    return table


@torch.no_grad()
def max_coverage(table: Tensor, k: int, last: Tensor | None = None) -> Tensor:
    """Greedy facility location: `k` tokens per visual in the order they are picked, [U, k] int64.

    table [U, R, N], at least 0: how well token n covers target r. A target is covered as well as by its best token, and
    each pick adds most to the sum over targets (monotone submodular, so at least 1 - 1/e of the best possible sum).
    last [U, N] bool, optional: tokens to take only when all others are taken, by index. No token twice; ties go to the
    lower index. Cost k R N; memory one block of rows beside the table.
    """
    best = table.new_zeros(table.shape[:2])
    taken = torch.zeros(len(table), table.shape[2], dtype=torch.bool, device=table.device)
    picks: list[Tensor] = []
    for _ in range(k):
        gain = table.new_zeros(taken.shape)
        for rows in _blocks(table):
            gain += (table[:, rows] - best[:, rows, None]).relu_().sum(1)
        if last is not None:
            gain.masked_fill_(last, -1.0)
        picks.append(argmax_first(gain.masked_fill_(taken, float("-inf"))))
        at = picks[-1][:, None]
        taken.scatter_(1, at, True)
        best = torch.maximum(best, table.gather(2, at[..., None].expand(-1, table.shape[1], 1))[..., 0])
    return torch.stack(picks, 1)
