# SPDX-License-Identifier: Apache-2.0
"""The definition of components: the whole graph, and labels that spread along its edges until nothing changes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..match.rule import inverse_norms, without_huge
from ..ragged import segments


def components(
    x: Tensor,
    threshold: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is None:
        return _components(x, threshold, mask)
    label, degree = x.new_full(x.shape[:1], -1).long(), x.new_zeros(x.shape[:1]).long()
    for begin, end in segments(cu_seqlens):
        part = _components(x[None, begin:end], threshold, None if mask is None else mask[None, begin:end])
        label[begin:end], degree[begin:end] = torch.where(part[0][0] < 0, -1, part[0][0] + begin), part[1][0]
    return label, degree


def _components(x: Tensor, threshold: float, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    (groups, n, _), x = x.shape, x.float()
    scale = inverse_norms(x)
    x = without_huge(x, scale)
    cosine = (x @ x.transpose(1, 2)) * scale[:, None] * scale[:, :, None]
    edge = (cosine > threshold).triu(1)
    edge = edge | edge.transpose(1, 2) | torch.eye(n, dtype=torch.bool, device=x.device)
    mask = torch.ones(groups, n, dtype=torch.bool, device=x.device) if mask is None else mask
    edge &= mask[:, None] & mask[:, :, None]
    label = torch.arange(n, device=x.device).expand(groups, n)
    while n:
        lower = torch.where(edge, label[:, None], n).amin(2)
        if torch.equal(lower, label):
            break
        label = lower
    return label.masked_fill(~mask, -1), edge.sum(2)
