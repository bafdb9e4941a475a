# SPDX-License-Identifier: Apache-2.0
"""Tokens that take in those around them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.gather import gather
from .precision import normalized

_ELEMENTS = 1 << 22
"""Largest number of similarities that are held at a time."""


def take_in(
    x: Tensor,
    weight: Tensor,
    keys: Tensor,
    own: Tensor,
    is_centre: Tensor,
    neighbours: int,
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Each centre plus the weighted sum of its neighbours, then the weighted sum of all that is not in `own`: [B, c + 1, C];
    and which of these rows each token went into, [B, n]: of several centres the one that likes it best.

    x [B, n, C], weight [B, n], keys [B, n, d]; own [B, c]: the tokens of the first c rows; is_centre [B, c]: which of them are
    centres, the others stay as they are and are nobody's neighbours. A centre likes others by cosine of keys plus their
    `bonus` [B, n], other centres included, and takes in the first `neighbours`; one token may go to several centres. Ties to
    the lower index; rows in the type of `x`. Cost n c (d + C) and a sort, in blocks.
    """
    (batch, n), count = weight.shape, own.shape[1]
    values, unit = x.float(), normalized(keys.detach())
    free = torch.ones_like(weight, dtype=torch.bool).scatter(1, own, is_centre)
    into = best = torch.full_like(weight, count, dtype=torch.int64)
    rows, step, across = [], max(1, _ELEMENTS // (batch * n)), unit.transpose(1, 2)
    for first in range(0, count, step):
        mine, centre = own[:, first : first + step], is_centre[:, first : first + step, None]
        can = (free[:, None] & centre).scatter(2, mine[..., None], False)
        liking = torch.bmm(gather(unit, mine), across)
        if bonus is not None:
            liking = liking + bonus[:, None]
        liking = liking.masked_fill(~can, float("-inf"))
        order = liking.sort(dim=2, descending=True, stable=True).indices
        near = torch.zeros_like(can).scatter(2, order[..., :neighbours], True) & can
        rows.append(gather(values, mine) + torch.bmm(near * weight[:, None], values))
        most, which = liking.masked_fill(~near, float("-inf")).max(1)  # the first of equals
        into = torch.where(most > (best if first else float("-inf")), which + first if first else which, into)
        best = torch.maximum(best, most) if first else most
    rows.append(torch.bmm(weight.scatter(1, own, 0.0)[:, None], values))
    place = torch.arange(count, device=own.device).expand_as(own)
    return torch.cat(rows, 1).to(x.dtype), into.scatter(1, own, place)
