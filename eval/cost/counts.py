# SPDX-License-Identifier: Apache-2.0
"""What a prefill costs by count: FLOPs in three conventions from the tokens that entered each layer, and bytes of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import mmcompress as mm

from ...adapters import adapter_for
from ...flops import counted
from ...runtime.adapter import unwrapped
from ...trace import CONVENTIONS, Shape, Trace, prefill_flops
from ..evaluator import STOCK

NOTHING_DROPPED = "uniform(keep=1.0)"


@dataclass(frozen=True)
class Counts:
    """One prompt with one plan.

    layers     tokens that entered each LLM layer, text included; text: text tokens of the prompt; visual: visual tokens without
               compression (structural ones, such as newlines, included).
    flops      convention -> {"full": of all tokens, "visual_only": of visual tokens alone}, of the LLM layers: "exact" by the
               shapes of their modules; those of published totals where the layers are dense, as those presume.
    vision     FLOPs of vision tower and projector; with a stage that acts in them (tome, downsample) what it left of them.
    overhead   FLOPs of compression: signals, similarities, scores, merging. What a stage in the tower does is in `vision`.
               Counted as torch counts: matrix products, of kernels those of their naive implementation (whole N x N tables).
    rotary     FLOPs of the tables of rotary positions; head: of the logits of the last position.
    kv_bytes   of the tensors that the cache really holds after the prefill.
    notes      signals that stood for others; what the formula of the layers leaves out.
    """

    plan: str
    layers: list[int]
    text: int
    visual: int
    flops: dict[str, dict[str, int]]
    vision: int
    overhead: int
    rotary: int
    head: int
    kv_bytes: int
    notes: list[str] = field(default_factory=list)

    @property
    def total(self) -> int:
        """FLOPs (2 per multiply-add) of the whole prefill, vision included: vision, compression, LLM layers, positions, logits."""
        return self.vision + self.overhead + self.flops["exact"]["full"] + self.rotary + self.head

    @property
    def vision_share(self) -> float:
        return self.vision / self.total

    @property
    def visual_mean(self) -> float:
        """Visual tokens in an LLM layer, mean over the layers."""
        return sum(n - self.text for n in self.layers) / len(self.layers)


def count(
    model: Any, inputs: Mapping[str, Any], plan: str = STOCK, stock: Counts | None = None, shapes: bool = False
) -> Counts:
    """Count one prefill of a single prompt. stock: the counts of the same prompt without a plan, made if they are not given.
    shapes: by shapes alone, see `counted`.

    The model must be stock, and is stock again afterwards. Raises ValueError for a batch, and what `compress` raises.
    """
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"costs are counted of one prompt, not of {len(inputs['input_ids'])}")
    if plan == STOCK:
        return _count(model, inputs, STOCK, None, shapes)
    return _count(model, inputs, plan, stock or _count(model, inputs, STOCK, None, shapes), shapes)


@torch.no_grad()
def _count(model: Any, inputs: Mapping[str, Any], plan: str, stock: Counts | None, shapes: bool) -> Counts:
    with mm.compressed(model, NOTHING_DROPPED if stock is None else plan):
        found = counted(model, inputs, language_model(model), shapes)
        seen = mm.trace(model)
        notes = [f"{got} stands for {want}" for want, got in mm.report(model).substitutes.items()]
    if stock is None:
        found, notes = counted(model, inputs, language_model(model), shapes), []
    layers, text = seen.tokens_per_layer(), text_tokens(seen)
    costs = seen.costs
    visual = [max(0, n - text) for n in layers]

    def exact(tokens: list[int]) -> int:
        return sum(cost.flops(n) for cost, n in zip(costs, tokens, strict=True))

    flops = {"exact": {"full": exact(layers), "visual_only": exact(visual)}}
    shape = Shape.dense(seen.text_config)
    if shape is not None and prefill_flops(shape, layers) == exact(
        layers
    ):  # else the published conventions say nothing of it
        for name in CONVENTIONS[1:]:
            flops[name] = {
                kind: prefill_flops(shape, n, name) for kind, n in (("full", layers), ("visual_only", visual))
            }
    notes += [f"counted with the overhead: {what}" for what in dict.fromkeys(w for cost in costs for w in cost.missing)]
    head = 2 * model.get_output_embeddings().weight.numel()
    in_tower = bool(seen.plan.encoder_stages or seen.plan.pixel_stages)
    vision = found.before if stock is None or in_tower else stock.vision
    overhead = found.total - vision - flops["exact"]["full"] - found.rotary - head
    whole = seen.call.counts[0] - text if stock is None else stock.visual
    return Counts(plan, layers, text, whole, flops, vision, overhead, found.rotary, head, found.held, notes)


def text_tokens(seen: Trace) -> int:
    """Tokens of the (one) prompt that belong to no visual."""
    spans = seen.call.spans
    return seen.call.counts[0] - sum(len(span.places) + len(span.apart) for span in spans)


def language_model(model: Any) -> Any:
    """The decoder stack inside a model, for hooks."""
    return adapter_for(unwrapped(model)).language_model  # type: ignore[union-attr]
