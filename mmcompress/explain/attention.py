# SPDX-License-Identifier: Apache-2.0
"""Explanations by attention: rows of the last layer, and attention rollout."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Unpack

from ..runtime.packing import Group
from .cells import before_cut, slots_of
from .result import Explanation
from .session import Asked, Session, session
from .tam import jointly_scaled
from .taps import AttentionTap, attention_block

NORMALISE = ("joint", "visual")
BLOCK = 128
"""Rows of attention that are made at a time."""


@torch.no_grad()
def last_attention(
    model: Any,
    processor: Any,
    visuals: Any = None,
    question: str = "",
    *,
    layer: int = -1,
    normalise: str = "joint",
    **asked: Unpack[Asked],
) -> Explanation:
    """Attention of the last layer (or another) from where each token is read, mean over heads, on the visual tokens.

    Arguments as in `token_activation_map`. An answer token is read where it is predicted, a question token at itself.
    layer      number of the layer. In a compressed model, cells whose tokens that layer does not have are missing.
    normalise  "joint": scaled together with the attention on question and answer read so far, as token activation maps are;
               "visual": over the cells alone, so that every map has its 1.

    Cost: one row of attention per token and head. Raises also NotImplementedError for sliding windows and linear attention, and for
    plans that rewrite attention.
    """
    check_normalise(normalise)
    with session(model, processor, visuals, question, **asked) as s:
        refuse_rewriting(s)
        index = layer_number(s, layer)
        tap = AttentionTap([index])
        s.run(tap)
        return last_attention_of(s, tap, index, normalise)


def last_attention_of(s: Session, tap: AttentionTap, index: int, normalise: str = "joint") -> Explanation:
    """Attention of layer `index` in a session that has run under `tap`."""
    assert s.trace is not None
    heads = tap.heads(index)
    group = [g for g in s.trace.call.groups if g.start <= index][-1]
    at = s.slots(s.text_places, group)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    weights = heads.attention_of(zero, at[None]).mean(1)[0].cpu()
    rows = s.rows(index)
    maps, relevance = on_cells(s, weights, group, rows, at, normalise)
    return s.explanation("last-layer attention", {"layer": index, "normalise": normalise}, maps, relevance, rows)


@torch.no_grad()
def attention_rollout(
    model: Any,
    processor: Any,
    visuals: Any = None,
    question: str = "",
    *,
    normalise: str = "joint",
    **asked: Unpack[Asked],
) -> Explanation:
    """Attention followed down to the inputs: the product over all layers of half the attention (mean over heads) and half the
    identity, for the residual stream; the row where each token is read.

    Abnar and Zuidema, "Quantifying Attention Flow in Transformers", ACL 2020, arXiv 2005.00928. Arguments as in
    `token_activation_map` and `last_attention`. Compressed models: a row goes back through the cuts of the language model, a token
    that was merged there hands it to its sources by their shares; what was merged before the language model shows its token's
    value in every cell.

    Only the T rows are carried, from the last layer to the first. Cost: all attention once more (S^2 D per layer). Memory: one
    hidden state per token and layer, and 128 rows of attention. Raises what `last_attention` raises.
    """
    check_normalise(normalise)
    with session(model, processor, visuals, question, **asked) as s:
        refuse_rewriting(s)
        tap = AttentionTap(range(len(s.adapter.language_model.layers)))
        s.run(tap)
        return rollout_of(s, tap, normalise)


def rollout_of(s: Session, tap: AttentionTap, normalise: str = "joint") -> Explanation:
    """Attention rollout of a session that has run under `tap`, which listened to all layers."""
    assert s.trace is not None
    groups = s.trace.call.groups
    at = s.slots(s.text_places, groups[-1])
    carried = F.one_hot(at, tap.length(tap.layers[-1])).float()
    for i in reversed(tap.layers):
        heads = tap.heads(i)
        carried = carried.to(heads.hidden.device)
        carried = back_through_cut(0.5 * carried + 0.5 * through(carried, heads), groups, i)
    rows = s.rows(0)
    maps, relevance = on_cells(s, carried.cpu(), groups[0], rows, s.slots(s.text_places, groups[0]), normalise)
    return s.explanation("attention rollout", {"normalise": normalise}, maps, relevance, rows)


def through(rows: Tensor, heads: Any) -> Tensor:
    """Rows [T, S] times the attention of a layer (mean over heads)."""
    found = torch.zeros_like(rows)
    for first in range(0, rows.shape[1], BLOCK):
        last = min(first + BLOCK, rows.shape[1])
        found += rows[:, first:last] @ attention_block(heads, first, last).mean(0)
    return found


def back_through_cut(rows: Tensor, groups: Sequence[Group], layer: int) -> Tensor:
    """Rows [T, S] at the input of `layer` as those at the output of the layer before it."""
    for before, group in itertools.pairwise(groups):
        if group.start == layer:
            return before_cut(rows, before, group)
    return rows


def on_cells(
    s: Session, values: Tensor, group: Group, rows: Sequence[Tensor], text: Tensor, normalise: str
) -> tuple[Tensor, Tensor]:
    """Values [T, S] >= 0 on the tokens of `group`, as maps [T, cells] from 0 to 1 and relevances [T, T] in their unit."""
    slots = slots_of(torch.cat(list(rows)), group)
    order = torch.arange(len(values))
    seen = order < order[:, None].clamp_min(s.questions)
    relevance = values[:, text].masked_fill(~seen, float("nan"))
    shown = relevance if normalise == "joint" else torch.full_like(relevance, float("nan"))
    maps, scaled = jointly_scaled(values[:, slots.clamp_min(0)], shown, slots >= 0)
    return maps, scaled


def layer_number(s: Session, layer: int) -> int:
    depth = len(s.adapter.language_model.layers)
    if not -depth <= layer < depth:
        raise ValueError(f"layer={layer}: the language model has layers 0 to {depth - 1} (or -{depth} to -1)")
    return layer % depth


def check_normalise(normalise: str) -> None:
    if normalise not in NORMALISE:
        raise ValueError(f"normalise={normalise!r}: choose one of {', '.join(NORMALISE)}")


def refuse_rewriting(s: Session) -> None:
    if s.engine is not None and s.engine.plan.attention_stages:
        raise NotImplementedError(
            f"{s.engine.plan!r} rewrites attention behind its kernel, where it is not read: use the token activation map"
        )
