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
    output = assign if rows == 1 else assign + torch.arange(rows, device=assign.device)[:, None] * count
    output = output.masked_fill(assign < 0, outputs).flatten()
    if output.device.type != "cpu":
        order = output.argsort(stable=True)
        return order, torch.searchsorted(output[order], torch.arange(outputs + 1, device=assign.device))
    if outputs < 1 << 16:  # NumPy sorts short integers by digits, several times as fast
        order = torch.from_numpy(np.argsort(output.numpy().astype(np.uint16), kind="stable"))
    else:
        order = output.argsort(stable=True)
    sizes = torch.bincount(output, minlength=outputs + 1)
    return order, sizes.cumsum(0).sub_(sizes)
