# SPDX-License-Identifier: Apache-2.0
"""Tokens in the order of their outputs."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def members(assign: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots of all rows of `assign` [U, N], counted through, sorted by output and then by slot, [U N] int64 (those that are
    gone come last), and where each output begins among them, [U count + 1] int64. Nothing waits for the device."""
    rows, outputs = len(assign), len(assign) * count
    if assign.device.type == "cpu":
        numbers = assign.numpy()
        output = np.where(numbers < 0, outputs, numbers + np.arange(rows)[:, None] * count).ravel()
        # NumPy sorts short integers by digits, several times as fast
        order = np.argsort(output.astype(np.uint16) if outputs < 1 << 16 else output, kind="stable")
        ends = np.bincount(output, minlength=outputs + 1).cumsum()
        return torch.from_numpy(order), torch.from_numpy(np.concatenate([[0], ends[:-1]]))
    output = assign if rows == 1 else assign + torch.arange(rows, device=assign.device)[:, None] * count
    output = output.masked_fill(assign < 0, outputs).flatten()
    order = output.argsort(stable=True)
    return order, torch.searchsorted(output[order], torch.arange(outputs + 1, device=assign.device))
