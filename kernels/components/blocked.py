# SPDX-License-Identifier: Apache-2.0
"""Components from one pass over blocks of rows of the graph, with plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..match.blocked import COLUMNS, ROWS, array, filled, filled_up, roomy, round_up, view
from ..match.rule import inverse_norms, without_huge
from ..ragged import segments
from .naive import edges

_PAIRS = 1 << 20
"""Pairs in a block of rows."""
_LEAST = 192
"""Rows in a block at least: products of fewer take longer than their share."""
_DIRECTIONS = 64
"""Along so many tokens are compared first, where they have four times as many features and do not fit in a block."""
_ROUNDING = 1e-5
"""Bounds of cosines are raised by more than float32 gets wrong in them."""
FEW = 64
"""Up to so many tokens of a group the time of the calls counts: the graph is a table."""


def components(
    x: Tensor,
    threshold: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    longest: int | None = None,
) -> tuple[Tensor, Tensor]:
    scale = inverse_norms(x)
    x = without_huge(x, scale)
    parts = None if cu_seqlens is None else segments(cu_seqlens)
    if x.device.type == "cpu" and (x.shape[1] if parts is None else max((j - i for i, j in parts), default=0)) <= FEW:
        return _few(x, scale, threshold, mask, parts)
    label, degree = (torch.zeros(x.shape[:-1], dtype=torch.int64, device=x.device) for _ in range(2))
    if parts is None:
        _components(x, scale, threshold, mask, label, degree)
        return label, degree
    label.fill_(-1)
    for begin, end in parts:
        part = slice(begin, end)
        known = None if mask is None else mask[None, part]
        _components(x[None, part], scale[None, part], threshold, known, label[None, part], degree[None, part])
        label[part].add_(begin * (label[part] >= 0))
    return label, degree


def degrees(x: Tensor, threshold: float) -> Tensor:
    """Degrees [G, n] of at most FEW tokens."""
    scale, many = inverse_norms(x), max(1, _PAIRS // x.shape[1] ** 2)
    x = without_huge(x, scale)
    parts = zip(x.split(many), scale.split(many), strict=True) if len(x) > many else [(x, scale)]
    found = [edges(_cosines(part, factor) > threshold, None).sum(2) for part, factor in parts]
    return found[0] if len(found) == 1 else torch.cat(found)


def _components(x: Tensor, scale: Tensor, threshold: float, mask: Tensor | None, label: Tensor, degree: Tensor) -> None:
    """Fill `label` and `degree` [G, n] for x [G, n, D]."""
    groups, n, _ = x.shape
    if not n:
        return
    many = max(1, _PAIRS // (n * n))
    if n <= FEW:
        for group in (slice(g, g + many) for g in range(0, groups, many)):
            above = _cosines(x[group], scale[group]) > threshold
            label[group], degree[group] = _whole(above, None if mask is None else mask[group])
        return
    small = n * n <= _PAIRS
    height = max(_LEAST, round_up(n // 4, COLUMNS) if small else _PAIRS // n // COLUMNS * COLUMNS)
    buffers = [torch.empty(0, device=x.device) for _ in range(4)]
    for g in range(0, groups, many):
        group = slice(g, g + many)
        known, part = None if mask is None else mask[group], x[group]
        if small:  # filled up once for all of its blocks
            part, buffers[3] = filled_up(part, COLUMNS, buffers[3])
        if small or x.device.type != "cpu" or x.shape[2] < 4 * _DIRECTIONS:
            root, count = _grown(part, scale[group], threshold, known, height, buffers)
        else:
            sketch, order = _sketch(part[0], scale[g])
            known = None if known is None else known[:, order]
            root, count = _grown(part[:, order], scale[group, order], threshold, known, height, buffers, sketch)
            lowest = torch.full_like(root, n).scatter_reduce(1, root, order[None], "amin")
            root, count = (torch.empty_like(y).scatter(1, order[None], y) for y in (lowest.gather(1, root), count))
        label[group], degree[group] = root, count
        if mask is not None:
            label[group].masked_fill_(~mask[group], -1)
            degree[group].masked_fill_(~mask[group], 0)


def _whole(above: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`naive.of_graph` of few tokens: paths grow twofold until they are as long as any can be, and nothing is read."""
    n, edge = above.shape[1], edges(above, mask)
    reach = edge.float()
    for _ in range((n - 1).bit_length()):
        reach = torch.bmm(reach, reach).clamp_(max=1)
    label = torch.where(reach > 0, torch.arange(n, device=edge.device), n).amin(2)
    return label if mask is None else label.masked_fill_(~mask, -1), edge.sum(2)


