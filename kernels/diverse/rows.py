# SPDX-License-Identifier: Apache-2.0
"""Unit rows made when they are asked for, and the one that is farthest from all others, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

ROUND = 128
"""Tokens whose similarities to others are computed at a time."""
_BLOCK = 2**21
"""Numbers in a block of rows."""


class UnitRows:
    """The rows of `x` [N, D] at length 1 in float32, zero where they are zero; no copy of all of them is held."""

    def __init__(self, x: Tensor) -> None:
        self.x, (self.count, self.width) = x, x.shape
        self.step = max(ROUND, _BLOCK // max(1, self.width))
        blocks = [torch.linalg.vector_norm(block.float(), dim=-1) for block in x.split(self.step)]
        length = torch.cat(blocks)
        self.length = length.clamp_min(1e-12)[:, None]
        self.own_part = (length / self.length[:, 0]).square_().nan_to_num_(0)  # as in naive.py

    def take(self, index: Tensor) -> Tensor:
        return self.x.index_select(0, index).float().div_(self.length.index_select(0, index))


def loneliest(rows: UnitRows) -> int:
    """The token whose most similar other token is the least similar of all, the lowest one of equals.

    A similarity counts for both of its tokens, and the largest one a token has met so far is a lower bound: with that
    above the best known result the token is out, most of them after few similarities. At worst, where no bound decides,
    half of N x N are computed.
    """
    near = torch.full((rows.count,), float("-inf"))  # the largest similarity met
    token = torch.arange(rows.count)
    met_all, met_open = (torch.zeros(rows.count, dtype=torch.bool) for _ in range(2))

    def meet(some: Tensor, others: Tensor) -> None:
        if not len(others):
            return
        mine = rows.take(some)
        place = torch.searchsorted(others, some)
        itself = others[place.clamp_max(len(others) - 1)] == some
        for first in range(0, len(others), rows.step):
            block = others[first : first + rows.step]
            similar = mine @ rows.take(block).T
            here = itself & (place >= first) & (place < first + len(block))
            similar[here, place[here] - first] = float("-inf")
            near[block] = torch.maximum(near[block], similar.amax(0))
            near[some] = torch.maximum(near[some], similar.amax(1))

    some = token[:: -(-rows.count // ROUND)].contiguous()
    meet(some, token)
    met_all[some] = True
    second = True
    while True:
        result = near.masked_fill(~met_all, float("inf"))
        best = int(result.numpy().argmin())
        open_ = ~met_all & ((near < near[best]) | ((near == near[best]) & (token < best)))
        if not open_.any():
            return best
        fresh = open_ & ~met_open
        if second or not fresh.any():  # a good result first, which decides for most; at last what is left
            among, others = open_, ~met_all if second else ~(met_all | open_)
        else:
            among = others = fresh
        index = token[among]
        some = index[near[index].topk(min(ROUND, len(index)), largest=False).indices].sort().values
        meet(some, token[others])
        (met_open if others is fresh else met_all)[some] = True
        second = False
