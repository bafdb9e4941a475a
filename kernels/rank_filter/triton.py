# SPDX-License-Identifier: Apache-2.0
"""The rank-Gaussian filter in one launch: a program sorts the windows of some cells in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import config
from .naive import reflected


@triton.jit
def _kernel(
    X, V, OUT, ROWS, COLUMNS, v_b, cells, height, width,
    KERNEL: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = cell < cells
    batch, y, x = cell // (height * width), cell // width % height, cell % width
    rank = tl.arange(0, PLACES)[None, :]
    inside = there[:, None] & (rank < KERNEL * KERNEL)
    row = tl.load(ROWS + y[:, None] + rank // KERNEL, mask=inside, other=0)
    column = tl.load(COLUMNS + x[:, None] + rank % KERNEL, mask=inside, other=0)
    at = row * width + column
    value = tl.load(X + batch[:, None] * height * width + at, mask=inside, other=float("inf"))
    if MASKED:
        inside = inside & (tl.load(V + batch[:, None] * v_b + at, mask=inside, other=0) != 0)
    ordered = tl.sort(tl.where(inside, value, float("inf")), dim=1)
    count = tl.sum(inside.to(tl.int32), 1)[:, None]
    inside = rank < count
    ordered = tl.where(inside, ordered, 0)
    size = tl.maximum(count, 1).to(tl.float32)
    mean = tl.sum(ordered, 1)[:, None] / size
    relative = tl.where(inside, ordered / tl.where(mean > 0, mean, 1) - 1, 0)
    variance = tl.sum(relative * relative, 1)[:, None] / size
    far = rank - (count - 1) / 2.0
    far = far * far - tl.where(count % 2 == 0, 0.25, 0.0)
    gauss = tl.where(inside, tl.exp(-0.5 * far / tl.maximum(variance, 1e-30)), 0)
    found = tl.sum(gauss * ordered, 1) / tl.maximum(tl.sum(gauss, 1), 1e-30)
    found = tl.where(tl.sum(ordered, 1) / tl.maximum(tl.sum(inside.to(tl.int32), 1), 1) > 0, found, 0)
    tl.store(OUT + cell, found, mask=there)


def rank_filter(maps: Tensor, kernel: int, valid: Tensor | None) -> Tensor:
    """maps [B, H, W] float32, valid [B or 1, H, W] bool."""
    _, height, width = maps.shape
    found = torch.empty_like(maps)
    if not maps.numel():
        return found
    rows, columns = (reflected(n, kernel // 2, maps.device) for n in (height, width))
    mask = maps if valid is None else valid.contiguous().view(torch.uint8)
    table = config("rank_filter", maps.device)
    _kernel[(triton.cdiv(maps.numel(), table["cells"]),)](
        maps, mask, found, rows, columns, 0 if len(mask) == 1 else height * width, maps.numel(), height, width,
        KERNEL=kernel, MASKED=valid is not None, BLOCK=table["cells"], PLACES=triton.next_power_of_2(kernel**2),
        num_warps=table["num_warps"],
    )  # fmt: skip
    return found
