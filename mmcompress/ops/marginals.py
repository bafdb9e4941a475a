# SPDX-License-Identifier: Apache-2.0
"""Row and column means of an attention map between patches, of all of it or of the rows that matter."""

from __future__ import annotations

import torch
from torch import Tensor

from .attention import attention_rows


def attention_marginals(
    q: Tensor, k: Tensor, scale: float, prefix: int = 0, softmax: bool = True, block: int = 256
) -> tuple[Tensor, Tensor]:
    """Attention that each patch receives and gives: means over the patches on the other side and over heads, float32.

    q, k [n, heads, T, d], of which the first `prefix` tokens are no patches: two tensors [n, T - prefix]. With `softmax`
    the softmax runs over all T keys before the other tokens are left out; never more than `block` rows of it are held.
    Without, the map is that of the logits, whose means need no map: cost heads * T * d.
    """
    if not softmax:
        q, k = q[:, :, prefix:].float(), k[:, :, prefix:].float()
        received = (k @ q.mean(2)[..., None])[..., 0].mean(1) * scale
        given = (q @ k.mean(2)[..., None])[..., 0].mean(1) * scale
        return received, given
    patches = q.shape[2] - prefix
    total, parts = torch.zeros(k.shape[0], patches, device=k.device), []
    for first in range(prefix, q.shape[2], block):
        part = attention_rows(q[:, :, first : first + block], k, scale).mean(1)[..., prefix:]
        total = total + part.sum(1)
        parts.append(part.mean(2))
    return total / patches, torch.cat(parts, 1)


def hubs(received: Tensor, threshold: float) -> Tensor:
    """Which patches receive more than `threshold` times the mean of `received` [n, P], [n, P] bool; all of them in a row where
    none does."""
    found = received > threshold * received.mean(1, keepdim=True)
    return found | ~found.any(1, keepdim=True)


def hub_attention(q: Tensor, k: Tensor, scale: float, threshold: float, prefix: int = 0, block: int = 256) -> Tensor:
    """Attention that the hubs give to each patch, mean over hubs and heads, [n, T - prefix] float32.

    Hubs are the patches that receive more than `threshold` times what a patch receives on average (`hubs`). Arguments as in
    `attention_marginals`. The map is gone over twice, never more than `block` rows of it are held.
    """
    received, _ = attention_marginals(q, k, scale, prefix, block=block)
    asked = hubs(received, threshold).float()
    total = torch.zeros_like(received)
    for first in range(prefix, q.shape[2], block):
        part = attention_rows(q[:, :, first : first + block], k, scale).mean(1)[..., prefix:]
        total = total + (asked[:, None, first - prefix : first - prefix + block] @ part)[:, 0]
    return total / asked.sum(1, keepdim=True)
