# SPDX-License-Identifier: Apache-2.0
"""Row and column means of an attention map between patches."""

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
