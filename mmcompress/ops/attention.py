# SPDX-License-Identifier: Apache-2.0
"""Attention statistics without the attention map, and what ToMe adds to attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attention import attention_received, attention_rows

__all__ = ["attention_received", "attention_rows", "capped_rows", "masked_softmax", "proportional_bias"]


def proportional_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """What ToMe adds to the logits of a key that stands for `size` [n, T] patches: log(size) as [n, 1, 1, T]."""
    return size.float().log().to(dtype)[:, None, None, :]


def masked_softmax(
    logits: Tensor,
    seen: Tensor,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax of logits [B, heads, q, K] over the keys that are `seen`; it has a gradient.

    softcap: logits l become softcap * tanh(l / softcap). sinks [heads]: logits of a key that is nothing, and takes a share. bias,
    broadcastable to the logits: added behind the cap.
    """
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if bias is not None:
        logits = logits + bias
    logits = logits.masked_fill(~seen, torch.finfo(logits.dtype).min)  # -inf: NaN in rows of padding
    if sinks is None:
        return logits.softmax(-1)
    column = sinks.to(logits)[None, :, None, None].expand(*logits.shape[:-1], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1]


def capped_rows(
    q: Tensor,
    k: Tensor,
    scale: float,
    mask: Tensor | None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`attention_rows` with soft-capped logits or sinks: [n, heads, Q, S] float32, the map as a whole. `mask`: None where all is
    seen; `bias`: of keys."""
    if softcap is None and sinks is None:
        if mask is not None and bias is not None:
            mask, bias = torch.where(mask, bias, float("-inf")), None
        return attention_rows(q, k, scale, bias if mask is None else mask)
    if mask is None:
        mask = torch.ones(1, dtype=torch.bool, device=q.device)
    grouped = q.float().unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    logits = (grouped @ k.float().transpose(2, 3) * scale).unflatten(2, (-1, q.shape[2])).flatten(1, 2)
    return masked_softmax(logits, mask, softcap, sinks, bias).masked_fill(~mask, 0)
