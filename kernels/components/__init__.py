# SPDX-License-Identifier: Apache-2.0
"""Tokens that hang together by similarity, without the table of similarities."""

from __future__ import annotations

import importlib
import math
import struct
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose
from ..ragged import check_mask, check_rows, check_segments

_MOST = 1 << 24


@torch.no_grad()
def components(
    x: Tensor,
    threshold: float,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Connected components of the tokens whose cosine is above `threshold`: (label, degree), both [B, n] (ragged: [total]) int64.

    x [B, n, D], or ragged [total, D] with `cu_seqlens` [S + 1]; any floating type. Cosines are float32, those of zero vectors 0.
    The label of a token is the lowest token of its component (ragged: a row of `x`), its degree the number of tokens whose
    cosine to it is above the threshold, with itself. mask [B, n] or [total] bool: tokens that count; others may hold anything
    and get label -1 and degree 0. Fewer than 2^24 tokens in each.

    Cost n^2 D / 2, memory O(n) and a block of 2^20 pairs or 192 rows. The CPU compares more than 1,024 tokens of at least 256
    features along 64 directions first, and then only those that may be above the threshold: of like tokens a small part of the
    cost, memory O(n D). It reads which these are, and whether a block changed anything. On a GPU nothing waits, if `max_seqlen`,
    the length of the longest segment, is given with ragged tokens (which are filled up to it there). Without Triton a GPU is
    waited for.
    """
    check_rows(x, cu_seqlens)
    check_mask("mask", mask, x)
    if cu_seqlens is not None:
        check_segments("cu_seqlens", cu_seqlens, x)
    if not isinstance(threshold, int | float) or math.isnan(threshold):
        raise ValueError(f"threshold={threshold!r}: give a cosine, a number from -1 to 1")
    if x.shape[-2] >= _MOST:
        raise ValueError(f"{x.shape[-2]} tokens: components are found among fewer than {_MOST}; split them up")
    threshold = _in_float32(threshold)
    chosen = choose(implementation, x)
    if chosen == "triton" or torch.compiler.is_compiling():
        found = _op(x, threshold, mask, cu_seqlens, max_seqlen, chosen)
        return found[0], found[1]
    return _call(chosen, x, threshold, mask, cu_seqlens, max_seqlen)


@torch.no_grad()
def degrees(x: Tensor, threshold: float, *, implementation: str = "auto") -> Tensor:
    """The degrees of `components` alone, [B, n] int64, of x [B, n, D]: of few tokens blocked torch looks for nothing else."""
    check_rows(x, None)
    if choose(implementation, x) == "blocked" and not torch.compiler.is_compiling():
        from .blocked import FEW, degrees

        if 0 < x.shape[1] <= FEW:
            return degrees(x, _in_float32(threshold))
    return components(x, threshold, implementation=implementation)[1]


def _in_float32(threshold: float) -> float:
    found: float = struct.unpack("f", struct.pack("f", threshold))[0]
    return found


def _call(chosen: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    label, degree = importlib.import_module(f".{chosen}", __name__).components(*arguments)
    return label, degree


@torch.library.custom_op("mmcompress::components", mutates_args=())
def _op(
    x: Tensor, threshold: float, mask: Tensor | None, cu_seqlens: Tensor | None, max_seqlen: int | None, chosen: str
) -> tuple[Tensor, Tensor]:
    return _call(chosen, x, threshold, mask, cu_seqlens, max_seqlen)


@_op.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:-1], dtype=torch.int64), x.new_empty(x.shape[:-1], dtype=torch.int64)
