# SPDX-License-Identifier: Apache-2.0
"""compress, uncompress, compressed, report: what users call."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .adapters import adapter_for
from .flops import counted, layer_costs
from .ops.sinks import outlying
from .plan import as_pipeline
from .runtime.adapter import Adapter, body_of, decoder_of, unwrapped
from .runtime.engine import Engine
from .runtime.hooks import ENGINE
from .runtime.record import CallRecord
from .runtime.scope import remembered
from .runtime.tower import TowerEngine
from .stage import Pipeline, Stage
from .trace import EncoderReport, Report, Trace

M = TypeVar("M")
_ATTRIBUTE = ENGINE
CONVERTED = "_mmcompress_conversion"
"""Attribute of a model whose layers `mmcompress.convert` has rebuilt."""


def _stock(model: Any) -> Any:
    """The model inside wrappers such as PEFT's. Raises TypeError for what is no module."""
    if not isinstance(model, torch.nn.Module):
        shown = reprlib.repr(model)
        raise TypeError(f"got {shown} ({type(model).__name__}): {_instead(model)}")
    return unwrapped(model)


def _instead(model: Any) -> str:
    """What to give instead of what is no module."""
    if getattr(model, "config_name", None) == "model_index.json" or hasattr(model, "scheduler"):
        return (
            "a diffusion pipeline draws pictures and reads none: it has no visual tokens; give a vision-language model"
        )
    if isinstance(getattr(model, "model", None), torch.nn.Module):
        return f"give the model in it, compress({type(model).__name__.lower()}.model, ...)"
    return "give the loaded model, as from_pretrained returns it"


def _found(model: Any) -> Engine | TowerEngine | None:
    """The engine of a model, found by the model, its body or a wrapper of either."""
    stock = _stock(model)
    engine: Engine | TowerEngine | None = stock.__dict__.get(_ATTRIBUTE) or body_of(stock).__dict__.get(_ATTRIBUTE)
    return engine if engine is not None and engine.whole else None


def is_compressed(model: Any) -> bool:
    """Whether `compress` has been called on the model, and not undone."""
    return _found(model) is not None


def _take_out(model: Any) -> Engine | TowerEngine | None:
    engine = _found(model)
    if engine is not None:
        engine.remove()
    return engine


def plan_for(model: Any, plan: str | Stage | Pipeline, **options: Any) -> Pipeline:
    """The pipeline that `compress(model, plan, **options)` puts into a model, as far as it is known without doing so: a preset is
    that of the model's family. Raises as `as_pipeline`."""
    family = getattr(getattr(_stock(model), "config", None), "model_type", None)
    return as_pipeline(plan, family=family, **options)


def compress(
    model: M,
    plan: str | Stage | Pipeline,
    *,
    positions: str | None = None,
    structural: str | None = None,
    timing: bool = False,
    **options: Any,
) -> M:
    """Compress the visual tokens of a stock Hugging Face model, or its audio tokens, in place; returns the same model.

    Also takes a timm or open_clip vision transformer, with a method that acts inside the encoder (tome).

    plan       "fast", "balanced" or "quality" (what they are for the model's family was measured, and stands in the report), a
               method name with its options (`compress(model, "visionzip", keep=64)`), a stage, a pipeline
               (`VisionZip(keep=0.25) >> FastV(layer=2)`), a plan string, or the path of a plan file (.json). Every stage has the
               option `on`: "image", "video", "audio" or several of them; default: ("image", "video").
    positions  "keep" or "reindex" position ids of what is left; default: as the method's reference does.
    structural "keep" or "drop" newlines and other structural tokens of a visual that loses tokens; default: keep.
    timing     also measure the parts of a call on an accelerator, which makes every prefill wait for the device.

    A model that is compressed already gets the new plan instead. Raises ValueError or TypeError for a bad plan and
    NotImplementedError for a model that cannot be compressed so; the model is then as it was before the call.
    """
    stock = _stock(model)
    if CONVERTED in stock.__dict__:
        raise NotImplementedError(
            "the layers of this model were converted, and both would give them fewer tokens: mmcompress.unconvert(model) first"
        )
    pipeline = plan_for(stock, plan, positions=positions, structural=structural, **options)
    adapter = adapter_for(stock)
    engine = Engine(adapter, pipeline, timing) if isinstance(adapter, Adapter) else TowerEngine(adapter, pipeline)
    before = _take_out(model)
    try:
        engine.install()
    except BaseException:
        if before is not None:
            before.install()
        raise
    return model


def uncompress(model: M) -> M:
    """Take the compression out again; the model is exactly as before. Nothing happens if there is none."""
    _take_out(_stock(model))
    return model


