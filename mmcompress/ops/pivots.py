# SPDX-License-Identifier: Apache-2.0
"""Tokens that are unlike given ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .precision import normalized


def least_similar(x: Tensor, pivots: Tensor, taken: Tensor, counts: Sequence[int]) -> Tensor:
    """For one pivot after the other the tokens with the lowest cosine to it that are still there, [U, sum(counts)] int64.

    x [U, N, D]: the tokens. pivots [U, P, D], in the order of their turns. taken [U, m]: places of tokens that are out from
    the start. counts: how many each pivot takes; all together at most N - m. Ties go to the lower token. Cost P N D.
    """
    unit = normalized(x, pivots)
    cosine = normalized(pivots, x) @ unit.transpose(1, 2)
    gone = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, taken, True)
    picks = [taken[:, :0]]
    for similarity, count in zip(cosine.unbind(1), counts, strict=True):
        pick = similarity.masked_fill(gone, float("inf")).sort(dim=1, stable=True).indices[:, :count]
        gone = gone.scatter(1, pick, True)
        picks.append(pick)
    return torch.cat(picks, 1)
