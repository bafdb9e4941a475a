# SPDX-License-Identifier: Apache-2.0
"""How much each token has to do with a text."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .precision import normalized, wide


def mean_cosine(tokens: Tensor, text: Tensor) -> Tensor:
    """Mean cosine of every token to all rows of a text, [U, N] float32; 0 where there is no text.

    tokens [U, N, D], text [U, T, D] in the same space. A zero vector has cosine 0. Cost O((N + T) D).
    """
    direction = normalized(text, tokens).sum(1) / max(1, text.shape[1])
    return (normalized(tokens, text) @ direction[..., None])[..., 0]


def direction(rows: Tensor) -> Tensor:
    """Where the vectors `rows` [M, D] point together: the mean of them at unit length, at unit length, [D] float32."""
    return F.normalize(normalized(rows).mean(0), dim=-1)


def mean_of_patches(features: Tensor, patches: int) -> Tensor:
    """Encoder features [U, N, patches * C] with the patches of a token side by side as their mean, [U, N, C] float32."""
    if features.shape[-1] % patches:
        raise ValueError(
            f"patches={patches}: encoder features of width {features.shape[-1]} are not made of that many patches; "
            f"patches=1 compares them as they are"
        )
    rows = wide(features)
    return rows if patches == 1 else rows.unflatten(-1, (patches, -1)).mean(-2)


def text_relevance(visual: Tensor, text: Tensor) -> Tensor:
    """How much each text token is meant by the visual ones, [U, T] float32: softmax over the text of the plain dot products, mean
    over the visual tokens. visual [U, N, D]; text [U, T, D]; cost N T D."""
    return (wide(visual, text) @ wide(text, visual).transpose(1, 2)).softmax(-1).mean(1)
