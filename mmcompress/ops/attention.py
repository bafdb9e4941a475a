# SPDX-License-Identifier: Apache-2.0
"""Attention statistics without the attention map: only the rows or columns that are asked for, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """Softmax attention of a few queries, [n, heads, Q, S], float32.

    q [n, heads, Q, d]; k [n, kv_heads, S, d] (repeated for grouped queries); mask, optional: boolean (True = visible) or
    additive, broadcastable to [n, heads, Q, S]. Cost Q * S * d per head.
    """
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.transpose(2, 3)).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
    return scores.softmax(-1)


def attention_received(
    q: Tensor, k: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False, block: int = 256
) -> Tensor:
    """Attention that each key receives: mean over queries and heads, [n, S], float32.

    Shapes as in `attention_rows`, with `mask` [n, 1, 1, S] over keys; `causal` needs as many queries as keys. Boolean
    masks also leave their hidden positions out as queries. Never holds more than `block` rows of the attention map.
    """
    queries = q.shape[2]
    device = q.device
    seen = mask[:, 0, 0] if mask is not None and mask.dtype == torch.bool else None
    total = torch.zeros(k.shape[0], k.shape[2], device=device)
    for first in range(0, queries, block):
        rows = slice(first, min(first + block, queries))
        visible = mask
        if causal:
            at = torch.arange(rows.start, rows.stop, device=device)
            visible = (torch.arange(k.shape[2], device=device) <= at[:, None])[None, None]
            visible = visible & mask if mask is not None else visible
        part = attention_rows(q[:, :, rows], k, scale, visible).mean(1)
        if seen is not None:
            part = part.masked_fill(~seen[:, rows, None], 0.0)
        total = total + part.sum(1)
    count = seen.sum(1, keepdim=True) if seen is not None else queries
    return total / count


def proportional_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """What ToMe adds to the logits of a key that stands for `size` [n, T] patches: log(size) as [n, 1, 1, T]."""
    return size.float().log().to(dtype)[:, None, None, :]
