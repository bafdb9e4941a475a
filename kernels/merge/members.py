# SPDX-License-Identifier: Apache-2.0
"""Tokens in the order of their outputs."""

from __future__ import annotations

import torch
from torch import Tensor


def members(assign: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots of all rows of `assign` [U, N], counted through, sorted by output and then by slot, [U N] int64 (those that are
    gone come last), and where each output begins among them, [U count + 1] int64. Nothing waits for the device."""
    rows, outputs = len(assign), len(assign) * count
    first = torch.arange(rows, device=assign.device)[:, None] * count
    ordered, order = torch.where(assign < 0, outputs, assign + first).flatten().sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(outputs + 1, device=assign.device))