@contextmanager
def compressed(model: M, plan: str | Stage | Pipeline, **options: Any) -> Iterator[M]:
    """`with compressed(model, plan):` compresses for a block; afterwards the plan from before, if any, is back."""
    before = _found(model)
    compress(model, plan, **options)
    try:
        yield model
    finally:
        _take_out(model)
        if before is not None:
            before.install()


def _engine(model: Any) -> Engine | TowerEngine:
    engine = _found(model)
    if engine is None:
        raise ValueError("this model is not compressed: call mmcompress.compress(model, plan) first")
    return engine


@torch.no_grad()
def find_sink_dims(
    model: Any, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]], tau: float = 20.0
) -> tuple[int, ...]:
    """The dimensions of the hidden states by which attention sinks are known in this model: the option `dims` of
    `var_attention_sink` and `sink_correction`. They belong to the base language model; find them once per checkpoint.

    inputs: what the processor made of a few prompts, with or without images; one batch, or several. A dimension counts if
    |x_d| / rms(x) of the first token is above `tau` in every prompt, as it enters each layer but the first three and the
    last (as proposed on top of the paper, which lists dimensions of four models). Raises ValueError if there is none. The
    model runs once per batch, uncompressed; a plan that it has is put back.
    """
    stock = _stock(model)
    batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    layers = decoder_of(body_of(stock)).layers[3:-1]
    if not batches or not len(layers):
        raise ValueError("give at least one batch of inputs, and a model of at least five layers")
    first, found = torch.zeros(0), torch.zeros(0)

    def look(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal found
        hidden = args[0] if args else kwargs["hidden_states"]
        values = outlying(hidden[torch.arange(len(hidden)), first]).amin(0).cpu()
        found = torch.minimum(found, values) if len(found) else values

    before = _take_out(model)
    handles = [layer.register_forward_pre_hook(look, with_kwargs=True) for layer in layers]
    try:
        for batch in batches:
            mask, ids = batch.get("attention_mask"), batch["input_ids"]
            first = torch.zeros(len(ids), dtype=torch.int64) if mask is None else mask.cpu().long().argmax(1)
            stock(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        if before is not None:
            before.install()
    dims = tuple((found > tau).nonzero()[:, 0].tolist())
    if not dims:
        raise ValueError(
            f"no dimension of the first token is above {tau} times its rms in all layers and prompts (the largest is "
            f"{int(found.argmax())} with {found.max():.1f}): try a lower tau, and begin prompts with the token that the model knows"
        )
    return dims


def trace(model: Any) -> Trace:
    """What happened in the last call with visuals: every visual, its tokens, what was kept and where. The last one of this thread,
    if that was of this model; else of all threads."""
    engine = _engine(model)
    if isinstance(engine, TowerEngine):
        raise ValueError("a vision model without language model has no trace: see mmcompress.report(model)")
    if engine.last is None:
        raise ValueError("no call with visuals yet: run the compressed model on a prompt with an image first")
    return traced(engine, remembered(engine) or engine.last)


def traced(engine: Engine, record: CallRecord) -> Trace:
    """What a call of an engine's model did."""
    return Trace(record, engine.plan, engine.language_model.config, layer_costs(engine.language_model))


def report(model: Any, inputs: Mapping[str, Any] | None = None) -> Report | EncoderReport:
    """The last call with visuals in numbers; `print` it. Tokens per image and layer, FLOPs of the LLM layers, KV bytes,
    milliseconds; for a vision model without language model the tokens of each block.

    inputs: a prompt as the processor made it, to count the FLOPs of the whole prefill too: it runs stock and compressed
    under torch's counter, and once more for the milliseconds. Raises ValueError if nothing was compressed yet, or if `inputs` have
    no visuals.
    """
    engine = _engine(model)
    if isinstance(engine, TowerEngine):
        if engine.last is None or inputs is not None:
            raise ValueError(
                "no call yet: run the compressed model on a picture first"
                if inputs is None
                else "inputs= is for models with a language model: leave it out"
            )
        return EncoderReport(repr(engine.plan), *engine.last)
    if inputs is None:
        return trace(model).report()
    stock, last = _stock(model), engine.last
    now = counted(model, inputs, engine.language_model).total
    if engine.last is last:
        raise ValueError("inputs have no image or video, so nothing in them is compressed")
    _take_out(stock)
    try:
        full = counted(model, inputs, engine.language_model).total
    finally:
        engine.install()
    with torch.no_grad():
        model(**inputs, use_cache=True, logits_to_keep=1)
    return trace(model).report((now, full))
