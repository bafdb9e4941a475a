# SPDX-License-Identifier: Apache-2.0
"""Features without their common direction, and how untypical each is."""

from __future__ import annotations

from torch import Tensor

from .precision import normalized, wide

_ROUNDING = 1e-6
"""A token of which no larger part than this is left without the mean is the mean, and has no direction of its own."""


def centred(x: Tensor) -> Tensor:
    """`x` [U, N, D] less the mean of its tokens, at least float32; zero where that leaves only rounding."""
    x = wide(x)
    rest = x - x.mean(1, keepdim=True)
    nothing = rest.norm(dim=-1, keepdim=True) <= _ROUNDING * x.norm(dim=-1, keepdim=True)
    return rest.masked_fill(nothing, 0)


def distinctiveness(x: Tensor) -> Tensor:
    """How little a token is like the others: minus its mean cosine to them, brought to (0, 1] per visual, [U, N] float32.

    x [U, N, D]. 1 for all where all are alike. Cost N D, no N x N.
    """
    unit = normalized(x)
    own = unit.square().sum(-1)
    rare = (own - (unit @ unit.sum(1)[..., None])[..., 0]) / max(1, x.shape[1] - 1)
    low, high = rare.amin(1, keepdim=True), rare.amax(1, keepdim=True)
    alike = high - low < 10 * _ROUNDING
    scaled = (rare - low + 1e-6) / (high - low).masked_fill(alike, 1)
    return scaled.masked_fill(alike, 1).clamp_max(1)
