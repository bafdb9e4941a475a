# SPDX-License-Identifier: Apache-2.0
"""Components from one pass over blocks of rows of the graph, with plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..match.blocked import COLUMNS, ROWS, filled_up, roomy, round_up, view
from ..match.rule import inverse_norms, without_huge
from ..ragged import segments
from .naive import of_graph

_PAIRS = 1 << 20
"""Pairs in a block of rows."""
_LEAST = 192
"""Rows in a block at least: products of fewer take longer than their share."""
_FEW = 64
"""Up to so many tokens the time of the calls counts: the graph is whole, and labels spread over it as in `naive`."""


def components(
    x: Tensor,
    threshold: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    label, degree = (torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device) for _ in range(2))
    scale = inverse_norms(x)
    x = without_huge(x, scale)
    if cu_seqlens is None:
        _components(x, scale, threshold, mask, label, degree)
        return label, degree
    label.fill_(-1)
    for begin, end in segments(cu_seqlens):
        part = slice(begin, end)
        known = None if mask is None else mask[None, part]
        _components(x[None, part], scale[None, part], threshold, known, label[None, part], degree[None, part])
        label[part].add_(begin * (label[part] >= 0))
    return label, degree


def _components(x: Tensor, scale: Tensor, threshold: float, mask: Tensor | None, label: Tensor, degree: Tensor) -> None:
    """Fill `label` and `degree` [G, n] for x [G, n, D]."""
    groups, n, _ = x.shape
    if not n:
        return
    small = n * n <= _PAIRS
    many = max(1, _PAIRS // (n * n))
    height = max(_LEAST, round_up(n // 4, COLUMNS) if small else _PAIRS // n // COLUMNS * COLUMNS)
    buffers = [torch.empty(0, device=x.device) for _ in range(4)]
    for g in range(0, groups, many):
        group = slice(g, g + many)
        known, part = None if mask is None else mask[group], x[group]
        if n <= _FEW:
            label[group], degree[group] = of_graph(_cosines(part, scale[group]) > threshold, known)
            continue
        if small:  # filled up once for all of its blocks
            part, buffers[3] = filled_up(part, COLUMNS, buffers[3])
        root = torch.arange(n, device=x.device).repeat(len(part), 1)
        count = torch.ones_like(root)
        for first in range(0, n, height):
            edge = _edges(part, scale[group], threshold, known, first, height, buffers)
            if edge.device.type == "cpu" and not edge.any().tolist():
                continue
            count[:, first : first + edge.shape[1]].add_(edge.sum(2))
            count[:, first:].add_(edge.sum(1))
            root = _joined(root, edge, first)
        label[group], degree[group] = root, count
        if known is not None:
            label[group].masked_fill_(~known, -1)
            degree[group].masked_fill_(~known, 0)


def _cosines(x: Tensor, scale: Tensor) -> Tensor:
    """The whole table [g, n, n] of few tokens."""
    n, x = x.shape[1], x.float()
    x = F.pad(x, (0, 0, 0, round_up(n, COLUMNS) - n)) if n % COLUMNS else x
    return torch.bmm(x, x.transpose(1, 2))[:, :n, :n] * scale[:, None] * scale[:, :, None]


def _edges(
    x: Tensor,
    scale: Tensor,
    threshold: float,
    mask: Tensor | None,
    first: int,
    height: int,
    buffers: list[Tensor],
) -> Tensor:
    """Edges between the rows from `first` and later ones, [g, rows, n - first] bool; x may be filled up with zeros."""
    groups, n = scale.shape
    end = min(first + height, n)
    edge = torch.empty(groups, end - first, n - first, dtype=torch.bool, device=x.device)
    left, buffers[0] = filled_up(x[:, first : first + height], ROWS, buffers[0])
    width = max(2048, _PAIRS // (groups * height) // COLUMNS * COLUMNS)
    for begin in range(first, n, width):
        stop = min(begin + width, n)
        right, buffers[1] = filled_up(x[:, begin : begin + width], COLUMNS, buffers[1])
        shape = groups, left.shape[1], right.shape[1]
        buffers[2] = roomy(buffers[2], shape)
        cosine = torch.bmm(left, right.transpose(1, 2), out=view(buffers[2], shape))[:, : end - first, : stop - begin]
        cosine.mul_(scale[:, None, begin:stop]).mul_(scale[:, first:end, None])
        edge[..., begin - first : stop - first] = cosine > threshold
    index = torch.arange(end - first, device=x.device)
    edge[..., : end - first].logical_and_(index > index[:, None])
    if mask is not None:
        edge.logical_and_(mask[:, None, first:]).logical_and_(mask[:, first:end, None])
    return edge


def _joined(root: Tensor, edge: Tensor, first: int) -> Tensor:
    """Roots [g, n] int64 (the lowest members of components) with the edges [g, r, n - first] of rows from `first` taken in.

    The lowest root that a row touches becomes that of all the components that it touches, until nothing changes.
    """
    rows, n = edge.shape[1], root.shape[1]
    number = torch.arange(n, device=root.device).expand_as(root)
    while True:
        mine = root[:, first:].float()  # whole numbers below 2^24
        low = torch.where(edge, mine[:, None], float(n)).amin(2)
        low = torch.minimum(low, mine[:, :rows])
        offer = torch.minimum(torch.where(edge, low[..., None], float(n)).amin(1), mine)
        offer[:, :rows] = torch.minimum(offer[:, :rows], low)
        target = number.scatter_reduce(1, root[:, first:], offer.long(), "amin")
        while not torch.equal(further := target.gather(1, target), target):
            target = further
        joined = target.gather(1, root)
        if torch.equal(joined, root):
            return root
        root = joined
