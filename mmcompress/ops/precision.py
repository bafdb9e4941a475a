# SPDX-License-Identifier: Apache-2.0
"""In which type numbers are compared."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def wide(x: Tensor, *like: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it or one of the others has that: no comparison is narrower than what it compares."""
    return x.to(functools.reduce(torch.promote_types, (one.dtype for one in (x, *like)), torch.float32))
