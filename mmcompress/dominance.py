# SPDX-License-Identifier: Apache-2.0
"""Text dominance of a model while it generates: how much more attention a text token gets than a visual one."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .adapters import adapter_for
from .api import _ATTRIBUTE, _stock
from .ops.dominance import depth_stages, dominance, modality_mass
from .runtime.adapter import Adapter
from .runtime.cache import PrunedLayer, cache_of, is_plain
from .runtime.call import Call
from .runtime.engine import Engine
from .runtime.layers import Heads
from .runtime.probe import Form, Forms

STAGES = ("early", "middle", "late")


@dataclass(frozen=True)
class Dominance:
    """Attention of generated tokens on the prompt, by sample and layer; all tensors [samples, layers] float64, on the CPU.

    text_mass, other_mass      attention on text and on visual tokens, mean over heads, summed over the generated tokens.
    text_tokens, other_tokens  how many of them the layer has (after compression).
    generated                  tokens that were counted in each sample.
    plan                       plan of the model, "" for a stock one.
    without_sink               the same when the first token of each prompt, where attention likes to go, is left out.
    """

    text_mass: Tensor
    other_mass: Tensor
    text_tokens: Tensor
    other_tokens: Tensor
    generated: list[int]
    plan: str = ""
    without_sink: Dominance | None = None

    @property
    def _values(self) -> tuple[Tensor, Tensor, Tensor]:
        return dominance(self.text_mass, self.other_mass, self.text_tokens, self.other_tokens)

    @property
    def mdi(self) -> Tensor:
        """Modality dominance index: attention per text token over attention per visual token; above 1 text dominates."""
        return self._values[0]

    @property
    def aei_text(self) -> Tensor:
        """Attention efficiency index of text: its share of the attention over its share of the tokens."""
        return self._values[1]

    @property
    def aei_other(self) -> Tensor:
        """The same of the visual tokens."""
        return self._values[2]

    def stages(self) -> dict[str, tuple[float, float]]:
        """MDI and AEI of text in the first two, middle two and last two layers: means of the values of layers and samples."""
        pairs = zip(*(depth_stages(values).mean(0).tolist() for values in (self.mdi, self.aei_text)), strict=True)
        return dict(zip(STAGES, pairs, strict=True))

    def __str__(self) -> str:
        lines = [f"plan      {self.plan or 'none'}"]
        for name, tokens in (("text", self.text_tokens), ("visual", self.other_tokens)):
            first, last = tokens[:, 0].sum().item(), tokens[:, -1].sum().item()
            behind = "" if last == first else f", {last:.0f} in the last"
            lines.append(f"{name:<9} {first:.0f} tokens in the first layer{behind}")
        lines.append(f"rows      {sum(self.generated)} generated tokens of {len(self.generated)} samples")
        for text, found in (("", self), (" without the first token", self.without_sink)):
            if found is not None:
                parts = [f"{stage} {mdi:.2f} / {aei:.2f}" for stage, (mdi, aei) in found.stages().items()]
                lines.append(f"MDI / AEI {', '.join(parts)}{text}")
        return "\n".join(lines)


@torch.no_grad()
def modality_dominance(
    model: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int = 32,
    exclude_sink: bool = False,
    also_visual: Sequence[int] = (),
) -> Dominance:
    """Measure text dominance of a stock or compressed model while it answers `inputs` greedily.

    After Wu et al., arXiv 2508.10552: queries are the rows from which tokens are generated (the last one of the prompt, then one
    for each decode step, until a sample ends), keys are the tokens of the prompt that the layer has. Visual tokens are those
    in the place of image and video placeholders, newlines included; everything else is text, also start and end markers, unless
    `also_visual` lists their ids. exclude_sink: leave the first token of each prompt out, attention and count; otherwise the
    result has these numbers too (`without_sink`). `print` the result.

    One row of attention is recomputed from queries and cached keys per layer and step, so any attention implementation will do;
    no map is stored. Raises NotImplementedError for sliding windows, linear attention, quantised caches and plans that rewrite
    attention, and ValueError for prompts that are padded on the right.
    """
    stock = _stock(model)
    engine = stock.__dict__.get(_ATTRIBUTE)
    adapter = adapter_for(stock) if engine is None else getattr(engine, "adapter", None)
    if not isinstance(adapter, Adapter):
        raise NotImplementedError("text dominance is measured in a language model, and this model has none")
    if engine is not None and engine.plan.attention_stages:
        raise NotImplementedError(f"{engine.plan!r} rewrites attention behind its kernel, where it is not measured")
    ids: Tensor = inputs["input_ids"]
    mask = inputs.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if not bool(real[:, -1].all()):
        raise ValueError("the prompts are padded on the right: pad on the left, as generate() needs it")
    visual = torch.isin(ids, torch.tensor([*adapter.placeholders.values(), *also_visual], device=ids.device)) & real
    first = real & (real.long().cumsum(1) == 1)
    keys = torch.stack([real & ~visual, visual, real & ~visual & ~first, visual & ~first])
    tally = _Tally(engine if isinstance(engine, Engine) else None, keys, real)
    forms = Forms(adapter.language_model, adapter.model)
    found = [forms.of(i, "text dominance", "cached", "boundless") for i in range(len(adapter.language_model.layers))]
    handles = [(form.attention, functools.partial(tally.record, i, form)) for i, form in enumerate(found)]
    hooks = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in handles]
    try:
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            return_dict_in_generate=False,
        )
    finally:
        for handle in hooks:
            handle.remove()
    counted = _unfinished(out[:, ids.shape[1] :], stock.generation_config.eos_token_id)
    plan = "" if engine is None else repr(engine.plan)
    plain, sinkless = (tally.result(part, counted, plan) for part in (slice(0, 2), slice(2, 4)))
    return sinkless if exclude_sink else replace(plain, without_sink=sinkless)


def _unfinished(tokens: Tensor, ends: Any) -> Tensor:
    """Which of the generated `tokens` [B, steps] belong to an answer, its end token included, [B, steps] bool."""
    if ends is None:
        return torch.ones_like(tokens, dtype=torch.bool)
    end = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device)).long()
    return end.cumsum(1) - end == 0


class _Tally:
    """Sums up attention on sets of keys, row by row, as the attention modules of a language model run.

    keys [4, B, S] bool: text and visual tokens of the prompts, with and without their first token; real [B, S]: no padding.
    """

    def __init__(self, engine: Engine | None, keys: Tensor, real: Tensor) -> None:
        self.engine, self.keys, self.real = engine, keys, real
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: `keys` and `real` of the tokens that it has."""
        self.mass: dict[int, list[Tensor]] = {}

    def record(self, index: int, form: Form, attention: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        layer = self._cache_layer(index, kwargs)
        stored = int(layer.physical if isinstance(layer, PrunedLayer) else layer.get_seq_length())
        if index not in self.held:
            if stored != hidden.shape[1]:
                raise NotImplementedError("measure whole prompts: what a cache of an earlier turn holds is not known")
            self.held[index] = self._of_layer(index, hidden)
            self.mass[index] = []
        keys, real = self.held[index]
        tables = tuple(t[:, -1:] for t in kwargs["position_embeddings"])
        positions = kwargs.get("position_ids")
        positions = positions[..., -1:] if isinstance(positions, Tensor) else None
        heads = Heads(form, hidden[:, -1:], tables, None, Call(None, None, []), index, True, positions)
        rows = torch.arange(len(hidden), device=hidden.device)[:, None]
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 4:  # what the module has seen, whatever made it
            mask = mask[:, :, -1:, :stored]
            mask = mask if mask.dtype == torch.bool else mask >= 0
        else:
            mask = torch.nn.functional.pad(real, (0, stored - real.shape[1]), value=True)[:, None, None]
        cached = layer.keys[:, :, :stored].to(hidden.device)
        weights = heads.rows(heads.queries(rows, torch.zeros_like(rows)), cached, mask).mean(1)
        self.mass[index].append(modality_mass(weights[..., : real.shape[1]], keys))

    @staticmethod
    def _cache_layer(index: int, kwargs: dict[str, Any]) -> Any:
        cache = cache_of(kwargs)
        layer = None if cache is None else cache.layers[index]
        if layer is None or not is_plain(layer):
            kind = "no cache" if layer is None else f"a {type(layer).__name__}"
            raise NotImplementedError(f"layer {index} runs with {kind}: use a DynamicCache or a StaticCache")
        return layer

    def _of_layer(self, index: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        keys, real = self.keys.to(hidden.device), self.real.to(hidden.device)
        call = self.engine.call if self.engine is not None else None
        if call is None or not call.groups or call.group_of(index).source is None:
            return keys, real
        group = call.group_of(index)
        assert group.source is not None
        source = group.source.to(hidden.device)
        there = real.gather(1, source)
        if group.valid is not None:
            there = there & group.valid.to(hidden.device)
        return keys.gather(2, source.expand(len(keys), -1, -1)) & there, there

    def result(self, part: slice, counted: Tensor, plan: str) -> Dominance:
        """Of the sets of keys `part`; counted [B, steps]: which rows belong to an answer."""
        mass = torch.stack([torch.stack(self.mass[i]).double().cpu() for i in sorted(self.mass)])[:, :, part]
        mass = torch.einsum("lscb,bs->cbl", mass, counted.double().cpu())
        tokens = torch.stack([self.held[i][0][part].sum(2).double().cpu() for i in sorted(self.held)], -1)
        return Dominance(mass[0], mass[1], tokens[0], tokens[1], counted.sum(1).tolist(), plan)
