# SPDX-License-Identifier: Apache-2.0
"""Importance that flows along attention."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention_rows


def attention_pagerank(
    q: Tensor,
    k: Tensor,
    scale: float,
    valid: Tensor | None = None,
    causal: bool = True,
    temperature: float = 0.1,
    iterations: int = 5,
    block: int = 256,
) -> Tensor:
    """What each token has after importance has flowed `iterations` times from queries to keys, [n, S] float32.

    Per head it starts at 1/S everywhere and flows along softmax(logits / temperature), without damping; the result is the root
    mean square over heads. q [n, heads, S, d]; k [n, kv_heads, S, d]; valid [n, S] bool: padding has no part.
    Never holds more than `block` rows of the map; cost iterations * heads * S^2 * d.
    """
    tokens, device = q.shape[2], q.device
    count = valid.sum(1) if valid is not None else torch.full((len(q),), tokens, device=device)
    share = (1 / count)[:, None, None].expand(-1, q.shape[1], tokens).float()
    if valid is not None:
        share = share * valid[:, None]
    for _ in range(iterations):
        flowed = torch.zeros_like(share)
        for first in range(0, tokens, block):
            rows = slice(first, min(first + block, tokens))
            visible = valid[:, None, None] if valid is not None else None
            if causal:
                at = torch.arange(rows.start, rows.stop, device=device)
                before = (torch.arange(tokens, device=device) <= at[:, None])[None, None]
                visible = before if visible is None else before & visible
            part = attention_rows(q[:, :, rows], k, scale / temperature, visible)
            mine = share[:, :, rows, None]
            if valid is not None:  # rows of padding see nothing: their softmax is not a number
                part = part.masked_fill(~valid[:, None, rows, None], 0.0)
            flowed = flowed + (mine * part).sum(2)
        share = flowed
    return share.square().mean(1).sqrt()
