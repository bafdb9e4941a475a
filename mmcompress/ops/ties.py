# SPDX-License-Identifier: Apache-2.0
"""Reductions with a defined answer where values are equal."""

from __future__ import annotations

import torch
from torch import Tensor


def argmax_first(x: Tensor) -> Tensor:
    """Index of the maximum along the last dimension, the lowest one of equals: what `torch.argmax` promises."""
    return x.argmax(-1)


def largest(x: Tensor, count: Tensor, among: Tensor | None = None) -> Tensor:
    """Mask [B, n] of the `count` [B, 1] largest values of each row of `x` [B, n], where given of those in the mask `among`; the
    lower index first of equals. All of them where `count` is more."""
    within = x if among is None else x.masked_fill(~among, float("-inf"))
    order = within.sort(dim=1, descending=True, stable=True).indices
    first = torch.arange(x.shape[1], device=x.device) < count
    mask = torch.zeros_like(first).scatter(1, order, first)
    return mask if among is None else mask & among
