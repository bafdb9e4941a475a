# SPDX-License-Identifier: Apache-2.0
"""Checks of what several operations take: masks, and segments of packed rows."""

from __future__ import annotations

from itertools import pairwise

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


def check_rows(x: Tensor, cu_seqlens: Tensor | None) -> None:
    """Rows of features: [B, n, D], or [total, D] where they are packed."""
    if not x.is_floating_point() or x.dim() != (3 if cu_seqlens is None else 2):
        wanted = "[B, n, D]" if cu_seqlens is None else "[total, D] with cu_seqlens"
        raise ValueError(f"features are {x.dtype} {tuple(x.shape)}; give floating-point numbers, {wanted}")


def segments(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    """First row and one past the last of every segment, on the host."""
    ends = cu_seqlens.tolist()
    return list(pairwise(ends))


def padded(x: Tensor, cu_seqlens: Tensor, longest: int | None) -> tuple[Tensor, Tensor]:
    """Packed rows [total, ...] as [S, longest, ...], and which of them are real. Without `longest` it waits for the device."""
    begin, length = cu_seqlens[:-1].long(), cu_seqlens.diff()
    if longest is None:
        longest = max(length.tolist(), default=0)
    place = torch.arange(longest, device=x.device)
    at = (begin[:, None] + place).clamp_max(max(0, len(x) - 1))
    rows = x[at] if len(x) else x.new_zeros(len(begin), longest, *x.shape[1:])
    return rows, place < length[:, None]


def packed(y: Tensor, cu_seqlens: Tensor, total: int, fill: float) -> Tensor:
    """The real ones of the rows `y` [S, longest], packed again: [total], `fill` behind the last segment."""
    if not y.numel():
        return y.new_full((total,), fill)
    row = torch.arange(total, device=y.device)
    segment = (torch.searchsorted(cu_seqlens.long(), row, right=True) - 1).clamp(0, len(y) - 1)
    place = (row - cu_seqlens[segment]).clamp_max(y.shape[1] - 1)
    return y[segment, place].masked_fill_(row >= cu_seqlens[-1], fill)
