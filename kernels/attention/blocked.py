# SPDX-License-Identifier: Apache-2.0
"""Attention statistics from blocks of rows that stay in the cache: logits, their exponentials, the sums over them, and the
next block takes their place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .naive import HIDDEN

LOG2E = math.log2(math.e)
GONE = 10 * HIDDEN
CELLS = 1 << 18
"""Cells of the map in a block, a megabyte."""
TOGETHER = 2
"""Heads whose logits on few queries are made together, even where they make the block larger: then each thread has some."""
ROWS = 128
"""Rows of a block even where they make it larger: with fewer the matrix product gets slow."""


@dataclass
class Block:
    """Some rows of the map over its first `columns` keys (those behind are hidden): softmax = exps * share.

    exps [b, h, r, columns], share [b, h, r, 1]: rows that see nothing have share 0. whole: it is all of the map.
    """

    batch: slice
    heads: slice
    rows: slice
    columns: int
    exps: Tensor
    share: Tensor
    whole: bool = False

    def sums(self, share: Tensor) -> Tensor:
        """Sums of the columns of exps, each row times its `share` [b, h, r, 1]: [b, h, columns]."""
        b, h, _, columns = self.exps.shape
        return torch.bmm(share.flatten(0, 1).transpose(1, 2), self.exps.flatten(0, 1)).view(b, h, columns)


def blocks(
    q: Tensor,
    k: Tensor,
    scale: float,
    masks: Sequence[Tensor] = (),
    counts: Tensor | None = None,
    at: Tensor | None = None,
    offset: int | None = None,
) -> Iterator[Block]:
    """The map of q [n, heads, Q, d] and k [n, kv_heads, S, d], block after block in the same memory.

    masks (see `_hide`): broadcastable to [n, heads, Q, S]; counts, broadcastable to [n, heads, Q]: what is False is never read;
    at [n, Q] or offset: the last key that a row sees.
    """
    (n, heads, queries, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    if not n * heads * queries * keys:
        return
    group, shape = heads // kv_heads, (n, heads, queries, keys)
    each = group * queries * keys
    batch_step = min(n, max(1, CELLS // (kv_heads * each)))
    kv_step = kv_heads if batch_step > 1 else min(kv_heads, max(1, CELLS // each))
    row_step = queries if each <= CELLS else min(queries, max(CELLS // (group * keys), -(-ROWS // group)))
    whole = batch_step == n and kv_step == kv_heads and row_step == queries
    buffer = None if whole else q.new_empty(batch_step * kv_step * group * row_step * keys, dtype=torch.float32)
    masks = [mask.expand(shape) for mask in masks]
    counts = None if counts is None else counts.expand(shape[:3])
    masked = bool(masks) or at is not None or offset is not None
    place = row = q
    if at is not None or offset is not None:
        place, row = (torch.arange(count, device=q.device) for count in (keys, queries))
    for i in range(0, n, batch_step):
        batch = slice(i, min(i + batch_step, n))
        for h in range(0, kv_heads, kv_step):
            some = (k if whole else k[batch, h : h + kv_step]).float()
            pairs = some.shape[0] * some.shape[1]
            some = some.reshape(pairs, keys, d).transpose(1, 2)
            of = slice(h * group, min(h + kv_step, kv_heads) * group)
            for r in range(0, queries, row_step):
                rows = slice(r, min(r + row_step, queries))
                columns = keys if offset is None else min(keys, rows.stop + offset)
                if columns <= 0:
                    continue
                x = (q if whole else q[batch, of, rows]).float() * (scale * LOG2E)
                if counts is not None:
                    x.masked_fill_(~counts[batch, of, rows, None], 0)
                out = None if buffer is None else buffer[: x.numel() // d * columns].view(pairs, -1, columns)
                seen = some if columns == keys else some[..., :columns]
                exps = torch.bmm(x.reshape(pairs, -1, d), seen, out=out).view(*x.shape[:3], columns)
                for mask in masks:
                    _hide(exps, mask[batch, of, rows, :columns])
                if at is not None:
                    exps.masked_fill_(place[:columns] > at[batch, None, rows, None], GONE)
                if offset is not None:
                    edge = min(columns, max(0, r + offset + 1))
                    exps[..., edge:].masked_fill_(place[edge:columns] > row[rows, None] + offset, GONE)
                top = exps.amax(3, keepdim=True)
                exps.sub_(top).exp2_()  # 2^x is several times as fast as e^x here
                share = exps.sum(3, keepdim=True).reciprocal_()
                if masked:
                    share.masked_fill_(top <= HIDDEN, 0)
                yield Block(batch, of, rows, columns, exps, share, whole and columns == keys)


def attention_received(
    q: Tensor,
    k: Tensor,
    scale: float,
    reduce: str,
    weight: Tensor | None,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    at: Tensor | None,
    offset: int | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """[n, heads, S] float32."""
    if cu_seqlens is not None and (bounds := cu_seqlens.tolist()) != [0, k.shape[2]]:
        return _in_segments(q, k, scale, reduce, weight, key_mask, key_bias, offset, bounds)
    n, heads, queries, _ = q.shape
    found = q.new_zeros(n, heads, k.shape[2], dtype=torch.float32)
    masks = [mask[:, None, None] for mask in (key_bias, key_mask) if mask is not None]
    if reduce != "max" and weight is None and not masks and at is None and offset is None:
        for block in blocks(q, k, scale):  # all queries count, and see all keys
            found = _added(found, block, block.sums(block.share))
        return found / max(1, queries) if reduce == "mean" else found
    total = found.new_zeros(n, heads, 1)
    counts = None if weight is None else weight != 0
    weight = found.new_ones(1, 1, 1) if weight is None else weight.float()
    weight = weight.expand(n, heads, queries)[..., None]
    for block in blocks(q, k, scale, masks, counts, at, offset):
        mine = weight if block.whole else weight[block.batch, block.heads, block.rows]
        if reduce == "max":
            into = found[block.batch, block.heads, : block.columns]
            block.exps.mul_(block.share * (mine > 0))
            torch.maximum(into, block.exps.amax(2), out=into)
            continue
        found = _added(found, block, block.sums(block.share * mine))
        if reduce == "mean":
            total = _added(total, block, (mine * (block.share > 0)).sum(2))
    return found / total.masked_fill(total <= 0, 1) if reduce == "mean" else found


def _added(total: Tensor, block: Block, sums: Tensor) -> Tensor:
    """What has been added up over heads and columns [n, heads, S] with the `sums` of a block, in place if it is not all."""
    if block.whole:
        return sums
    total[block.batch, block.heads, : sums.shape[2]].add_(sums)
    return total


def attention_flow(
    q: Tensor, k: Tensor, scale: float, share: Tensor, key_mask: Tensor | None, offset: int | None, steps: int
) -> Tensor:
    """[n, heads, S] float32. A map that fits into a block is made once."""
    masks = [] if key_mask is None else [key_mask[:, None, None]]
    first = next(blocks(q, k, scale, masks, share != 0, None, offset), None)
    for _ in range(steps):
        if first is not None and first.whole:
            share = first.sums(first.share * share[..., None])
        else:
            share = attention_received(q, k, scale, "sum", share, key_mask, None, None, offset, None)
    return share


def attention_received_from(q: Tensor, k: Tensor, scale: float, who: Callable[[Tensor], Tensor]) -> Tensor:
    """[n, heads, S] float32. A map that fits into a block is made once."""
    first = next(blocks(q, k, scale), None)
    if first is None or not first.whole:
        every = attention_received(q, k, scale, "mean", None, None, None, None, None, None)
        asked = who(every.mean(1))[:, None]
        return attention_received(q, k, scale, "mean", asked, None, None, None, None, None)
    asked = who((first.sums(first.share) / q.shape[2]).mean(1))[:, None, :, None]
    return first.sums(first.share * asked) / asked.sum(2).clamp_min(1)


def _in_segments(
    q: Tensor,
    k: Tensor,
    scale: float,
    reduce: str,
    weight: Tensor | None,
    key_mask: Tensor | None,
    key_bias: Tensor | None,
    offset: int | None,
    bounds: list[int],
) -> Tensor:
    """Neighbouring segments of one length are a batch."""
    found = q.new_zeros(1, q.shape[1], k.shape[2], dtype=torch.float32)
    first = 0
    while first + 1 < len(bounds):
        start, length, last = bounds[first], bounds[first + 1] - bounds[first], first + 1
        while last + 1 < len(bounds) and bounds[last + 1] - bounds[last] == length:
            last += 1
        count, first = last - first, last
        if length:
            parts = [
                None
                if x is None
                else x[0].narrow(axis, start, count * length).unflatten(axis, (count, length)).movedim(axis, 0)
                for x, axis in ((q, 1), (k, 1), (weight, 1), (key_mask, 0), (key_bias, 0))
            ]
            queries, keys, *masks = parts
            assert queries is not None and keys is not None
            part = attention_received(queries, keys, scale, reduce, *masks, None, offset, None)
            found[0, :, start : start + count * length] = part.transpose(0, 1).flatten(1)
    return found


def attention_marginals(q: Tensor, k: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    """([n, heads, S - prefix], [n, heads, Q]): mean over queries, sum over keys, of the columns from `prefix` on."""
    n, heads, queries, _ = q.shape
    received = q.new_zeros(n, heads, k.shape[2] - prefix, dtype=torch.float32)
    given = received.new_zeros(n, heads, queries)
    for block in blocks(q, k, scale):
        exps, into = block.exps[..., prefix:], received[block.batch, block.heads]
        share = block.share.flatten(0, 1).transpose(1, 2)
        into.add_(torch.bmm(share, block.exps.flatten(0, 1)).view(*into.shape[:2], -1)[..., prefix:])
        torch.mul(exps.sum(3), block.share[..., 0], out=given[block.batch, block.heads, block.rows])
    return received / max(1, queries), given


def attention_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """[n, heads, Q, S] float32, made where they stay: nothing beside them but the keys of a block in float32."""
    (n, heads, queries, d), (kv_heads, keys) = q.shape, k.shape[1:3]
    shape = n, heads, queries, keys
    if not all(shape):
        return q.new_zeros(shape, dtype=torch.float32)
    group = heads // kv_heads
    together = max(TOGETHER, CELLS // (group * queries * keys))
    x = q.float() * scale
    if n == 1 and together >= kv_heads:
        table = torch.bmm(x.reshape(kv_heads, -1, d), k.float().reshape(kv_heads, keys, d).transpose(1, 2))
        return _weights(table.view(shape), mask)
    found = q.new_empty(shape, dtype=torch.float32)
    x = x.reshape(n, kv_heads, -1, d)
    mask = None if mask is None else mask.expand(shape)
    for i in range(n):
        for h in range(0, kv_heads, together):
            part, of = slice(h, h + together), slice(h * group, (h + together) * group)
            table = found[i, of]
            some = k[i, part].float().transpose(1, 2)
            torch.bmm(x[i, part], some, out=table.view(len(some), -1, keys))
            _weights(table, None if mask is None else mask[i, of])
    return found


def _weights(table: Tensor, mask: Tensor | None) -> Tensor:
    """Logits [..., Q, S] as softmax attention, in place; rows that see nothing are 0."""
    if mask is None:
        return torch.softmax(table, -1, out=table)
    _hide(table, mask, 1.0)
    blind = table.amax(-1, keepdim=True) <= HIDDEN
    return torch.softmax(table, -1, out=table).masked_fill_(blind, 0)


def _hide(table: Tensor, mask: Tensor, unit: float = LOG2E) -> None:
    """Take a mask, True where something is seen, or a bias, times `unit`, into the logits."""
    if mask.dtype == torch.bool:
        table.masked_fill_(~mask, GONE)
    else:
        table.add_(mask.float(), alpha=unit).masked_fill_(mask <= HIDDEN, GONE)
