# SPDX-License-Identifier: Apache-2.0
"""Focus: the attention that a text token pays to the image through the text tokens that it attends to."""

from __future__ import annotations

import torch
from torch import Tensor


def focus(to_text: Tensor, to_image: Tensor, first: Tensor | None = None) -> Tensor:
    """Image attention of each text token, handed on along the attention between text tokens, [B, Q, I] float32.

    to_text [B, Q, T]: attention of Q text tokens on T text tokens (themselves included); to_image [B, T, I]: attention of those
    on image tokens. first [B, T] bool, optional: text tokens that soak up attention (the first one); they are left out and
    the rows brought back to the sum 1.
    """
    to_text = to_text.float()
    if first is not None:
        to_text = to_text.masked_fill(first[:, None], 0.0)
        to_text = to_text / to_text.sum(-1, keepdim=True).clamp_min(torch.finfo(to_text.dtype).tiny)
    return to_text @ to_image.float()


def unfocused(values: Tensor, image: Tensor, rho: float) -> Tensor:
    """All but the `ceil(rho * I)` largest of each row, [B, Q, K] bool; ties keep the lower column.

    values [B, Q, K]; image [B, K] bool: the I columns of each sample that are ranked, the others are False in the result.
    """
    image = image[:, None]
    kept = (rho * image.sum(-1, keepdim=True).double()).ceil()
    order = values.masked_fill(~image, float("-inf")).sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(values.shape[-1], device=values.device).expand_as(order)
    return image & (torch.zeros_like(order).scatter(-1, order, place) >= kept)


def inhibit(weights: Tensor, inhibited: Tensor) -> Tensor:
    """Softmax attention [B, heads, Q, K] as if the pairs `inhibited` [B, Q, K] had been masked before the softmax. A row in which
    nothing is left stays as it is."""
    left = weights.masked_fill(inhibited[:, None], 0.0)
    total = left.sum(-1, keepdim=True)
    return torch.where(total > 0, left / total.clamp_min(torch.finfo(total.dtype).tiny), weights)
