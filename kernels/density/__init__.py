# SPDX-License-Identifier: Apache-2.0
"""Density peaks of k-nearest-neighbour clustering (DPC-KNN), without the table of distances."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose
from ..gather import gather
from ..ragged import check_mask, check_rows, check_segments
from .naive import clearest


@torch.no_grad()
def density_peaks(
    x: Tensor,
    k: int,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """How far the neighbours of each token are, and how far the next denser token: (spread, gap), both [B, n] (ragged:
    [total]) float32.

    x [B, n, C], or ragged [total, C] with `cu_seqlens` [S + 1]; any floating type. Distances are Euclidean over sqrt(C), right
    to 2e-6 of themselves, also between tokens that nearly agree. The spread is the mean of the `k` smallest squared distances of a
    token, its own 0 included; its density is exp(-spread), so a smaller spread is denser and of equals the lower index. The gap is
    the distance to the nearest denser token; for the densest one the largest distance that there is. mask [B, n] or
    [total] bool: tokens that count; others may hold anything and get spread inf and gap 0. Where there are fewer than `k`
    tokens, all of them are neighbours. No gradient.

    Cost n^2 C / 2 in float32 on the CPU, where what float32 leaves open is decided in float64, and values are read; on a GPU n^2 C
    in float32, by differences. Memory O(n), a copy of `x` and 2^26 distances (GPU: 2^24): where the table is larger, it is made
    one and a half times. On a GPU nothing waits, if `max_seqlen`, the length of the longest segment, is given with ragged tokens
    (which are filled up to it).
    """
    _check(x, cu_seqlens)
    check_mask("mask", mask, x)
    _check_neighbours(k)
    chosen = choose(implementation, x)
    if chosen == "triton" or torch.compiler.is_compiling():
        found = _peaks(x, k, mask, cu_seqlens, max_seqlen, chosen)
        return found[0], found[1]
    return _call("density_peaks", chosen, x, k, mask, cu_seqlens, max_seqlen)


@torch.no_grad()
def nearest(
    x: Tensor,
    y: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens_x: Tensor | None = None,
    cu_seqlens_y: Tensor | None = None,
    max_seqlens: tuple[int, int] | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The row of `y` that is nearest to each row of `x`: (distance, index), both [B, n] (ragged: [total_x]).

    x [B, n, C] and y [B, m, C], or ragged with both `cu_seqlens`; distances as in `density_peaks`. mask [B, m] or [total_y] bool:
    rows of `y` that can be found. Ties go to the lower index, ragged indices are rows of `y`; without any partner the index
    is -1 and the distance inf. Cost n m C, memory O(n + m). max_seqlens: the
    longest segments of `x` and `y`, as `max_seqlen` there.
    """
    _check(x, cu_seqlens_x, "cu_seqlens_x")
    _check(y, cu_seqlens_y, "cu_seqlens_y")
    check_mask("mask", mask, y)
    ragged = [cu is not None for cu in (cu_seqlens_x, cu_seqlens_y)]
    if (
        x.shape[-1] != y.shape[-1]
        or len(set(ragged)) > 1
        or (not ragged[0] and len(x) != len(y))
        or x.device != y.device
    ):
        raise ValueError(
            f"x has shape {tuple(x.shape)}, y {tuple(y.shape)}; give [B, n, C] and [B, m, C], or both with cu_seqlens"
        )
    if cu_seqlens_x is not None and cu_seqlens_y is not None and len(cu_seqlens_x) != len(cu_seqlens_y):
        raise ValueError(f"{len(cu_seqlens_x) - 1} segments of x, {len(cu_seqlens_y) - 1} of y: each has its own")
    chosen = choose(implementation, x)
    if chosen == "triton" or torch.compiler.is_compiling():
        found = _nearest(x, y, mask, cu_seqlens_x, cu_seqlens_y, max_seqlens, chosen)
        return found[0], found[1]
    return _call("nearest", chosen, x, y, mask, cu_seqlens_x, cu_seqlens_y, max_seqlens)


@torch.no_grad()
def clusters(x: Tensor, count: int, k: int, *, implementation: str = "auto") -> tuple[Tensor, Tensor]:
    """`count` clusters of x [U, n, C] around density peaks: their centres, [U, count] int64, the clearest peak first, and the
    cluster of each token, [U, n] int64.

    Centres are the tokens with the largest products of density and gap (`density_peaks`, `k` neighbours), of equals the lower
    index; every other token joins its nearest centre (`nearest`), of equals the clearer peak. On the CPU both are read from one
    table where that has no more than 2^26 distances.
    """
    _check(x, None)
    _check_neighbours(k)
    chosen = choose(implementation, x)
    if chosen == "blocked" and x.device.type == "cpu" and not torch.compiler.is_compiling():
        centres, into = _call("clusters", chosen, x, count, k)
    else:
        centres = clearest(*density_peaks(x, k, implementation=chosen), count)
        into = nearest(x, gather(x, centres), implementation=chosen)[1]
    return centres, into.scatter(1, centres, torch.arange(centres.shape[1], device=x.device).expand_as(centres))


def _call(name: str, chosen: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    if chosen == "blocked" and arguments[0].device.type == "cpu":
        chosen = "mixed"
    first, second = getattr(importlib.import_module(f".{chosen}", __name__), name)(*arguments)
    return first, second


@torch.library.custom_op("mmcompress::density_peaks", mutates_args=())
def _peaks(
    x: Tensor, k: int, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, chosen: str
) -> tuple[Tensor, Tensor]:
    return _call("density_peaks", chosen, x, k, mask, cu_seqlens, max_seqlen)


@_peaks.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.float32), x.new_empty(x.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("mmcompress::nearest", mutates_args=())
def _nearest(
    x: Tensor,
    y: Tensor,
    mask: Tensor | None,
    cu_x: Tensor | None,
    cu_y: Tensor | None,
    max_seqlens: Sequence[int] | None,
    chosen: str,
) -> tuple[Tensor, Tensor]:
    return _call("nearest", chosen, x, y, mask, cu_x, cu_y, max_seqlens)


@_nearest.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.float32), x.new_empty(x.shape[:-1], dtype=torch.int64)


def _check(x: Tensor, cu_seqlens: Tensor | None, name: str = "cu_seqlens") -> None:
    check_rows(x, cu_seqlens)
    if cu_seqlens is not None:
        check_segments(name, cu_seqlens, x)


def _check_neighbours(k: int) -> None:
    if type(k) is not int or k < 1:
        raise ValueError(f"k={k!r}: give a number of neighbours, at least 1 (the token itself counts)")
