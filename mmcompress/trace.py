# SPDX-License-Identifier: Apache-2.0
"""Trace: what happened in a call; and the arithmetic of FLOPs and KV bytes."""

from __future__ import annotations

import html
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .flops import LLM, WHOLE, LayerCost
from .runtime.needs import stateful
from .runtime.record import CallRecord, Span
from .selection import Selection
from .stage import Pipeline
from .visuals import Layout


@dataclass(frozen=True)
class Shape:
    """What the cost of a decoder stack depends on (Llama, Mistral, Qwen2, Qwen3: gated MLP, grouped queries)."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @staticmethod
    def dense(config: Any) -> Shape | None:
        """As `of`; None where the config says that the layers are of another kind."""
        return Shape.of(config) if isinstance(getattr(config, "intermediate_size", None), int) else None

    @staticmethod
    def of(config: Any) -> Shape:
        """From the text config of a Hugging Face model."""
        heads = config.num_attention_heads
        return Shape(
            config.hidden_size,
            config.intermediate_size,
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
        )


CONVENTIONS = ("exact", "swiglu_mac", "fastv")


def prefill_flops(shape: Shape, tokens: Sequence[int], convention: str = "exact", causal: bool = False) -> int:
    """Cost of the decoder layers in one prefill, `tokens[l]` being the tokens that enter layer l; without lm_head.

    exact       FLOPs (2 per multiply-add) of projections with grouped queries, gated MLP and attention: what torch's FLOP
                counter counts.
    swiglu_mac  multiply-adds 4nd^2 + 2n^2 d + 3ndm: most published "TFLOPs", half of the FLOPs of a model without grouped
                queries.
    fastv       multiply-adds 4nd^2 + 2n^2 d + 2ndm: FastV and DivPrune, with an MLP of two matrices.

    Attention counts all n^2 pairs; causal=True counts the n(n+1)/2 that a causal mask leaves.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"convention={convention!r}: choose one of {', '.join(CONVENTIONS)}")
    d, m = shape.hidden, shape.intermediate
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    if convention != "exact":
        query = key = d
    matrices, unit = (2, 1) if convention == "fastv" else (3, 1 if convention == "swiglu_mac" else 2)
    total = 0
    for n in tokens:
        pairs = n * (n + 1) // 2 if causal else n * n
        total += unit * (2 * n * d * query + 2 * n * d * key + 2 * pairs * query + matrices * n * d * m)
    return total


def kv_bytes(shape: Shape, tokens: Sequence[int], bytes_per_value: int = 2) -> int:
    """Bytes of keys and values after a prefill in which `tokens[l]` tokens entered layer l."""
    return 2 * sum(tokens) * shape.kv_heads * shape.head_dim * bytes_per_value


@dataclass(frozen=True)
class VisualTrace:
    """What became of one visual. tokens: patch tokens it had; kept: how many entered the LLM."""

    row: int
    index: int
    modality: str
    layout: Layout
    tokens: int
    kept: int
    span: Span = field(repr=False)
    call: CallRecord = field(repr=False)

    @property
    def selection(self) -> Selection:
        """The decision before the LLM for this visual alone (U = 1), on the CPU."""
        if self.span.selection is None:
            return Selection(torch.arange(self.tokens)[None])
        row = slice(self.span.selection_row, self.span.selection_row + 1)
        chosen = self.span.selection
        return Selection(chosen.keep[row], None if chosen.assign is None else chosen.assign[row]).cpu()

    @property
    def sizes(self) -> Tensor:
        """How many cells each token that enters the LLM stands for, [k] float32."""
        return self.selection.sizes(torch.ones(1, self.tokens))[0]

    def kept_cells(self, layer: int = 0) -> Tensor:
        """Numbers of the cells of `layout` whose tokens enter LLM layer `layer`, ascending, [k] int64."""
        group = [g for g in self.call.groups if g.start <= layer][-1]
        return self.span.entering(group)

    def __repr__(self) -> str:
        return f"VisualTrace({named(self.modality, self.index, self.row)}: {self.kept} of {self.tokens} tokens)"


@dataclass(frozen=True)
class Trace:
    """One forward pass with visuals; costs: of each LLM layer."""

    call: CallRecord
    plan: Pipeline
    text_config: Any
    costs: tuple[LayerCost, ...] = field(repr=False)

    def __repr__(self) -> str:
        seen = ", ".join(f"{v.kept} of {v.tokens}" for v in self.visuals) or "nothing to compress"
        return f"Trace({self.plan!r}: {seen} visual tokens enter {len(self.costs)} LLM layers)"

    def _repr_html_(self) -> str:
        return self.report()._repr_html_()

    @property
    def visuals(self) -> list[VisualTrace]:
        return [
            VisualTrace(s.row, s.index, s.modality, s.layout, s.layout.cells, s.kept, s, self.call)
            for s in self.call.spans
        ]

    def tokens_per_layer(self, row: int = 0) -> list[int]:
        """How many tokens of batch row `row` (padding not counted) entered each LLM layer."""
        layers = range(len(self.costs))
        return [[g for g in self.call.groups if g.start <= i][-1].counts[row] for i in layers]

    def report(self, prefill: tuple[int, int] | None = None) -> Report:
        """The call in numbers. prefill: FLOPs of the whole of it, and of the stock model's, where they were counted."""
        costs, rows = self.costs, range(self.call.batch)
        now = [self.tokens_per_layer(row) for row in rows]
        before = self.call.before or [(0, 0)] * len(costs)
        flops = full = 0
        for i, (cost, (stored, logical)) in enumerate(zip(costs, before, strict=True)):
            flops += sum(cost.flops(now[row][i], stored) for row in rows)
            full += sum(cost.flops(self.call.counts[row], logical) for row in rows)
        missing = Counter(what for cost in costs for what in cost.missing)
        held = self.call.held
        notes = [f"not in the FLOPs of the {LLM}: {what}, in {n} of {len(costs)} layers" for what, n in missing.items()]
        if self.plan.weighs and (states := stateful(self.text_config)):
            notes.append(
                f"merged tokens weigh what they stand for in {len(costs) - len(states)} of {len(costs)} layers; the others carry a "
                f"state, which takes every token once"
            )
        if held.states:
            notes.append(
                f"beside keys and values the cache holds {size(held.states)} of states, for any number of tokens"
            )
        return Report(
            plan=repr(self.plan),
            visuals=[(v.row, v.index, v.modality, v.tokens, v.kept) for v in self.visuals],
            layers=[sum(row[i] for row in now) for i in range(len(costs))],
            full_tokens=sum(self.call.counts),
            flops=flops,
            full_flops=full,
            prefill=prefill,
            kv_bytes=held.now,
            full_kv_bytes=held.full,
            milliseconds={part: 1000 * s for part, s in self.call.seconds.items() if not math.isnan(s)},
            substitutes={want: got for want, got in self.call.signals.items() if want != got},
            notes=notes,
            preset=self.plan.preset,
        )


