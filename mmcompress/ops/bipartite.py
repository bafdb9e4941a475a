# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching of similar tokens and the size-weighted merge that follows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .ties import argmax_first


def bipartite_match(metric: Tensor, r: int, protected: int = 0) -> tuple[Tensor, int]:
    """Merge the `r` most similar pairs between tokens at even and at odd places (Bolya et al., arXiv 2210.09461).

    metric [n, T, d]. Returns (target, count): the index in the new sequence of every token, [n, T] int64, and the new
    length T - r. New order: even tokens that stay, then all odd tokens. `protected` is 0 or 1: with 1 the first token
    stays alone and first, and the even tokens that stay keep their order; with 0 they come by falling similarity, as in
    the reference. Ties go to the lower index. Cost T^2 d / 4.
    """
    n, tokens, _ = metric.shape
    if protected not in (0, 1):
        raise NotImplementedError(f"protected={protected}: only a CLS token can be protected")
    if not 0 <= r <= (tokens - protected) // 2:
        raise ValueError(
            f"r={r}: {tokens} tokens, {protected} of them protected, can lose at most {(tokens - protected) // 2}"
        )
    unit = F.normalize(metric.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if protected:
        scores[:, 0] = float("-inf")
    partner = argmax_first(scores)
    order = scores.amax(-1).sort(dim=1, descending=True, stable=True).indices
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
    n, _, channels = x.shape
    total = size.new_zeros(n, count).scatter_add(1, target, size)
    weighted = x.float() * size[..., None]
    index = target[..., None].expand(-1, -1, channels)
    merged = weighted.new_zeros(n, count, channels).scatter_add(1, index, weighted)
    return (merged / total[..., None]).to(x.dtype), total
