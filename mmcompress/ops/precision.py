# SPDX-License-Identifier: Apache-2.0
"""In which type numbers are compared."""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor, *like: Tensor) -> Tensor:
    """`x` in float32, or in float64 where it or one of the others has that: no comparison is narrower than what it compares."""
    return x.to(torch.float64 if torch.float64 in {one.dtype for one in (x, *like)} else torch.float32)
