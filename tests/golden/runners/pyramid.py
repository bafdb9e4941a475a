# SPDX-License-Identifier: Apache-2.0
"""pyramiddrop, sparsevlm (both versions), transprune: several cuts inside the LLM."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmcompress as mm
from mmcompress.budget import kept_beside_recycled, recycling
from mmcompress.ops import attention_rows
from mmcompress.ops.relevance import text_relevance
from mmcompress.ops.transitions import transition, transition_value
from mmcompress.runtime.packing import Group, pack, renumbered
from mmcompress.runtime.rotary import rotate

from ..form import Arrays, Results, runner, visuals


def tables(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Rotary tables [1, S, dim] of the position ids [1, S]."""
    angles = positions[..., None].float() * base ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def attention_of(
    rows: Tensor, hidden: Tensor, q: Tensor, k: Tensor, heads: int, positions: Tensor, base: float
) -> Tensor:
    """Causal attention of the tokens `rows` [Q] over the normed hidden states [1, S, D], mean over heads: [1, Q, S]."""
    cos, sin = tables(positions, hidden.shape[-1] // heads, base)
    queries, keys = (
        rotate(F.linear(hidden, weight).unflatten(-1, (heads, -1)).transpose(1, 2), cos, sin) for weight in (q, k)
    )
    causal = (torch.arange(hidden.shape[1]) <= rows[:, None])[None, None]
    return attention_rows(queries[:, :, rows], keys, queries.shape[-1] ** -0.5, causal).mean(1)


class Sequence:
    """One row of a batch, as the engine cuts it: `prefix` text tokens, visual ones, more text."""

    def __init__(self, prefix: int, visual: int, text: int) -> None:
        self.prefix, self.visual = prefix, visual
        self.origin = torch.arange(prefix + visual + text)
        self.positions = self.origin[None]

    @property
    def at(self) -> Tensor:
        """Places of the visual tokens, [n]."""
        return torch.arange(self.prefix, self.prefix + self.visual)

    @property
    def text(self) -> Tensor:
        """Places of the text behind them, [T]."""
        return torch.arange(self.prefix + self.visual, len(self.origin))

    def cut(self, chosen: mm.Selection, hidden: Tensor, reindex: bool) -> Tensor:
        """Keep what was chosen; hidden states [1, S, D] as the next layer gets them."""
        slots, places = self.at[chosen.keep], torch.arange(len(self.origin))[None]
        places = places.index_fill(1, self.at, -1).scatter(1, slots, slots.sort(dim=1).values)
        count = len(self.origin) - self.visual + chosen.k
        packed = pack(places, [count])
        merges = [(torch.tensor([[0]]), self.at[None], chosen)] if chosen.merges else []
        group = Group(0, len(self.origin), count, [count], from_previous=packed.source, merges=merges)
        self.positions, _ = renumbered(self.positions, places, packed, None, reindex)
        self.origin, self.visual = self.origin[packed.source[0]], chosen.k
        return group.enter(hidden)


@runner("pyramiddrop")
def pyramiddrop(arrays: Arrays, params: dict[str, Any]) -> Results:
    cuts = len(params["ratios"])
    stage = mm.PyramidDrop(ratios=tuple(params["ratios"]), layers=tuple(range(1, cuts + 1)))
    budgets = stage.budgets(params["n_image"], cuts + 1)
    row = Sequence(params["prefix"], params["n_image"], params["n_text"])
    for i, k in enumerate(budgets):
        hidden = arrays[f"s{i}_in"]
        normed = F.rms_norm(hidden, hidden.shape[-1:], arrays["norm_weight"], 1e-6)
        attention = attention_of(
            row.text[-1:],
            normed,
            arrays["q_weight"],
            arrays["k_weight"],
            params["heads"],
            row.positions,
            params["rope_base"],
        )
        seen = visuals(hidden[:, row.at], k, **{"last_attention@next": attention[:, 0, row.at]})
        chosen = stage.select(seen)
        yield f"s{i}_kept_image", chosen.keep[0]
        yield f"s{i}_out", row.cut(chosen, hidden, stage.positions == "reindex")
        yield f"s{i}_position_ids", row.positions


@runner("sparsevlm", "sparsevlm_plus")
def sparsevlm(arrays: Arrays, params: dict[str, Any]) -> Results:
    plus = params["version"] == "2_0"
    stage = mm.SparseVLM(version="2.0", heads=14) if plus else mm.SparseVLM()
    row = Sequence(params["n_prefix"], params["n_image"], params["n_text"])
    embeds = arrays["input_embeds"]
    relevance = text_relevance(embeds[:, row.at], embeds[:, row.text])
    yield "rater_score", relevance[0]
    yield "rater_index", stage.raters(relevance)[0].nonzero()[:, 0]
    for i, kept in enumerate(params["keep_lists"]):
        kept = min(kept, row.visual - 1)
        k = kept if plus else kept + recycling(row.visual - kept)[1]
        attention = arrays[f"s{i}_attention"][:, :, row.text][..., row.at]
        hidden, dim = arrays[f"s{i}_layer_output"], params["head_dim"]
        cos, sin = tables(row.positions, dim, params["rope_base"])
        ones = rotate(torch.ones_like(cos)[:, None], cos, sin)[:, 0]
        signals = {
            "text_relevance": relevance,
            "text_attention": attention.mean(1),
            "text_attention_heads": attention,
            "rotary_gain": ones[:, row.text] @ ones[:, row.at].transpose(1, 2) * dim**-0.5,
        }
        seen = visuals(hidden[:, row.at], k, **signals)
        score, chosen = stage.score(seen), stage.select(seen)
        if not plus and kept_beside_recycled(seen.n, k) != kept:  # the k of two numbers kept, of which select takes one
            chosen = stage.recycle(seen.features, score, kept, k)
        yield f"s{i}_score", score[0]
        yield f"s{i}_kept_image", chosen.keep[0, :kept]
        yield f"s{i}_hidden_out", row.cut(chosen, hidden, stage.positions == "reindex")
        yield f"s{i}_position_ids_out", row.positions
        yield f"s{i}_n_image_out", torch.tensor(row.visual)


@runner("transprune")
def transprune(arrays: Arrays, params: dict[str, Any]) -> Results:
    layers, changing = params["pruning_layers"], params["accumulating_layers"]
    stage = mm.TransPrune(layers=tuple(layers), ratios=tuple(params["ratios"]), start=changing[0] - 1)
    budgets = stage.budgets(params["n_visual"], layers[-1] + 1)
    row = Sequence(params["n_system"], params["n_visual"], params["n_text"])
    total = torch.zeros(len(row.origin))
    for layer in range(1, layers[-1] + 1):
        if layer in changing:
            number = changing.index(layer)
            for module in ("attn", "ffn"):
                before, after = (arrays[f"{module}_{side}"][number, row.origin] for side in ("in", "out"))
                total[row.origin] += transition_value(*transition(before, after))
        if layer in layers:
            i = layers.index(layer)
            hidden = arrays["stage_hidden"][i : i + 1, row.origin]
            normed = F.rms_norm(hidden, hidden.shape[-1:], arrays["ln_weight"][layer], 1e-5)
            attention = attention_of(
                row.text,
                normed,
                arrays["w_q"][layer],
                arrays["w_k"][layer],
                params["heads"],
                row.positions,
                params["rope_base"],
            )[..., row.at]
            changed = total[row.origin[row.at]][None]
            seen = visuals(hidden[:, row.at], budgets[i], **{stage.changes: changed, "text_attention@next": attention})
            chosen = stage.select(seen)
            assert chosen.scores is not None
            yield f"ttv_acc_stage{i}", changed[0]
            yield f"iga_stage{i}", attention.mean(1)[0]
            yield f"score_stage{i}", chosen.scores[0]
            row.cut(chosen, hidden, stage.positions == "reindex")
            yield f"keep_stage{i}", row.origin
            yield f"pos_stage{i}", row.positions[0]
