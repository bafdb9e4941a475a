# SPDX-License-Identifier: Apache-2.0
"""compress, uncompress, compressed, report: what users call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from . import methods as _registers_all_methods  # noqa: F401
from .adapters import adapter_for
from .plan import as_pipeline
from .runtime.adapter import Adapter
from .runtime.engine import Engine
from .runtime.tower import TowerEngine
from .stage import Pipeline, Stage
from .trace import EncoderReport, Report, Trace

M = TypeVar("M")
_ATTRIBUTE = "_mmcompress_engine"


def _stock(model: Any) -> Any:
    """The Hugging Face model inside a wrapper such as PEFT's."""
    inner = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def _put_in(stock: Any, engine: Engine | TowerEngine) -> None:
    engine.install()
    setattr(stock, _ATTRIBUTE, engine)


def _take_out(stock: Any) -> Engine | TowerEngine | None:
    engine: Engine | TowerEngine | None = stock.__dict__.get(_ATTRIBUTE)
    if engine is not None:
        engine.remove()
        delattr(stock, _ATTRIBUTE)
    return engine


def compress(
    model: M, plan: str | Stage | Pipeline, *, positions: str | None = None, timing: bool = False, **options: Any
) -> M:
    """Compress the visual tokens of a stock Hugging Face model, in place; returns the same model.

    Also takes a timm or open_clip vision transformer, with a method that acts inside the encoder (tome).

    plan       a method name with its options (`compress(model, "visionzip", keep=64)`), a stage, a pipeline
               (`VisionZip(keep=0.25) >> FastV(layer=2)`), or a plan string.
    positions  "keep" or "reindex" position ids of what is left; default: as the method's reference does.
    timing     also measure the parts of a call on an accelerator, which makes every prefill wait for the device.

    A model that is compressed already gets the new plan instead. Raises ValueError or TypeError for a bad plan and
    NotImplementedError for a model that cannot be compressed so; the model is then as it was before the call.
    """
    stock = _stock(model)
    pipeline = as_pipeline(plan, positions=positions, **options)
    adapter = adapter_for(stock)
    engine = Engine(adapter, pipeline, timing) if isinstance(adapter, Adapter) else TowerEngine(adapter, pipeline)
    before = _take_out(stock)
    try:
        _put_in(stock, engine)
    except BaseException:
        if before is not None:
            _put_in(stock, before)
        raise
    return model


def uncompress(model: M) -> M:
    """Take the compression out again; the model is exactly as before. Nothing happens if there is none."""
    _take_out(_stock(model))
    return model


@contextmanager
def compressed(model: M, plan: str | Stage | Pipeline, **options: Any) -> Iterator[M]:
    """`with compressed(model, plan):` compresses for a block; afterwards the plan from before, if any, is back."""
    stock = _stock(model)
    before: Engine | TowerEngine | None = stock.__dict__.get(_ATTRIBUTE)
    compress(model, plan, **options)
    try:
        yield model
    finally:
        _take_out(stock)
        if before is not None:
            _put_in(stock, before)


def _engine(model: Any) -> Engine | TowerEngine:
    engine = _stock(model).__dict__.get(_ATTRIBUTE)
    if engine is None:
        raise ValueError("this model is not compressed: call mmcompress.compress(model, plan) first")
    return engine


def trace(model: Any) -> Trace:
    """What happened in the last call with visuals: every visual, its tokens, what was kept and where."""
    engine = _engine(model)
    if isinstance(engine, TowerEngine):
        raise ValueError("a vision model without language model has no trace: see mmcompress.report(model)")
    if engine.last is None:
        raise ValueError("no call with visuals yet: run the compressed model on a prompt with an image first")
    return Trace(engine.last, engine.plan, engine.language_model.config)


def report(model: Any) -> Report | EncoderReport:
    """The last call with visuals in numbers; `print` it. Tokens per image and layer, FLOPs, KV bytes, milliseconds; for a
    vision model without language model the tokens of each block."""
    engine = _engine(model)
    if isinstance(engine, TowerEngine):
        merged = engine.facade.merged
        if merged is None:
            raise ValueError("no call yet: run the compressed model on a picture first")
        return EncoderReport(repr(engine.plan), engine.facade.lengths[0], merged)
    dtype = next(engine.language_model.parameters()).dtype
    return trace(model).report(bytes_per_value=dtype.itemsize)
