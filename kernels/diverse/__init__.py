# SPDX-License-Identifier: Apache-2.0
"""Tokens that are unlike each other: farthest-point selection, and the greedy mode of a determinantal point process."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose


def max_min(
    features: Tensor,
    k: int,
    weight: Tensor | None = None,
    *,
    first: Tensor | None = None,
    implementation: str = "auto",
) -> Tensor:
    """Greedy max-min diversity: `k` tokens per visual in the order they are picked, [U, k] int64.

    features [U, N, D], any floating type; weight [U, N] >= 0, optional. The first pick is the token farthest from its nearest
    other one, whatever it weighs, or `first` [U] int64; each next one has the largest weight times cosine distance to the
    nearest token picked so far. Cosines are float32, a zero vector has cosine 0. No token twice; ties go to the lower index.
    No gradient.

    Picks are those of the full table of distances ("naive", N^2 D), where two tokens do not come as close to each other as
    the rounding of a dot product. CPU: only similarities that can decide are computed, N^2 D / 2 and N k D at worst; memory
    O(N) and a block. GPU: N^2 D / 2 and all picks in one launch up to 4,096 tokens, with a table of N^2; above that N^2 D and
    one launch per pick, O(N). Nothing waits for the device. `implementation`: see `kernels.dispatch.choose`.
    """
    _check(features, k)
    if weight is not None and (weight.shape != features.shape[:2] or weight.device != features.device):
        raise ValueError(
            f"weight is {tuple(weight.shape)} on {weight.device}: give one number per token, {tuple(features.shape[:2])} on "
            f"{features.device}"
        )
    if first is not None and (
        first.dtype != torch.int64 or first.shape != features.shape[:1] or first.device != features.device
    ):
        raise ValueError(
            f"first is {first.dtype} {tuple(first.shape)} on {first.device}: give the int64 index of one token per visual, "
            f"({len(features)},) on {features.device}"
        )
    chosen = choose(implementation, features)
    picks: Tensor = torch.ops.mmcompress.max_min(
        features.detach(), None if weight is None else weight.detach(), first, k, chosen
    )
    return picks


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


def _run(name: str, chosen: str, features: Tensor, k: int, *extra: Tensor | None) -> Tensor:
    if chosen == "blocked" and features.device.type == "cpu":
        chosen = "lazy"  # the same in an order that reads values, which only waits where there is a device
    if not len(features):
        return torch.empty(0, k, dtype=torch.int64, device=features.device)
    module = importlib.import_module(f".{chosen}", __name__)
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        if name == "max_min":
            picks: Tensor = module.max_min(features, k, *extra)
        else:
            picks = module.greedy_map(features, *extra, k)
    return picks


def _picks(features: Tensor, *given: Any) -> Tensor:
    return features.new_empty(len(features), given[-2], dtype=torch.int64)


@torch.library.custom_op(
    "mmcompress::max_min",
    mutates_args=(),
    schema="(Tensor features, Tensor? weight, Tensor? first, SymInt k, str chosen) -> Tensor",
)
def _max_min(features: Tensor, weight: Tensor | None, first: Tensor | None, k: int, chosen: str) -> Tensor:
    return _run("max_min", chosen, features, k, weight, first)


@torch.library.custom_op(
    "mmcompress::greedy_map",
    mutates_args=(),
    schema="(Tensor features, Tensor log_quality, SymInt k, str chosen) -> Tensor",
)
def _greedy_map(features: Tensor, log_quality: Tensor, k: int, chosen: str) -> Tensor:
    return _run("greedy_map", chosen, features, k, log_quality)


_max_min.register_fake(_picks)
_greedy_map.register_fake(_picks)


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
