# SPDX-License-Identifier: Apache-2.0
"""Attention pooling with a set of queries and nothing else."""

from __future__ import annotations

from torch import Tensor


def latent_pool(queries: Tensor, features: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Each query attends once over all tokens, which are keys and values: (latents [U, C, D], weights [U, C, N]), float32.

    queries [C, D] or [U, C, D], features [U, N, D]. One head, no projections; `scale` multiplies the logits. Cost 2 C N D.
    """
    features = features.float()
    weights = (queries.float() * scale @ features.transpose(1, 2)).softmax(-1)
    return weights @ features, weights
