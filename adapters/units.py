# SPDX-License-Identifier: Apache-2.0
"""Square units of patches that make one token: their order, their features side by side, and a projector that takes whole views."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def unit_order(patches: int, factor: int) -> Tensor:
    """The patches of a square view, given row by row, in an order in which `factor` x `factor` neighbours follow each other."""
    side = math.isqrt(patches) // factor
    return torch.arange(patches).view(side, factor, side, factor).permute(0, 2, 1, 3).flatten()


def side_by_side(patches: Tensor, factor: int) -> Tensor:
    """Patches [n, P, C] of square views as units [n, P / factor^2, factor^2 * C]."""
    order = unit_order(patches.shape[1], factor).to(patches.device, non_blocking=True)
    return patches[:, order].unflatten(1, (-1, factor**2)).flatten(2)


def through(projector: Any, units: Tensor, factor: int, each: int) -> Tensor:
    """What a projector that fuses the patches of square views of `each` units makes of units [U, m, factor^2 * C]: [U, m, D]."""
    flat = units.flatten(0, 1)
    views = torch.cat([flat, flat.new_zeros(-len(flat) % each, flat.shape[1])]).unflatten(0, (-1, each))
    back = unit_order(each * factor**2, factor).argsort().to(units.device, non_blocking=True)
    made = projector(views.unflatten(2, (factor**2, -1)).flatten(1, 2)[:, back])
    return made.reshape(len(views) * each, -1)[: len(flat)].unflatten(0, units.shape[:2])
