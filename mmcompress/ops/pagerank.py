# SPDX-License-Identifier: Apache-2.0
"""Importance that flows along attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention_received


def attention_pagerank(
    q: Tensor,
    k: Tensor,
    scale: float,
    valid: Tensor | None = None,
    causal: bool = True,
    temperature: float = 0.1,
    iterations: int = 5,
) -> Tensor:
    """What each token has after importance has flowed `iterations` times from queries to keys, [n, S] float32.

    Per head it starts at 1/S everywhere and flows along softmax(logits / temperature), without damping; the result is the root
    mean square over heads. q [n, heads, S, d]; k [n, kv_heads, S, d]; valid [n, S] bool: padding has no part.
    Cost iterations * heads * S^2 * d, memory heads * S.
    """
    tokens, device = q.shape[2], q.device
    count = valid.sum(1) if valid is not None else torch.full((len(q),), tokens, device=device)
    share = (1 / count)[:, None, None].expand(-1, q.shape[1], tokens).float()
    if valid is not None:
        share = share * valid[:, None]
    for _ in range(iterations):
        share = attention_received(
            q, k, scale / temperature, reduce="sum", query_weight=share, key_mask=valid, causal=causal, per_head=True
        )
    return share.square().mean(1).sqrt()
