# SPDX-License-Identifier: Apache-2.0
"""`match` in tiles of scores, with plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ragged import segments
from .rule import LEAST, Rule, inverse_norms, norms, without_huge

_TILE = 1 << 22
"""Scores in a tile, 16 MB: as large as a matrix product has to be to run at full speed."""
_COLUMNS = 2048
_COPY = 1 << 23
"""Numbers in a block of `b`, where it has to be copied."""
_SMALL = 1 << 17
"""Up to so many scores the time of the calls counts, and not that of a `max` with an index."""
_NONE = np.float32("-inf")
ROWS, COLUMNS = 8, 32
"""Sides of tiles are multiples of these (filled up with zeros): there the matrix products of MKL do not depend on the place in
the tile or on its size, so that equal tokens have equal scores and a batch gives what its members give alone."""


def match(
    a: Tensor,
    b: Tensor,
    rule: Rule,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_a: Tensor | None = None,
    cu_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    parts = None if cu_a is None or cu_b is None else list(zip(segments(cu_a), segments(cu_b), strict=True))
    if a.device.type == "cpu" and rule.m == 1 and not rule.same_cell:
        shapes = [(a.shape[:-1].numel(), b.shape[1])] if parts is None else [(i - h, k - j) for (h, i), (j, k) in parts]
        if 0 < sum(rows * columns for rows, columns in shapes) <= _SMALL:
            return _few(a, b, rule, query_mask, key_mask, parts)
    left = right = None
    if rule.normalize:
        left = inverse_norms(a)
        right = left if b is a else inverse_norms(b)
        a, b = without_huge(a, left), without_huge(b, right)
    value = a.new_full((*a.shape[:-1], rule.m), float("-inf"), dtype=torch.float32)
    index = torch.full(value.shape, -1, device=a.device)
    search = _same_cell if rule.same_cell else _search
    if parts is None:
        search(a, b, right, rule, key_mask, value, index)
    for (a0, a1), (b0, b1) in parts or ():
        scale, keys = (None if x is None else x[None, b0:b1] for x in (right, key_mask))
        search(a[None, a0:a1], b[None, b0:b1], scale, rule, keys, value[None, a0:a1], index[None, a0:a1], b0)
    none = index < 0 if query_mask is None else index.masked_fill_(~query_mask[..., None], -1) < 0
    if left is not None:
        value.mul_(left[..., None])
    value.masked_fill_(none, float("-inf"))
    return value if rule.largest else value.neg_(), index


def _few(
    a: Tensor,
    b: Tensor,
    rule: Rule,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    parts: Sequence[tuple[tuple[int, int], tuple[int, int]]] | None,
) -> tuple[Tensor, Tensor]:
    """`match` for m = 1 in small tables on the CPU, one of all or of each segment. The products are those of `_search`; the rest is
    NumPy, whose calls take a third of the time."""
    left = _side(a, query_mask, rule)
    right = (*left[:2], _as_array(key_mask)) if b is a else _side(b, key_mask, rule)
    if parts is None:
        value, index = _whole(left, right, rule)
        return torch.from_numpy(value), torch.from_numpy(index)
    shape = len(left[0]), 1
    value, index = np.full(shape, _NONE if rule.largest else -_NONE), np.full(shape, -1)
    for (a0, a1), (b0, b1) in parts:
        if a0 < a1 and b0 < b1:
            rows, columns = (
                [None if x is None else x[None, part] for x in side]
                for side, part in ((left, slice(a0, a1)), (right, slice(b0, b1)))
            )
            score, place = _whole(rows, columns, rule)
            value[a0:a1], index[a0:a1] = score[0], np.where(place[0] < 0, -1, place[0] + b0)
    return torch.from_numpy(value), torch.from_numpy(index)


def _side(x: Tensor, mask: Tensor | None, rule: Rule) -> tuple[Any, Any, Any]:
    """Arrays of the rows, of 1 over their lengths, and of which count. Lengths are for cosines, where rows that are too long for
    float32 are zero vectors."""
    x = x.detach() if x.requires_grad else x
    rows, inverse = array(x), None
    if rule.normalize:
        inverse = 1 / np.maximum(norms(x).numpy(), np.float32(LEAST))
        if not inverse.all():
            rows = np.where(inverse[..., None] == 0, np.float32(0), rows)
    return rows, inverse, _as_array(mask)


def _as_array(mask: Tensor | None) -> Any:
    return None if mask is None else mask.numpy()


def _whole(a: Any, b: Any, rule: Rule) -> tuple[Any, Any]:
    """`match` in one table of arrays."""
    (a, left, query_mask), (b, right, key_mask) = a, b
    rows, columns = a.shape[1], b.shape[1]
    tall, wide = (filled(x, unit) for x, unit in ((a, ROWS), (b, COLUMNS)))
    scores = torch.bmm(tall, wide.transpose(1, 2)).numpy()[:, :rows, :columns]
    if right is not None:
        scores = scores * right[:, None]
    if not rule.largest:
        scores = -scores
    if key_mask is not None:
        scores = np.where(key_mask[:, None], scores, _NONE)
    if rule.exclude_self or rule.low is not None or rule.high is not None:
        number = np.arange(max(rows, columns))
        scores = np.where(rule.allowed(number[:rows, None], number[:columns]), scores, _NONE)
    index, value = scores.argmax(2), scores.max(2, keepdims=True)  # the first of equals
    none = value == _NONE
    if query_mask is not None:
        none |= ~query_mask[..., None]
    if left is not None:
        value *= left[..., None]
    value[none], index[none[..., 0]] = _NONE, -1
    return value if rule.largest else -value, index[..., None]


def array(x: Tensor) -> Any:
    """Numbers of the CPU as NumPy sees them, in float32 unless they are bool."""
    x = x.detach() if x.requires_grad else x
    return (x if x.dtype == torch.bool else x.float()).numpy()


def filled(x: Any, unit: int) -> Tensor:
    """x [G, n, D], an array of float32, filled up with zero rows to a multiple of `unit`."""
    shape = len(x), round_up(x.shape[1], unit), x.shape[2]
    if x.shape == shape and x.flags.c_contiguous and x.flags.writeable:
        return torch.from_numpy(x)
    found = np.zeros(shape, np.float32)
    found[:, : x.shape[1]] = x
    return torch.from_numpy(found)


def _search(
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    rule: Rule,
    key_mask: Tensor | None,
    value: Tensor,
    index: Tensor,
    offset: int = 0,
) -> None:
    """Fill `value` and `index` [G, M, m] for a [G, M, D] and b [G, N, D] with the factors `scale` [G, N] of the columns."""
    groups, rows, columns = a.shape[0], a.shape[1], b.shape[1]
    if not (groups and rows and columns):
        return
    whole_rows, whole_columns = round_up(rows, ROWS), round_up(columns, COLUMNS)
    most = max(COLUMNS, _COPY // max(1, a.shape[2]) // COLUMNS * COLUMNS)
    width = min(whole_columns, max(_COLUMNS, _TILE // whole_rows), most)
    height = min(whole_rows, _TILE // width // ROWS * ROWS)
    many = max(1, min(_TILE // height, most) // width) if width == whole_columns else 1
    tiles, lefts, rights = (torch.empty(0, device=a.device) for _ in range(3))
    number = torch.arange(max(rows, columns), device=a.device)
    for g in range(0, groups, many):
        group = slice(g, g + many)
        for r0, r1 in rule.blocks(rows, height):
            left, lefts = filled_up(a[group, r0:r1], ROWS, lefts)
            best, place = value[group, r0:r1], index[group, r0:r1]
            end = rule.last(r1 - 1, columns)
            for c0 in range(rule.first(r0), end, width):
                c1 = min(c0 + width, end)
                right, rights = filled_up(b[group, c0:c1], COLUMNS, rights)
                shape = (len(left), left.shape[1], right.shape[1])
                tiles = roomy(tiles, shape)
                tile = torch.bmm(left, right.transpose(1, 2), out=view(tiles, shape))
                scores = tile[:, : r1 - r0, : c1 - c0]
                if scale is not None:
                    scores.mul_(scale[group, None, c0:c1])
                if not rule.largest:
                    scores.neg_()
                if key_mask is not None:
                    scores.masked_fill_(~key_mask[group, None, c0:c1], float("-inf"))
                if (
                    rule.first(r1 - 1) > c0
                    or rule.last(r0, columns) < c1
                    or (rule.exclude_self and c0 < r1 and r0 < c1)
                ):
                    scores.masked_fill_(~rule.allowed(number[r0:r1, None], number[c0:c1]), float("-inf"))
                tile[..., c1 - c0 :] = float("-inf")
                _keep_best(tile, best, place, c0 + offset)


def _same_cell(
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    rule: Rule,
    key_mask: Tensor | None,
    value: Tensor,
    index: Tensor,
    offset: int = 0,
) -> None:
    """As `_search`, where each row has at most one partner per frame: no matrix product."""
    (groups, rows, size), columns = a.shape, b.shape[1]
    height = max(1, _TILE // max(1, size))
    many = max(1, height // max(1, rows))
    steps = rule.steps(rows, columns) if rows and columns else range(0)
    for step in (s for s in steps if s or not rule.exclude_self):
        shift = step * rule.frame
        blocks = range(max(0, -shift), min(rows, columns - shift), height)
        for g, r0 in product(range(0, groups, many), blocks):
            group, r1 = slice(g, g + many), min(r0 + height, rows, columns - shift)
            partner = slice(r0 + shift, r1 + shift)
            score = (a[group, r0:r1].float() * b[group, partner].float()).sum(2)
            if scale is not None:
                score.mul_(scale[group, partner])
            if not rule.largest:
                score.neg_()
            if key_mask is not None:
                score.masked_fill_(~key_mask[group, partner], float("-inf"))
            found = torch.arange(partner.start, partner.stop, device=a.device).expand_as(score) + offset
            _merge(score[..., None], found[..., None], value[group, r0:r1], index[group, r0:r1])


def _keep_best(tile: Tensor, value: Tensor, index: Tensor, first: int) -> None:
    """Merge the best of the first r rows of `tile` [g, R, c], whose columns begin at `first` and come after all seen, into the
    lists `value` and `index` [g, r, m]."""
    fine, coarse, start = _groups(tile, value.shape[1])
    if value.shape[2] == 1:
        top, place, _, _ = _best_of_groups(fine, coarse, start)
        _merge(top[..., None], place[..., None].add_(first), value, index)
        return
    found, places = [], []
    for _ in range(min(value.shape[2], tile.shape[2])):
        top, place, group, members = _best_of_groups(fine, coarse, start)
        if tile.device.type == "cpu" and not (top > value[..., -1]).any().tolist():
            break
        found.append(top)
        places.append(place)
        members.scatter_(1, place.flatten()[:, None] % fine.shape[1], float("-inf"))
        fine.index_copy_(0, (start + group).flatten(), members)
        coarse.scatter_(2, group[..., None], members.amax(1).view(*group.shape, 1))
    if found:
        _merge(torch.stack(found, 2), torch.stack(places, 2).add_(first), value, index)


def _groups(tile: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of `tile` [g, R, c] in groups: values `fine` [g * R * groups, width], maxima `coarse` [g, rows, groups], and where
    in `fine` the groups of a row begin, `start` [g, rows]."""
    fine = tile.view(-1, group_width(tile.shape[2]))
    coarse = fine.amax(1).view(*tile.shape[:2], -1)
    start = torch.arange(0, len(fine), coarse.shape[2], device=tile.device).view(*tile.shape[:2])
    return fine, coarse[:, :rows], start[:, :rows]


