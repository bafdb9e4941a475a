# SPDX-License-Identifier: Apache-2.0
"""Row and column means of an attention map between patches, of all of it or of the rows that matter."""

from __future__ import annotations

from torch import Tensor

from ..kernels import attention


def attention_marginals(
    q: Tensor, k: Tensor, scale: float, prefix: int = 0, softmax: bool = True
) -> tuple[Tensor, Tensor]:
    """Attention that each patch receives and gives: means over the patches on the other side and over heads, float32.

    q, k [n, heads, T, d], of which the first `prefix` tokens are no patches: two tensors [n, T - prefix]. With `softmax`
    the softmax runs over all T keys before the other tokens are left out: cost heads * T^2 * d, memory heads * T. Without,
    the map is that of the logits, whose means need no map: cost heads * T * d.
    """
    if not softmax:
        q, k = q[:, :, prefix:].float(), k[:, :, prefix:].float()
        received = (k @ q.mean(2)[..., None])[..., 0].mean(1) * scale
        given = (q @ k.mean(2)[..., None])[..., 0].mean(1) * scale
        return received, given
    received, given = attention.attention_marginals(q[:, :, prefix:], k, scale, prefix)
    return received, given / max(1, q.shape[2] - prefix)


def hubs(received: Tensor, threshold: float) -> Tensor:
    """Which patches receive more than `threshold` times the mean of `received` [n, P], [n, P] bool; all of them in a row where
    none does."""
    found = received > threshold * received.mean(1, keepdim=True)
    return found | ~found.any(1, keepdim=True)


def hub_attention(q: Tensor, k: Tensor, scale: float, threshold: float, prefix: int = 0) -> Tensor:
    """Attention that the hubs give to each patch, mean over hubs and heads, [n, T - prefix] float32.

    Hubs are the patches that receive more than `threshold` times what a patch receives on average (`hubs`). Arguments as in
    `attention_marginals`. The map is gone over twice.
    """
    q = q[:, :, prefix:] if prefix else q

    def asked(received: Tensor) -> Tensor:
        return hubs(received[:, prefix:] if prefix else received, threshold)

    found = attention.attention_received_from(q, k, scale, asked)
    return found[:, prefix:] if prefix else found