@dataclass(frozen=True)
class Report:
    """A call in numbers; `full_...` is the same call without compression.

    flops     of the LLM layers (2 per multiply-add), computed from the shapes of their modules and the tokens that really entered
              each; vision, compression and logits are not in them.
    prefill   FLOPs of the whole prefill, vision included, and of the stock model's, as torch counts them; None: not counted.
    kv_bytes  of keys and values that the cache really held behind the call; 0 without a cache.
    milliseconds are measured.
    """

    plan: str
    visuals: list[tuple[int, int, str, int, int]]
    """(batch row, number of the visual, modality, tokens, tokens that entered the LLM)"""
    layers: list[int]
    """tokens that entered each layer, all rows together"""
    full_tokens: int
    flops: int
    full_flops: int
    prefill: tuple[int, int] | None
    kv_bytes: int
    full_kv_bytes: int
    milliseconds: dict[str, float]
    substitutes: dict[str, str]
    notes: list[str] = field(default_factory=list)
    preset: str = ""
    """what is said of the preset that the plan comes from"""

    def __str__(self) -> str:
        lines = [f"plan      {self.plan}", *([f"preset    {self.preset}"] if self.preset else [])]
        for row, index, modality, tokens, kept in self.visuals:
            lines.append(f"{'visual':<9} {named(modality, index, row)}: {kept} of {tokens} tokens enter the LLM")
        steps = [i for i, n in enumerate(self.layers) if i == 0 or n != self.layers[i - 1]]
        shown = ", ".join(f"{self.layers[i]} from layer {i}" for i in steps)
        lines.append(f"layers    {shown} (of {self.full_tokens} tokens, text included)")
        lines.append(f"FLOPs     {LLM}: {_share(flop, self.flops, self.full_flops)}")
        whole = _share(flop, *self.prefill) if self.prefill else "mm.report(model, inputs) counts it"
        lines.append(f"          {WHOLE}: {whole}")
        lines.append(f"KV cache  {_share(size, self.kv_bytes, self.full_kv_bytes) if self.full_kv_bytes else 'none'}")
        if self.milliseconds:
            lines.append("time      " + ", ".join(f"{part} {ms:.2f} ms" for part, ms in self.milliseconds.items()))
        for want, got in self.substitutes.items():
            why = "for which no clip= is given" if want.startswith("clip_") else "which this model cannot give"
            lines.append(f"note      {got} stands for {want}, {why}")
        return "\n".join([*lines, *(f"note      {note}" for note in self.notes)])

    def _repr_html_(self) -> str:
        """A table for notebooks: what a line of the text begins with is its first column."""
        rows = [(line[:10].strip(), line[10:]) for line in str(self).splitlines()]
        cells = (f"<tr><th>{html.escape(a)}</th><td>{html.escape(b)}</td></tr>" for a, b in rows)
        return f"<table>{''.join(cells)}</table>"


@dataclass(frozen=True)
class EncoderReport:
    """The last call of a vision model: tokens of one picture (CLS included) that enter, and those merged in each block."""

    plan: str
    tokens: int
    merged: list[int]

    def __str__(self) -> str:
        left = [self.tokens - sum(self.merged[: i + 1]) for i in range(len(self.merged))]
        return f"plan      {self.plan}\ntokens    {self.tokens}, after each block {', '.join(map(str, left))}"


def named(modality: str, index: int, row: int) -> str:
    """A visual in the words of reports: both are counted from 1."""
    return f"{modality} {index + 1} of prompt {row + 1}"


def flop(value: float) -> str:
    """FLOPs with a prefix of powers of a thousand."""
    return _scaled(value, 1000, ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP"))


def size(value: float) -> str:
    """Bytes with a prefix of powers of 1,024."""
    return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def _share(text: Callable[[float], str], value: float, full: float) -> str:
    return f"{text(value)} of {text(full)} ({100 * value / full:.1f} %)"


def _scaled(value: float, base: int, units: Sequence[str]) -> str:
    power = min(len(units) - 1, max(0, int(math.log(value, base) + 1e-9))) if value >= 1 else 0
    return f"{value / base**power:.2f} {units[power]}" if power else f"{value:.0f} {units[0]}"
