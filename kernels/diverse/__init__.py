# SPDX-License-Identifier: Apache-2.0
"""Tokens that are unlike each other: farthest-point selection, and the greedy mode of a determinantal point process."""

from __future__ import annotations

import importlib
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..dispatch import choose
from ..ragged import check_segments, segments


@overload
def max_min(
    features: Tensor, k: int, weight: Tensor | None = ..., *, first: Tensor | None = ..., nearest: Literal[False] = ...,
    cu_seqlens: Tensor | None = ..., cu_picks: Tensor | None = ..., implementation: str = ...,
) -> Tensor: ...  # fmt: skip
@overload
def max_min(
    features: Tensor, k: int, weight: Tensor | None = ..., *, first: Tensor | None = ..., nearest: Literal[True],
    cu_seqlens: Tensor | None = ..., cu_picks: Tensor | None = ..., implementation: str = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def max_min(
    features: Tensor,
    k: int,
    weight: Tensor | None = None,
    *,
    first: Tensor | None = None,
    nearest: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_picks: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Greedy max-min diversity: `k` tokens per visual in the order they are picked, [U, k] int64.

    features [U, N, D], any floating type; weight [U, N] >= 0, optional. The first pick is the token farthest from its nearest
    other one, whatever it weighs, or `first` [U] int64; each next one has the largest weight times cosine distance to the
    nearest token picked so far. Cosines are float32, a zero vector has cosine 0. No token twice; ties go to the lower index.
    No gradient.

    nearest: also the pick that is nearest to each token, [U, N] int64, by its index among the N; a pick is nearest to itself,
    ties go to the lower index.
    cu_seqlens, cu_picks [S + 1], integers from 0: visuals of several sizes. Then features are [total, D] and weight [total],
    `first` [S] is needed, `k` is the number of all picks, and what comes back is [k] and [total]: rows of `features`. Segment s
    has the rows and the picks from s to s + 1; behind the last one is -1.

    Picks are those of the full table of distances ("naive", N^2 D), where two tokens do not come as close to each other as
    the rounding of a dot product. CPU: only similarities that can decide are computed, N^2 D / 2 to find the first and N k D at
    worst; memory O(N) and a block. GPU: all picks in one launch; up to 4,096 tokens from a table of N^2, made in N^2 D / 2;
    above that, and where visuals have several sizes, N k D in O(N), by programs that wait for each other after every pick (and
    N^2 D for a first that is not given). Nothing waits for the device. `implementation`: see `kernels.dispatch.choose`.
    """
    if (cu_seqlens is None) != (cu_picks is None):
        raise ValueError("cu_seqlens and cu_picks come together, or not at all for visuals of one size")
    if cu_seqlens is None or cu_picks is None:
        _check(features, k)
        visuals = len(features)
    else:
        visuals = _check_segments(features, k, first, cu_seqlens, cu_picks)
    if weight is not None and (weight.shape != features.shape[:-1] or weight.device != features.device):
        raise ValueError(
            f"weight is {tuple(weight.shape)} on {weight.device}: give one number per token, {tuple(features.shape[:-1])} on "
            f"{features.device}"
        )
    if first is not None and (
        first.dtype != torch.int64 or first.shape != (visuals,) or first.device != features.device
    ):
        raise ValueError(
            f"first is {first.dtype} {tuple(first.shape)} on {first.device}: give the int64 index of one token per visual, "
            f"({visuals},) on {features.device}"
        )
    chosen = choose(implementation, features)
    picks: Tensor
    near: Tensor
    picks, near = torch.ops.mmcompress.max_min(
        features.detach(), None if weight is None else weight.detach(), first, cu_seqlens, cu_picks, k, nearest, chosen
    )
    return (picks, near) if nearest else picks


def greedy_map(features: Tensor, log_quality: Tensor, k: int, *, implementation: str = "auto") -> Tensor:
    """Greedy MAP of a determinantal point process: `k` tokens per visual in the order they are picked, [U, k] int64.

    features [U, N, D], any floating type; log_quality [U, N] (-inf is fine): logarithm of q in the kernel L_ij = q_i cos(i, j)
    q_j. Each pick raises log det L of the picked tokens most: by 2 log q plus the logarithm of the part that is new, which an
    incremental Cholesky factor of the cosines gives (Chen et al., arXiv 1709.05135). A part of 1e-6 (`naive.SPENT`) or less of
    a token counts as nothing; when no token has anything new (equal or zero tokens, k above the rank), the rest follows by
    quality. No token twice; ties go to the lower index. No gradient.

    Picks are those of the full table of cosines ("naive", N^2 D) where gains differ by more than rounding and no new part is
    near 1e-6: tokens at the edge of the rank are new or not by rounding. CPU: tokens are looked at only when they
    can be the next, k N (D + k) at worst; memory N k and a block. GPU: N^2 D / 2 and a table of N^2 up to 4,096 tokens, above
    that k N D; one launch per pick; memory N k. Nothing waits for the device.
    """
    _check(features, k)
    if log_quality.shape != features.shape[:2] or log_quality.device != features.device:
        raise ValueError(
            f"log_quality is {tuple(log_quality.shape)} on {log_quality.device}: give one number per token, "
            f"{tuple(features.shape[:2])} on {features.device}"
        )
    chosen = choose(implementation, features)
    picks: Tensor = torch.ops.mmcompress.greedy_map(features.detach(), log_quality.detach(), k, chosen)
    return picks


def expand(
    features: Tensor,
    k: int,
    weight: Tensor,
    offset: Tensor | None = None,
    *,
    cap: float = 2.0,
    start: Tensor | None = None,
    sizes: Tensor | None = None,
    together: int = 1,
    implementation: str = "auto",
) -> Tensor:
    """Add tokens that are worth something and far from those that are there: `k` in the order they are picked, [U, k] int64.

    features [U, N, D], any floating type; weight [U, N] >= 0, offset [U, N]. Each pick has the largest weight times distance plus
    offset, where the distance is the cosine distance to the nearest pick so far, at most `cap`, and `cap` before the first.
    start [U, M] int64, M at most k: the first picks of each visual are the first `sizes` [U] of these. together: tokens that are
    picked by one look. A zero vector has cosine 0. No token twice; ties go to the lower index. No gradient.

    Cost N^2 D and k N with a table of N^2 up to 4,096 tokens, above that k N D and O(N); a few launches per pick. Nothing waits for
    the device. Implementations: "naive", and "blocked" for all devices.
    """
    _check(features, k)
    for name, x in (("weight", weight), ("offset", offset)):
        if x is not None and (x.shape != features.shape[:2] or x.device != features.device):
            raise ValueError(
                f"{name} is {tuple(x.shape)} on {x.device}: give one number per token, {tuple(features.shape[:2])} on "
                f"{features.device}"
            )
    if (start is None) != (sizes is None) or (start is not None and not start.shape[1] <= k):
        raise ValueError("start and sizes: give both, and no more tokens to start with than k")
    if together < 1:
        raise ValueError(f"together={together}: give how many tokens are picked at a time, at least 1")
    if implementation not in ("auto", "naive", "blocked"):
        raise ValueError(f"implementation={implementation!r}: choose 'auto', 'naive' or 'blocked'")
    weight = weight.detach().float()
    offset = torch.zeros_like(weight) if offset is None else offset.detach().float()
    start = torch.empty(len(weight), 0, dtype=torch.int64, device=weight.device) if start is None else start
    sizes = torch.zeros(len(weight), dtype=torch.int64, device=weight.device) if sizes is None else sizes
    chosen = "naive" if implementation == "naive" else "blocked"
    picks: Tensor = torch.ops.mmcompress.expand(
        features.detach(), weight, offset, start, sizes, float(cap), k, together, chosen
    )
    return picks


def _check(features: Tensor, k: int) -> None:
    if features.dim() != 3 or not features.is_floating_point():
        raise ValueError(
            f"features are {features.dtype} {tuple(features.shape)}: give a floating-point tensor [U, N, D]"
        )
    if not 1 <= k <= features.shape[1]:
        raise ValueError(f"k={k}: {features.shape[1]} tokens, give a number from 1 to that")


def _check_segments(features: Tensor, k: int, first: Tensor | None, cu_seqlens: Tensor, cu_picks: Tensor) -> int:
    """The number of visuals that are packed in `features`."""
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(
            f"features are {features.dtype} {tuple(features.shape)}: give floating-point [total, D] with cu_seqlens"
        )
    if first is None:
        raise ValueError("first=None with cu_seqlens: give the row of `features` that each visual begins with, [S]")
    check_segments("cu_seqlens", cu_seqlens, features)
    check_segments("cu_picks", cu_picks, features)
    if cu_picks.shape != cu_seqlens.shape:
        raise ValueError(f"{len(cu_seqlens) - 1} visuals, picks for {len(cu_picks) - 1}: give as many of both")
    if features.device.type == "cpu":
        for (a, b), (c, d), begin in zip(segments(cu_seqlens), segments(cu_picks), first.tolist(), strict=True):
            if d > k or not ((1 <= d - c <= b - a and a <= begin < b) or (a == b and c == d)):
                raise ValueError(
                    f"rows {a} to {b} begin with {begin} and have picks {c} to {d}, k={k}: give at least one pick, as many "
                    f"as rows at most, the first of them among the rows, and k of all"
                )
    return len(cu_seqlens) - 1


def _module(chosen: str, features: Tensor) -> Any:
    if chosen == "blocked" and features.device.type == "cpu":
        chosen = "lazy"  # the same in an order that reads values, which only waits where there is a device
    return importlib.import_module(f".{chosen}", __name__)


@torch.library.custom_op(
    "mmcompress::max_min",
    mutates_args=(),
    schema=(
        "(Tensor features, Tensor? weight, Tensor? first, Tensor? cu_seqlens, Tensor? cu_picks, SymInt k, bool nearest, "
        "str chosen) -> (Tensor, Tensor)"
    ),
)
def _max_min(
    features: Tensor,
    weight: Tensor | None,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_picks: Tensor | None,
    k: int,
    nearest: bool,
    chosen: str,
) -> tuple[Tensor, Tensor]:
    module, near = _module(chosen, features), None
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        if not features.shape[0]:
            picks = features.new_empty(*features.shape[: features.dim() - 2], k, dtype=torch.int64)
        elif cu_seqlens is None or cu_picks is None:
            picks, near = module.max_min(features, k, weight, first, nearest)
        elif chosen == "triton":
            picks, near = module.max_min_ragged(features, k, weight, first, cu_seqlens, cu_picks)
        else:
            picks, near = (torch.full((n,), -1, device=features.device) for n in (k, len(features)))
            for u, ((a, b), (c, d)) in enumerate(zip(segments(cu_seqlens), segments(cu_picks), strict=True)):
                if a < b:
                    one, begun = slice(a, b), first[u : u + 1] - a if first is not None else None
                    own = None if weight is None else weight[None, one]
                    found, to = module.max_min(features[None, one], d - c, own, begun, nearest)
                    picks[c:d] = found[0] + a
                    if nearest:
                        near[one] = to[0] + a
    empty = features.new_empty(features.shape[:-1] if nearest else (0,), dtype=torch.int64)
    return picks, near if nearest and near is not None else empty


@_max_min.register_fake
def _(features: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    *_, k, nearest, _ = given
    picks = features.new_empty(*features.shape[: features.dim() - 2], k, dtype=torch.int64)
    return picks, features.new_empty(features.shape[:-1] if nearest else (0,), dtype=torch.int64)


@torch.library.custom_op(
    "mmcompress::greedy_map",
    mutates_args=(),
    schema="(Tensor features, Tensor log_quality, SymInt k, str chosen) -> Tensor",
)
def _greedy_map(features: Tensor, log_quality: Tensor, k: int, chosen: str) -> Tensor:
    if not len(features):
        return features.new_empty(0, k, dtype=torch.int64)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        picks: Tensor = _module(chosen, features).greedy_map(features, log_quality, k)
    return picks


@_greedy_map.register_fake
def _(features: Tensor, log_quality: Tensor, k: int, chosen: str) -> Tensor:
    return features.new_empty(len(features), k, dtype=torch.int64)


@torch.library.custom_op(
    "mmcompress::expand",
    mutates_args=(),
    schema=(
        "(Tensor features, Tensor weight, Tensor offset, Tensor start, Tensor sizes, float cap, SymInt k, SymInt together, "
        "str chosen) -> Tensor"
    ),
)
def _expand(
    features: Tensor,
    weight: Tensor,
    offset: Tensor,
    start: Tensor,
    sizes: Tensor,
    cap: float,
    k: int,
    together: int,
    chosen: str,
) -> Tensor:
    module = importlib.import_module(f".{chosen}", __name__)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        picks: Tensor = module.expand(features, k, weight, offset, cap, start, sizes, together)
    return picks


@_expand.register_fake
def _(
    features: Tensor, weight: Tensor, offset: Tensor, start: Tensor, sizes: Tensor, cap: float, k: int, *_: object
) -> Tensor:
    return features.new_empty(len(features), k, dtype=torch.int64)
