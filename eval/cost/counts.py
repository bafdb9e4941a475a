# SPDX-License-Identifier: Apache-2.0
"""What a prefill costs by count: FLOPs in three conventions from the tokens that entered each layer, and bytes of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mmcompress as mm

from ...adapters import adapter_for
from ...kernels import coverage, diverse  # noqa: F401 - they define operators
from ...kernels.dispatch import preferring
from ...runtime.cache import cache_of
from ...trace import CONVENTIONS, Shape, Trace, prefill_flops
from ..evaluator import STOCK

PICKS = {
    torch.ops.mmcompress.max_min: lambda x, *_, **__: 2 * x[0] * x[1] ** 2 * x[2],
    torch.ops.mmcompress.greedy_map: lambda x, quality, k, *_, **__: x[0] * (2 * x[1] ** 2 * x[2] + k**2 * x[1]),
    torch.ops.mmcompress.soft_coverage: lambda y, x, *_, **__: 2 * x[0] * (x if y is None else y)[1] * x[1] * x[2],
}
"""FLOPs of the operators that torch cannot look into, by the shapes of their tensors: their naive implementation."""
NOTHING_DROPPED = "uniform(keep=1.0)"


@dataclass(frozen=True)
class Counts:
    """One prompt with one plan.

    layers     tokens that entered each LLM layer, text included; text: text tokens of the prompt; visual: visual tokens without
               compression (structural ones, such as newlines, included).
    flops      convention -> {"full": of all tokens, "visual_only": of visual tokens alone}, of the decoder layers.
    vision     FLOPs of vision tower and projector; with a stage that acts in them (tome, downsample) what it left of them.
    overhead   FLOPs of compression: signals, similarities, scores, merging. What a stage in the tower does is in `vision`.
               Counted as torch counts: matrix products, of kernels those of their naive implementation (whole N x N tables).
    rotary     FLOPs of the tables of rotary positions; head: of the logits of the last position.
    kv_bytes   of the tensors that the cache really holds after the prefill.
    notes      signals that stood for others.
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
        """FLOPs (2 per multiply-add) of the prefill: vision, compression, decoder layers, positions, logits."""
        return self.vision + self.overhead + self.flops["exact"]["full"] + self.rotary + self.head

    @property
    def vision_share(self) -> float:
        return self.vision / self.total

    @property
    def visual_mean(self) -> float:
        """Visual tokens in an LLM layer, mean over the layers."""
        return sum(n - self.text for n in self.layers) / len(self.layers)


def count(model: Any, inputs: Mapping[str, Any], plan: str = STOCK, stock: Counts | None = None) -> Counts:
    """Count one prefill of a single prompt. stock: the counts of the same prompt without a plan, made if they are not given.

    The model must be stock, and is stock again afterwards. Raises ValueError for a batch, and what `compress` raises.
    """
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"costs are counted of one prompt, not of {len(inputs['input_ids'])}")
    if plan == STOCK:
        return _count(model, inputs, STOCK, None)
    return _count(model, inputs, plan, stock or _count(model, inputs, STOCK, None))


@torch.no_grad()
def _count(model: Any, inputs: Mapping[str, Any], plan: str, stock: Counts | None) -> Counts:
    with mm.compressed(model, NOTHING_DROPPED if stock is None else plan):
        found = _counted(model, inputs)
        seen = mm.trace(model)
        notes = [f"{got} stands for {want}" for want, got in mm.report(model).substitutes.items()]
    if stock is None:
        found, notes = _counted(model, inputs), []
    layers, text = seen.tokens_per_layer(), text_tokens(seen)
    shape = Shape.of(seen.text_config)
    visual = [max(0, n - text) for n in layers]
    flops = {
        name: {"full": prefill_flops(shape, layers, name), "visual_only": prefill_flops(shape, visual, name)}
        for name in CONVENTIONS
    }
    head = 2 * model.get_output_embeddings().weight.numel()
    in_tower = bool(seen.plan.encoder_stages or seen.plan.pixel_stages)
    vision = found.before if stock is None or in_tower else stock.vision
    overhead = found.total - vision - flops["exact"]["full"] - found.rotary - head
    whole = seen.call.counts[0] - text if stock is None else stock.visual
    return Counts(plan, layers, text, whole, flops, vision, overhead, found.rotary, head, found.held, notes)


def text_tokens(seen: Trace) -> int:
    """Tokens of the (one) prompt that belong to no visual."""
    spans = seen.call.spans
    return seen.call.counts[0] - sum(len(span.patches) + len(span.structural) for span in spans)


@dataclass
class _Counted:
    """FLOPs of a prefill as torch counts them: all, those before the language model, those of rotary tables; bytes of the
    cache."""

    total: int = 0
    before: int = 0
    rotary: int = 0
    held: int = 0


def _counted(model: Any, inputs: Mapping[str, Any]) -> _Counted:
    language, found = language_model(model), _Counted()
    starts: list[int] = []

    def now() -> int:
        return int(counter.get_total_flops())

    def enter(*_: Any) -> None:
        found.before = now()

    def rotary(*_: Any) -> None:
        starts.append(now())

    def rotated(*_: Any) -> None:
        found.rotary += now() - starts.pop()

    handles = [
        language.register_forward_pre_hook(enter, prepend=True),
        language.rotary_emb.register_forward_pre_hook(rotary),
        language.rotary_emb.register_forward_hook(rotated),
    ]
    try:
        with (
            FlopCounterMode(display=False, custom_mapping=PICKS) as counter,
            sdpa_kernel(SDPBackend.MATH),
            preferring("naive"),
        ):
            out = model(**inputs, use_cache=True, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    found.total, found.held = now(), cache_bytes(cache_of(out))
    return found


def language_model(model: Any) -> Any:
    """The decoder stack inside a model, for hooks."""
    inner = getattr(model, "get_base_model", None)
    return adapter_for(inner() if callable(inner) else model).language_model  # type: ignore[union-attr]


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache holds."""
    return sum(part.numel() * part.itemsize for layer in cache.layers for part in (layer.keys, layer.values))
