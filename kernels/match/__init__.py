# SPDX-License-Identifier: Apache-2.0
"""For every token of one set the most (or least) similar tokens of another, without the table of similarities."""

from __future__ import annotations

import importlib
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose
from ..ragged import check_mask, check_segments
from .rule import Rule

MOST = 8
"""How many matches per row `match_top` gives at most."""


def match(
    a: Tensor,
    b: Tensor,
    *,
    largest: bool = True,
    normalize: bool = True,
    near: tuple[int | None, int | None] | None = None,
    frame: int = 1,
    same_cell: bool = False,
    exclude_self: bool = False,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_a: Tensor | None = None,
    cu_seqlens_b: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The best match of every row of `a` among the rows of `b`: (score, index), both [B, M] (ragged: [total_a]).

    a [B, M, D] and b [B, N, D]; or, ragged, a [total_a, D] and b [total_b, D] with `cu_seqlens_a` and `cu_seqlens_b` [S + 1]
    (integers, from 0): segment s of `a` matches in segment s of `b`. Any floating type; products and scores are float32.

    largest       the row with the highest score; False: the lowest.
    normalize     score is the cosine; a zero vector has cosine 0. False: the plain dot product (which may overflow).
    frame, near   rows lie in frames of `frame` each, of a video for example, counted from the start of their segment. `near` =
                  (low, high): a row of frame f matches only in frames f + low to f + high of `b`, None where there is no bound.
                  frame=1 makes it a band of rows.
    same_cell     a row matches only rows at its own place in their frames; then nothing is multiplied but such pairs.
    exclude_self  row i does not match row i, where both sides are the same tokens.
    query_mask    [B, M] or [total_a] bool: rows that ask. key_mask [B, N] or [total_b] bool: rows that can be matched. Masked
                  rows may hold anything, NaN included.

    Ties go to the lower index. A row without any partner has index -1 and score -inf (inf for the lowest). Ragged indices are
    rows of `b`, not of the segment. No gradient. Cost M N D (in a band only what lies in it), memory O(M + N); ragged CPU and
    plain-torch paths read `cu_seqlens` on the host, Triton does not. `implementation`: see `kernels.dispatch.choose`.
    """
    low, high = near or (None, None)
    rule = Rule(1, largest, normalize, frame, low, high, same_cell, exclude_self)
    value, index = _run(a, b, rule, query_mask, key_mask, cu_seqlens_a, cu_seqlens_b, implementation)
    return value[..., 0], index[..., 0]


def match_top(
    a: Tensor,
    b: Tensor,
    m: int,
    *,
    largest: bool = True,
    normalize: bool = True,
    near: tuple[int | None, int | None] | None = None,
    frame: int = 1,
    same_cell: bool = False,
    exclude_self: bool = False,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens_a: Tensor | None = None,
    cu_seqlens_b: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The `m` best matches of every row, at most 8, the best first: (score, index), both [B, M, m] (ragged: [total_a, m]).

    Options as in `match`. Where a row has fewer than `m` partners the rest is index -1 and score -inf (inf for the lowest).
    """
    low, high = near or (None, None)
    rule = Rule(m, largest, normalize, frame, low, high, same_cell, exclude_self)
    return _run(a, b, rule, query_mask, key_mask, cu_seqlens_a, cu_seqlens_b, implementation)


@torch.no_grad()
def _run(
    a: Tensor,
    b: Tensor,
    rule: Rule,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_a: Tensor | None,
    cu_b: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    _check(a, b, rule, cu_a, cu_b)
    check_mask("query_mask", query_mask, a)
    check_mask("key_mask", key_mask, b)
    chosen = choose(implementation, a)
    if chosen == "triton" or torch.compiler.is_compiling():
        found = _op(a, b, *astuple(rule), query_mask, key_mask, cu_a, cu_b, chosen)
        return found[0], found[1]
    return _call(chosen, a, b, rule, query_mask, key_mask, cu_a, cu_b)


def _call(chosen: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    value, index = importlib.import_module(f".{chosen}", __name__).match(*arguments)
    return value, index


@torch.library.custom_op("mmcompress::match", mutates_args=())
def _op(
    a: Tensor,
    b: Tensor,
    m: int,
    largest: bool,
    normalize: bool,
    frame: int,
    low: int | None,
    high: int | None,
    same_cell: bool,
    exclude_self: bool,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_a: Tensor | None,
    cu_b: Tensor | None,
    chosen: str,
) -> tuple[Tensor, Tensor]:
    rule = Rule(m, largest, normalize, frame, low, high, same_cell, exclude_self)
    return _call(chosen, a, b, rule, query_mask, key_mask, cu_a, cu_b)


@_op.register_fake
def _(a: Tensor, b: Tensor, m: int, *_: Any) -> tuple[Tensor, Tensor]:
    return a.new_empty(*a.shape[:-1], m, dtype=torch.float32), a.new_empty(*a.shape[:-1], m, dtype=torch.int64)


def _check(a: Tensor, b: Tensor, rule: Rule, cu_a: Tensor | None, cu_b: Tensor | None) -> None:
    if type(rule.m) is not int or not 1 <= rule.m <= MOST:
        raise ValueError(f"m={rule.m!r}: give a number of matches from 1 to {MOST}; for more sort the scores")
    if type(rule.frame) is not int or rule.frame < 1:
        raise ValueError(f"frame={rule.frame!r}: give the number of tokens in a frame, at least 1")
    for name, bound in (("low", rule.low), ("high", rule.high)):
        if bound is not None and type(bound) is not int:
            raise TypeError(f"near: its {name} bound is {bound!r}; give a whole number of frames or None")
    if rule.low is not None and rule.high is not None and rule.low > rule.high:
        raise ValueError(f"near={rule.low, rule.high}: the first number is the lower bound")
    if (cu_a is None) != (cu_b is None):
        raise ValueError("cu_seqlens_a and cu_seqlens_b come together, or not at all for dense batches")
    if not (a.is_floating_point() and b.is_floating_point()) or a.device != b.device:
        raise TypeError(
            f"a is {a.dtype} on {a.device}, b {b.dtype} on {b.device}: give floating-point tensors on one device"
        )
    dims = 3 if cu_a is None else 2
    if a.dim() != dims or b.dim() != dims or a.shape[-1] != b.shape[-1] or (dims == 3 and len(a) != len(b)):
        wanted = "[B, M, D] and [B, N, D]" if cu_a is None else "[total_a, D] and [total_b, D] with cu_seqlens"
        raise ValueError(f"a has shape {tuple(a.shape)}, b {tuple(b.shape)}; give {wanted}")
    if cu_a is not None and cu_b is not None:
        check_segments("cu_seqlens_a", cu_a, a)
        check_segments("cu_seqlens_b", cu_b, b)
        if len(cu_a) != len(cu_b):
            raise ValueError(f"{len(cu_a) - 1} segments of a, {len(cu_b) - 1} of b: each segment of a has its own of b")
