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
    x = x.float()
    scale = inverse_norms(x)
    x = without_huge(x, scale)
    cosine = (x @ x.transpose(1, 2)) * scale[:, None] * scale[:, :, None]
    return of_graph(cosine > threshold, mask)


def of_graph(above: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels and degrees [G, n] from above [G, n, n]: which later tokens each one is connected to; the rest of it is not read."""
    groups, n, _ = above.shape
    edge = edges(above, mask)
    label = torch.arange(n, device=edge.device).expand(groups, n)
    while n:
        lower = torch.where(edge, label[:, None], n).amin(2)
        if torch.equal(lower, label):
            break
        label = lower
    return label if mask is None else label.masked_fill(~mask, -1), edge.sum(2)


def edges(above: Tensor, mask: Tensor | None) -> Tensor:
    """All of them, both ways and of each token to itself, [G, n, n] bool."""
    edge = above.triu(1)
    edge = edge | edge.transpose(1, 2) | torch.eye(above.shape[1], dtype=torch.bool, device=above.device)
    return edge if mask is None else edge & mask[:, None] & mask[:, :, None]
