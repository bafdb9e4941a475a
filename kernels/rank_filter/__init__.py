# SPDX-License-Identifier: Apache-2.0
"""The rank-Gaussian filter of token activation maps (Li et al., "Token Activation Map", ICCV 2025, arXiv 2506.23270)."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from ..dispatch import choose


def rank_filter(maps: Tensor, kernel: int = 3, valid: Tensor | None = None, *, implementation: str = "auto") -> Tensor:
    """Every cell becomes the mean of its window, weighted by rank: robust as a median where a window varies little, near its mean
    where it varies much. Returns [..., H, W] float32.

    maps    [..., H, W] floating; every map is filtered on its own. Meant for values >= 0: where the mean of a window is not
            positive the result is 0.
    kernel  side of the window, odd. Maps are continued by reflection at their ends (an axis of length 1 by repetition).
    valid   [H, W] or as `maps`, bool: cells that are there. Only they take part, and ranks are those among them; what the others
            hold is not read. A cell gets a value where anything in its window is valid, be it valid itself or not, else 0.

    Of the m valid values v of a window in ascending order, with s their standard deviation over their mean:
    sum of g_i v_i, g_i ~ exp(-(i - (m - 1) / 2)^2 / (2 s^2)). A constant window stays as it is (the reference gives NaN).
    Cost per cell: sorting kernel^2 values; memory O(cells) and a block, "naive" kernel^2 maps. Inputs are detached.
    """
    if maps.dim() < 2 or not maps.is_floating_point() or 0 in maps.shape[-2:]:
        raise ValueError(
            f"maps of shape {tuple(maps.shape)} and type {maps.dtype}: they have to be [..., H, W], floating"
        )
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel}: the window has an odd number of cells to each side")
    x = maps.detach().float().reshape(-1, *maps.shape[-2:]).contiguous()
    if valid is not None:
        shapes = maps.shape, maps.shape[-2:]
        if valid.dtype != torch.bool or valid.shape not in shapes or valid.device != maps.device:
            raise ValueError(
                f"valid of shape {tuple(valid.shape)} and type {valid.dtype} on {valid.device}: it has to be bool of shape "
                f"{tuple(maps.shape)} or {tuple(maps.shape[-2:])} on {maps.device}"
            )
        valid = valid.reshape(-1, *valid.shape[-2:])
    chosen = choose(implementation, x)
    if chosen == "triton" or torch.compiler.is_compiling():
        found = torch.ops.mmcompress.rank_filter(x, kernel, valid, chosen)
    else:
        found = _run(x, kernel, valid, chosen)
    return found.view(maps.shape)


def _run(maps: Tensor, kernel: int, valid: Tensor | None, chosen: str) -> Tensor:
    found: Tensor = importlib.import_module(f".{chosen}", __name__).rank_filter(maps, kernel, valid)
    return found


@torch.library.custom_op("mmcompress::rank_filter", mutates_args=())
def _rank_filter(maps: Tensor, kernel: int, valid: Tensor | None, chosen: str) -> Tensor:
    return _run(maps, kernel, valid, chosen)


@_rank_filter.register_fake
def _(maps: Tensor, kernel: int, valid: Tensor | None, chosen: str) -> Tensor:
    return torch.empty_like(maps)