def _few(
    x: Tensor, scale: Tensor, threshold: float, mask: Tensor | None, parts: Sequence[tuple[int, int]] | None
) -> tuple[Tensor, Tensor]:
    """Those of few tokens on the CPU, from a table of each group or segment: NumPy, whose calls take a third of the time."""
    rows, factor, known = array(x), array(scale), None if mask is None else array(mask)
    label, degree = np.full(x.shape[:-1], -1), np.zeros(x.shape[:-1], np.int64)
    if parts is None:
        many = max(1, _PAIRS // max(1, x.shape[1] ** 2))
        for part in (slice(g, g + many) for g in range(0, len(x) if x.shape[1] else 0, many)):
            above = _cosines_of(rows[part], factor[part]) > threshold
            label[part], degree[part] = _of_table(above, None if known is None else known[part])
    for begin, end in parts or ():
        if begin < end:
            part = slice(begin, end)
            above = _cosines_of(rows[None, part], factor[None, part]) > threshold
            found, degree[part] = (y[0] for y in _of_table(above, None if known is None else known[None, part]))
            label[part] = np.where(found < 0, -1, found + begin)
    return torch.from_numpy(label), torch.from_numpy(degree)


def _cosines(x: Tensor, scale: Tensor) -> Tensor:
    """The whole table [g, n, n] of few tokens."""
    n, x = x.shape[1], x.float()
    x = F.pad(x, (0, 0, 0, round_up(n, COLUMNS) - n)) if n % COLUMNS else x
    return torch.bmm(x, x.transpose(1, 2))[:, :n, :n] * scale[:, None] * scale[:, :, None]


def _cosines_of(x: Any, scale: Any) -> Any:
    """The whole table of arrays x [g, n, D], [g, n, n]."""
    whole = filled(x, COLUMNS)
    table = torch.bmm(whole, whole.transpose(1, 2)).numpy()[:, : x.shape[1], : x.shape[1]]
    return table * scale[:, None] * scale[:, :, None]


def _of_table(above: Any, mask: Any) -> tuple[Any, Any]:
    """`naive.of_graph` of arrays."""
    n, edge = above.shape[1], np.triu(above, 1)
    edge = edge | edge.transpose(0, 2, 1) | np.eye(n, dtype=bool)
    if mask is not None:
        edge &= mask[:, None] & mask[:, :, None]
    label = np.arange(n)[None].repeat(len(edge), 0)
    while ((lower := np.where(edge, label[:, None], n).min(2)) != label).any():
        label = lower
    return label if mask is None else np.where(mask, label, -1), edge.sum(2)


def _grown(
    x: Tensor, scale: Tensor, threshold: float, mask: Tensor | None, height: int, buffers: list[Tensor],
    sketch: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Labels and degrees [g, n] of x, which may be filled up, from blocks of `height` rows. With a `sketch` of one group a block
    is compared with those tokens only that are near to it, if they are few."""
    n = scale.shape[1]
    root = torch.arange(n, device=x.device).repeat(len(x), 1)
    count = torch.ones_like(root)
    for first in range(0, n, height):
        at = torch.arange(first, n, device=x.device)
        near = at if sketch is None else _near(sketch, threshold, first, min(first + height, n))
        if 2 * len(near) > len(at):  # to gather them would not pay
            edge = _edges(x, scale, threshold, mask, first, height, buffers)
        else:
            at, masked = near, None if mask is None else mask[:, near]
            edge = _edges(x[:, at], scale[:, at], threshold, masked, 0, height, buffers)
        if edge.device.type == "cpu" and not edge.any().tolist():
            continue
        count[:, first : first + edge.shape[1]].add_(edge.sum(2))
        count.index_add_(1, at, edge.sum(1))
        root = _joined(root, edge, at)
    return root, count


def _sketch(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens x [n, D] as unit vectors along the directions in which most of a sample lies, with the length of the rest as one
    more number, and an order [n] in which like ones are together. In it, the sketch [n, _DIRECTIONS + 1]: products of its rows are
    nowhere below the cosines."""
    n, size = x.shape
    step = max(1, n // (4 * _DIRECTIONS))
    sample = x[::step].float() * scale[::step, None]
    axes = torch.linalg.qr(sample[::4][:_DIRECTIONS].T)[0]
    axes = torch.linalg.qr(sample.T @ (sample @ axes))[0]
    along = torch.cat([part.float() @ axes for part in x.split(_PAIRS // size + 1)]) * scale[:, None]
    rest = (1 - along.square().sum(1)).clamp_min(0) + _ROUNDING
    order = (along @ along[::step].T).argmax(1).sort(stable=True).indices
    return torch.cat([along, rest.sqrt()[:, None]], 1)[order], order


def _near(sketch: Tensor, threshold: float, first: int, end: int) -> Tensor:
    """Numbers of the tokens from `first` on, all before `end` and of the later ones those that may have an edge to one of these."""
    bound = (sketch[first:end] @ sketch[end:].T).amax(0)
    return torch.cat([torch.arange(first, end), end + (~(bound <= threshold)).nonzero()[:, 0]])


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


def _joined(root: Tensor, edge: Tensor, at: Tensor) -> Tensor:
    """Roots [g, n] int64 (the lowest members of components) with the edges [g, r, c] between the first r of the tokens `at` [c]
    and these taken in.

    The lowest root that a row touches becomes that of all the components that it touches, until nothing changes.
    """
    rows, n = edge.shape[1], root.shape[1]
    number = torch.arange(n, device=root.device).expand_as(root)
    while True:
        known = root[:, at]
        mine = known.float()  # whole numbers below 2^24
        low = torch.where(edge, mine[:, None], float(n)).amin(2)
        low = torch.minimum(low, mine[:, :rows])
        offer = torch.minimum(torch.where(edge, low[..., None], float(n)).amin(1), mine)
        offer[:, :rows] = torch.minimum(offer[:, :rows], low)
        target = number.scatter_reduce(1, known, offer.long(), "amin")
        while not torch.equal(further := target.gather(1, target), target):
            target = further
        joined = target.gather(1, root)
        if torch.equal(joined, root):
            return root
        root = joined
