# SPDX-License-Identifier: Apache-2.0
"""How much a sub-module of the language model changes a token."""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import wide

_ROUNDING = 1e-8
"""No length is taken for less in a cosine, as in `F.cosine_similarity`."""


def transition(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Change of length and direction of each token [..., S, D]: (|after| / |before|, cosine), both [..., S] float32."""
    before, after = wide(before, after), wide(after, before)
    short, long = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) for x in (before, after))
    cosine = ((before / short.clamp_min(_ROUNDING)) * (after / long.clamp_min(_ROUNDING))).sum(-1)
    return (long / short.clamp_min(1e-12))[..., 0], cosine


def transition_value(length: Tensor, cosine: Tensor, valid: Tensor | None = None, absolute: bool = False) -> Tensor:
    """Token transition variation of one sub-module, [..., S]: length times the share of a token in all turns exp(1 - cosine)
    of its row.

    length, cosine [..., S] as `transition` gives them; valid [..., S] bool: padding has no part in the sum. `absolute`: the
    turn is exp(1 - |cosine|), as TransPrune's paper writes it (its code does not).
    """
    turn = torch.exp(1 - (cosine.abs() if absolute else cosine))
    if valid is not None:
        turn = turn.masked_fill(~valid, 0.0)
    return length * turn / turn.sum(-1, keepdim=True)
