# SPDX-License-Identifier: Apache-2.0
"""Greedy choices of different tokens on the CPU, from a table of cosines that is small: nothing is left but a few numbers to
work on per pick, and few calls."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from .naive import SPENT, own_part

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


def cosines(x: Tensor) -> Floats:
    """Of the tokens [N, D]: [N, N]."""
    unit = F.normalize(x[None].float(), dim=-1)
    table: Floats = (unit @ unit.transpose(1, 2))[0].numpy()
    return table


def max_min(x: Tensor, k: int, weight: Tensor | None, first: int | None, nearest: bool) -> tuple[Indices, Indices]:
    """`k` of the tokens [N, D], [k]; and the pick nearest to each, [N], if that is asked."""
    cosine = cosines(x)
    distance = 1 - cosine
    np.fill_diagonal(distance, np.inf)
    least, picks = np.full(len(x), 4, np.float32), np.empty(k, np.int64)  # more than any distance
    factor = None if weight is None else weight.float().numpy()
    picks[0] = distance.min(1).argmax() if first is None else first  # the first of equals
    for done in range(1, k):
        np.minimum(least, distance[picks[done - 1]], out=least)
        worth = least.copy() if factor is None else factor * least
        worth[picks[:done]] = -np.inf
        picks[done] = worth.argmax()
    owner = np.empty(len(x), np.int64)
    if nearest:
        order = np.sort(picks)
        owner = order[cosine[:, order].argmax(1)]
        owner[picks] = picks
    return picks, owner


def greedy_map(x: Tensor, worth: Floats, k: int) -> Indices:
    """`k` of the tokens [N, D] by `worth` [N], less where nothing is new any more."""
    cosine, left = cosines(x), own_part(x).numpy()
    factor, picks = np.empty((k, len(x)), np.float32), np.empty(k, np.int64)
    for done in range(k):
        left[picks[:done]] = 0
        new = left > SPENT
        if not new.any():
            return picks[:done]
        gain = np.log(left, out=np.full_like(left, -np.inf), where=new)
        pick = picks[done] = (gain + worth).argmax()
        factor[done] = (cosine[pick] - factor[:done, pick] @ factor[:done]) / np.sqrt(left[pick])
        left -= factor[done] ** 2
    return picks
