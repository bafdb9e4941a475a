# SPDX-License-Identifier: Apache-2.0
"""The definition of `match`: the whole table of scores, and the best of each row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ragged import segments
from .rule import Rule, inverse_norms, without_huge


def match(
    a: Tensor,
    b: Tensor,
    rule: Rule,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    cu_a: Tensor | None = None,
    cu_b: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if cu_a is None or cu_b is None:
        return _dense(a, b, rule, query_mask, key_mask)
    value = a.new_full((len(a), rule.m), float("-inf") if rule.largest else float("inf"), dtype=torch.float32)
    index = torch.full((len(a), rule.m), -1, device=a.device)
    for (a0, a1), (b0, b1) in zip(segments(cu_a), segments(cu_b), strict=True):
        queries, keys = (
            None if mask is None else mask[None, i:j] for mask, i, j in ((query_mask, a0, a1), (key_mask, b0, b1))
        )
        score, place = _dense(a[None, a0:a1], b[None, b0:b1], rule, queries, keys)
        value[a0:a1], index[a0:a1] = score[0], torch.where(place[0] < 0, -1, place[0] + b0)
    return value, index


def _dense(
    a: Tensor, b: Tensor, rule: Rule, query_mask: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    a, b = a.float(), b.float()
    if rule.normalize:
        a, b = without_huge(a, inverse_norms(a)), without_huge(b, inverse_norms(b))
    score = a @ b.transpose(1, 2)
    if rule.normalize:
        score = score * inverse_norms(b)[:, None]
    row, column = (torch.arange(x.shape[1], device=x.device) for x in (a, b))
    allowed = rule.allowed(row[:, None], column).expand_as(score)
    for mask in (
        None if query_mask is None else query_mask[:, :, None],
        None if key_mask is None else key_mask[:, None],
    ):
        allowed = allowed if mask is None else allowed & mask
    score = (score if rule.largest else -score).masked_fill(~allowed, float("-inf"))
    score = F.pad(score, (0, max(0, rule.m - score.shape[2])), value=float("-inf"))
    if rule.m == 1:
        value, index = score.max(dim=2, keepdim=True)  # the first of equals
    else:
        value, index = (x[..., : rule.m] for x in score.sort(dim=2, descending=True, stable=True))
    none = value == float("-inf")
    if rule.normalize:
        value = value * inverse_norms(a)[..., None]
    value = value.masked_fill(none, float("-inf"))
    return value if rule.largest else -value, index.masked_fill(none, -1)
