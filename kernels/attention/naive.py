# SPDX-License-Identifier: Apache-2.0
"""Attention statistics as published code makes them: the whole map, then a sum over it."""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e29
"""A bias of this or less hides a key, as -inf does."""


def attention_map(q: Tensor, k: Tensor, scale: float, bias: Tensor | None, visible: Tensor | None) -> Tensor:
    """softmax(q k^T scale + bias), [n, heads, Q, S] float32; rows that see nothing are 0."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = q.float() @ k.float().transpose(2, 3) * scale
    seen = torch.ones_like(logits, dtype=torch.bool) if visible is None else visible.expand(logits.shape)
    if bias is not None:
        logits, seen = logits + bias.float(), seen & (bias > HIDDEN)
    return logits.masked_fill(~seen, float("-inf")).softmax(-1).masked_fill(~seen, 0)


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
    """[n, heads, S] float32. Cost and memory: the whole map."""
    queries, keys = q.shape[2], k.shape[2]
    place, row = (torch.arange(count, device=q.device) for count in (keys, queries))
    visible = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=q.device)
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    if at is not None:
        visible = visible & (place <= at[:, None, :, None])
    if offset is not None:
        visible = visible & (place <= row[:, None] + offset)
    together = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if cu_seqlens is not None:
        segment = torch.searchsorted(cu_seqlens, place.to(cu_seqlens.dtype), right=True)
        inside = (segment > 0) & (segment < len(cu_seqlens))
        together = (segment[:, None] == segment) & inside
        visible = visible & together
    table = attention_map(q, k, scale, None if key_bias is None else key_bias[:, None, None], visible)
    weight = torch.ones(1, 1, queries, device=q.device) if weight is None else weight.float()
    rows = torch.where(table.amax(-1, keepdim=True) > 0, weight[..., None], 0)
    table = torch.where(rows > 0, table, 0)
    if reduce == "max":
        return table.amax(2)
    total = (table * rows).sum(2)
    return total if reduce == "sum" else total / _or_one((together * rows).sum(2))


def attention_marginals(q: Tensor, k: Tensor, scale: float, prefix: int) -> tuple[Tensor, Tensor]:
    table = attention_map(q, k, scale, None, None)[..., prefix:]
    return table.mean(2), table.sum(3)


def attention_rows(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    is_bool = mask is not None and mask.dtype == torch.bool
    return attention_map(q, k, scale, None if is_bool else mask, mask if is_bool else None)


def _or_one(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1)
