# SPDX-License-Identifier: Apache-2.0
"""What a prompt costs by the clock: time to the first token in its parts, decoding, and peak memory, all plans interleaved."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import mmcompress as mm

from ...api import is_compressed
from ...runtime.cache import CACHE, cache_of
from ..evaluator import STOCK
from ..machine import resident_now, resident_peak, synchronize
from .counts import language_model

PARTS = ("ttft", "vision", "compress", "prefill", "decode")


@dataclass(frozen=True)
class Subject:
    """What is timed: a plan (or "stock") with an attention implementation of the checkpoint."""

    plan: str
    attention: str | None = None


@dataclass(frozen=True)
class Spread:
    """Median of the repeats and the width of their middle half."""

    median: float
    iqr: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        quarters = statistics.quantiles(values, n=4) if len(values) > 1 else [0.0, 0.0, 0.0]
        return Spread(statistics.median(values), quarters[2] - quarters[0])

    def __str__(self) -> str:
        return f"{self.median:.1f} ± {self.iqr / 2:.1f}"


@dataclass
class Times:
    """Milliseconds. ttft: from inputs on the device to the first token; its parts vision (tower, projector and signals read
    there), compress (choice, signals of the LLM, packing), prefill (layers, logits, argmax); decode: per token.

    On an accelerator the parts are of runs that wait for the device between them, ttft is of runs that do not.
    peak and reserved: bytes beyond what was held before; None without an accelerator, where peak may be that of the process.
    """

    subject: Subject
    ttft: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    compress: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    peak: int | None = None
    reserved: int | None = None

    def spread(self, part: str) -> Spread:
        return Spread.of(getattr(self, part))


@torch.no_grad()
def clock(
    model: Any,
    inputs: Mapping[str, Any],
    subjects: Sequence[Subject],
    repeats: int = 20,
    warmup: int = 3,
    new_tokens: int = 32,
    seed: int = 0,
    show: Callable[[int], None] | None = None,
    memory: bool = False,
) -> list[Times]:
    """Time every subject once per round, in an order drawn anew for each, after `warmup` rounds that do not count.

    A run is a prefill of one prompt and greedy decoding to `new_tokens` tokens, whatever they are (an end token ends nothing).
    The device is waited for on both sides. The model must be stock, and is stock again afterwards. memory: the peak also on a
    CPU, where what earlier runs left is given back to the system before each.
    """
    if repeats < 1 or warmup < 0 or new_tokens < 2:
        raise ValueError(f"repeats={repeats}, warmup={warmup}, new_tokens={new_tokens}: at least 1, 0 and 2")
    found = {subject: Times(subject) for subject in subjects}
    order, draw = list(found), random.Random(seed)
    apart = model.device.type != "cpu"
    for round_ in range(warmup + repeats):
        draw.shuffle(order)
        for subject in order:
            times = found[subject] if round_ >= warmup else Times(subject)
            with _as(model, subject, timing=not apart):
                _run(model, inputs, times, new_tokens, not apart, memory)
            if apart:
                with _as(model, subject, timing=True):
                    _run(model, inputs, times, 1, True)
        if show:
            show(round_ + 1)
    return list(found.values())


@contextmanager
def _as(model: Any, subject: Subject, timing: bool) -> Any:
    """The model as the subject has it, for a block."""
    before = getattr(model.config, "_attn_implementation", None)
    other = subject.attention not in (None, before)
    if other:
        model.set_attn_implementation(subject.attention)
    try:
        if subject.plan != STOCK:
            mm.compress(model, subject.plan, timing=timing)
        yield
    finally:
        mm.uncompress(model)
        if other:
            model.set_attn_implementation(before)


def _run(
    model: Any, inputs: Mapping[str, Any], times: Times, new_tokens: int, parts: bool, memory: bool = False
) -> None:
    """One prefill, and steps up to `new_tokens`; parts: wait for the device where the language model begins."""
    entered = 0.0

    def enter(*_: Any) -> None:
        nonlocal entered
        synchronize()
        entered = time.perf_counter()

    watched = torch.cuda.is_available() and model.device.type == "cuda"
    held = torch.cuda.memory_allocated() if watched else 0
    if watched:
        torch.cuda.reset_peak_memory_stats()
    resident = resident_now() if memory and not watched else None
    handle = language_model(model).register_forward_pre_hook(enter, prepend=True) if parts else None
    try:
        synchronize()
        start = time.perf_counter()
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        synchronize()
        first = time.perf_counter()
    finally:
        if handle is not None:
            handle.remove()
    if parts:
        chosen = mm.report(model).milliseconds["select"] if is_compressed(model) else 0.0
        times.vision.append(1000 * (entered - start))
        times.compress.append(chosen)
        times.prefill.append(1000 * (first - entered) - chosen)
    if new_tokens < 2:
        return
    times.ttft.append(1000 * (first - start))
    for _ in range(new_tokens - 1):
        out = model(input_ids=token, use_cache=True, **{CACHE: cache_of(out)})
        token = out.logits[:, -1].argmax(-1, keepdim=True)
    synchronize()
    times.decode.append(1000 * (time.perf_counter() - first) / (new_tokens - 1))
    if watched:
        times.peak = max(times.peak or 0, torch.cuda.max_memory_allocated() - held)
        times.reserved = max(times.reserved or 0, torch.cuda.max_memory_reserved())
    elif resident is not None:
        times.peak = max(times.peak or 0, resident_peak() - resident)
