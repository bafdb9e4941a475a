# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching of similar tokens and the size-weighted merge that follows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.match import match
from ..kernels.merge import merge
from .groups import group_sum


def bipartite_match(metric: Tensor, r: int, protected: int = 0) -> tuple[Tensor, int]:
    """Merge the `r` most similar pairs between tokens at even and at odd places (Bolya et al., arXiv 2210.09461).

    metric [n, T, d]. Returns (target, count): the index in the new sequence of every token, [n, T] int64, and the new
    length T - r. New order: even tokens that stay, then all odd tokens. `protected` is 0 or 1: with 1 the first token
    stays alone and first, and the even tokens that stay keep their order; with 0 they come by falling similarity, as in
    the reference. Ties go to the lower index. Cost T^2 d / 4, memory T.
    """
    n, tokens, _ = metric.shape
    if protected not in (0, 1):
        raise NotImplementedError(f"protected={protected}: only a CLS token can be protected")
    if not 0 <= r <= (tokens - protected) // 2:
        raise ValueError(
            f"r={r}: {tokens} tokens, {protected} of them protected, can lose at most {(tokens - protected) // 2}"
        )
    likeness, partner = match(metric[:, ::2], metric[:, 1::2])
    if protected:
        likeness[:, 0] = float("-inf")
    order = likeness.sort(dim=1, descending=True, stable=True).indices
    merged, staying = order[:, :r], order[:, r:]
    if protected:
        staying = staying.sort(dim=1).values
    stay = staying.shape[1]
    place = torch.arange(tokens, device=metric.device)
    target = torch.empty(n, tokens, dtype=torch.int64, device=metric.device)
    target[:, 1::2] = stay + place[: tokens // 2]
    target.scatter_(1, 2 * staying, place[:stay].expand(n, -1))
    target.scatter_(1, 2 * merged, stay + partner.gather(1, merged))
    return target, tokens - r


def merge_mean(x: Tensor, size: Tensor, target: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Mean of the tokens that share a target, weighted by how many patches each stands for.

    x [n, T, C], size [n, T], target [n, T] in [0, count): merged tokens [n, count, C] in the dtype of x and their sizes
    [n, count]. Sums run in float32.
    """
    return merge(x, target, count, size, mean=True), group_sum(size, target, count)


def halvings(tokens: int, keep: int) -> list[int]:
    """How many of `tokens` to merge in each step until `keep` are left: half of them (rounded down), at last what is over."""
    steps: list[int] = []
    while (left := tokens - sum(steps)) > keep:
        steps.append(min(left // 2, left - keep))
    return steps


def merge_in_steps(metric: Tensor, steps: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Match and merge again and again, `steps` pairs each time, at most half of the tokens; the metric is merged along.

    metric [n, T, d]. Each step (`bipartite_match`) replaces an odd token by the plain mean of itself and all even ones that
    go into it, however many tokens they stand for. Returns, for the `k` tokens left, in the order of the last step: the
    token that each stands for, [n, k] int64, never one that went into another; which of them every token went into,
    [n, T] int64; and its share there, [n, T] float32.
    """
    n, tokens, _ = metric.shape
    slots = into = torch.arange(tokens, device=metric.device).expand(n, -1)
    share, metric = torch.ones(n, tokens, device=metric.device), metric.float()
    for step in steps:
        r = min(step, metric.shape[1] // 2)
        if not r:
            continue
        target, count = bipartite_match(metric, r)
        metric, members = merge_mean(metric, torch.ones_like(target, dtype=torch.float32), target, count)
        stands = torch.zeros_like(members, dtype=torch.int64).scatter(1, target[:, ::2], slots[:, ::2])
        slots = stands.scatter(1, target[:, 1::2], slots[:, 1::2])
        into = target.gather(1, into)
        share = share / members.gather(1, into)
    return slots, into, share
