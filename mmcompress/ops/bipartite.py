# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching of similar tokens and the size-weighted merge that follows it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.match import match
from ..kernels.merge import merge
from .groups import group_sizes, group_sum


def bipartite_match(metric: Tensor, r: int, protected: int = 0) -> tuple[Tensor, int]:
    """Merge the `r` most similar pairs between tokens at even and at odd places (Bolya et al., arXiv 2210.09461).

    metric [n, T, d]. Returns (target, count): the index in the new sequence of every token, [n, T] int64, and the new
    length T - r. New order: even tokens that stay, then all odd tokens. `protected` is 0 or 1: with 1 the first token
    stays alone and first, and the even tokens that stay keep their order; with 0 they come by falling similarity, as in
    the reference. Ties go to the lower index. Cost T^2 d / 4, memory T.
    """
    tokens = metric.shape[1]
    if protected not in (0, 1):
        raise NotImplementedError(f"protected={protected}: only a CLS token can be protected")
    if not 0 <= r <= (tokens - protected) // 2:
        raise ValueError(
            f"r={r}: {tokens} tokens, {protected} of them protected, can lose at most {(tokens - protected) // 2}"
        )
    order, partner = _paired(metric, r, protected)
    return _target(order, partner, tokens), tokens - r


def _paired(metric: Tensor, r: int, protected: int) -> tuple[Tensor, Tensor]:
    """The numbers of the even tokens, [n, even]: the `r` that go into an odd one first, then those that stay, in their new order;
    and into which of the odd ones, [n, r]."""
    likeness, partner = match(metric[:, ::2], metric[:, 1::2])
    if protected:
        likeness[:, 0] = float("-inf")
    order = likeness.sort(dim=1, descending=True, stable=True).indices
    merged = order[:, :r]
    if protected:
        order = torch.cat([merged, order[:, r:].sort(dim=1).values], 1)
    return order, partner.gather(1, merged)


def _target(order: Tensor, partner: Tensor, tokens: int) -> Tensor:
    """The number of every token in the new order, [n, tokens]; `order` and `partner` as `_paired` gives them."""
    stay = order.shape[1] - partner.shape[1]
    target = order.new_empty(len(order), tokens)
    target[:, 1::2].copy_(torch.arange(stay, stay + tokens // 2, device=order.device))
    places = torch.arange(stay, device=order.device).expand(len(order), -1)
    target[:, ::2].scatter_(1, order, torch.cat([stay + partner, places], 1))
    return target


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
    share, metric = None, metric.float()
    for step in steps:
        r = min(step, metric.shape[1] // 2)
        if not r:
            continue
        order, partner = _paired(metric, r, 0)
        target = _target(order, partner, metric.shape[1])
        members = group_sizes(target, metric.shape[1] - r, torch.float32)
        metric = merge(metric, target, members.shape[1]) / members[..., None]
        stay = order[:, r:]
        even = 2 * stay if share is None else slots[:, ::2].gather(1, stay)
        slots = torch.cat([even, slots[:, 1::2]], 1)
        into = target if share is None else target.gather(1, into)
        size = members.gather(1, into)
        share = size.reciprocal() if share is None else share / size
    return slots, into, torch.ones(n, tokens, device=metric.device) if share is None else share
