# SPDX-License-Identifier: Apache-2.0
"""In which type numbers are compared."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor, *like: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it or one of the others has that: no comparison is narrower than what it compares."""
    return x.to(torch.float64 if torch.float64 in {one.dtype for one in (x, *like)} else torch.float32)


def normalized(x: Tensor, *like: Tensor) -> Tensor:
    """The rows of `x` [..., D] at length 1, `wide` with the others; zero vectors stay. `F.normalize` bit by bit, in fewer calls."""
    x = wide(x, *like)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
