# SPDX-License-Identifier: Apache-2.0
"""Checks of what several operations take: masks, and segments of packed rows."""

from __future__ import annotations

import torch
from torch import Tensor


def check_mask(name: str, mask: Tensor | None, x: Tensor) -> None:
    """A mask of the rows of `x` [..., D]: bool, on the same device."""
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1] or mask.device != x.device):
        raise ValueError(
            f"{name} is {mask.dtype} {tuple(mask.shape)} on {mask.device}; give bool {tuple(x.shape[:-1])} on {x.device}"
        )


def check_segments(name: str, cu_seqlens: Tensor, x: Tensor) -> None:
    """Segments of the packed rows of `x` [total, D]. Their values are only looked at on the CPU, where that waits for nothing."""
    whole = cu_seqlens.dtype in (torch.int32, torch.int64)
    if not whole or cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.device != x.device:
        raise ValueError(
            f"{name} is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)} on {cu_seqlens.device}; give int32 or int64 [S + 1], where "
            f"each segment begins and the last one ends, on {x.device}"
        )
    if cu_seqlens.device.type == "cpu":
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] > len(x) or ends != sorted(ends):
            raise ValueError(f"{name}={ends}: give rising numbers from 0 to at most {len(x)}, the number of rows")