def _best_of_groups(fine: Tensor, coarse: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest value of each row, its column (the first of equals), its group of columns, all [g, rows], and the members of
    that group [g * rows, width]. `max` with an index is slow, so it reads only maxima and one group."""
    top, group = coarse.max(2)
    members = fine.index_select(0, (start + group).flatten())
    return top, members.max(1).indices.view_as(group).add_(group, alpha=fine.shape[1]), group, members


def first_max(tile: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of each row of `tile` [g, r, c] and its column, the first of equals."""
    return _best_of_groups(*_groups(tile, tile.shape[1]))[:2]


def _merge(score: Tensor, place: Tensor, value: Tensor, index: Tensor) -> None:
    """Merge sorted lists [g, r, x] into the sorted lists `value` and `index` [g, r, m] in place; of equals the old come first."""
    if value.shape[2] == 1:
        better = score > value
        torch.where(better, score, value, out=value)
        torch.where(better, place, index, out=index)
        return
    merged, order = torch.cat([value, score], 2).sort(dim=2, descending=True, stable=True)
    value.copy_(merged[..., : value.shape[2]])
    chosen = torch.cat([index, place], 2).gather(2, order[..., : value.shape[2]])
    index.copy_(chosen.masked_fill_(value == float("-inf"), -1))


def group_width(columns: int) -> int:
    """How many columns to look at together; `amax` over fewer than 32 is slow."""
    return next((width for width in (64, 32) if columns % width == 0), columns)


def round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def roomy(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A flat buffer that holds `shape`: the given one if it is large enough."""
    need = 1
    for side in shape:
        need *= side
    return buffer if buffer.numel() >= need else buffer.new_empty(need)


def view(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    need = 1
    for side in shape:
        need *= side
    return buffer[:need].view(shape)


def filled_up(x: Tensor, unit: int, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """`x` [g, n, D] in float32, filled up with zero rows to a multiple of `unit` (`x` itself if it fits), and the buffer, which may
    hold it."""
    rows = round_up(x.shape[1], unit)
    if rows == x.shape[1] and x.dtype == torch.float32 and x.stride(2) == 1:
        return x, buffer
    shape = (x.shape[0], rows, x.shape[2])
    buffer = roomy(buffer, shape)
    out = view(buffer, shape)
    out[:, : x.shape[1]].copy_(x)
    out[:, x.shape[1] :].zero_()
    return out, buffer
