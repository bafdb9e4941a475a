# SPDX-License-Identifier: Apache-2.0
"""Reductions with a defined answer where values are equal."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax_first(x: Tensor) -> Tensor:
    """Index of the maximum along the last dimension, the lowest one of equals (`torch.argmax` leaves that open)."""
    index = torch.arange(x.shape[-1], device=x.device)
    return torch.where(x == x.amax(-1, keepdim=True), index, x.shape[-1]).amin(-1)
