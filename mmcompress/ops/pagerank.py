# SPDX-License-Identifier: Apache-2.0
"""Importance that flows along attention."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.attention import attention_flow


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
    if valid is None:
        share = torch.full((len(q), q.shape[1], tokens), 1 / tokens, device=device)
    else:
        share = ((1 / valid.sum(1))[:, None] * valid)[:, None].expand(-1, q.shape[1], -1)
    share = attention_flow(q, k, scale / temperature, share, iterations, key_mask=valid, causal=causal)
    return share.square().mean(1).sqrt()
