# SPDX-License-Identifier: Apache-2.0
"""How long a selection takes: every method on random visuals, without a model around it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import mmcompress as mm

from ...kernels.dispatch import preferring
from ...runtime.needs import names_of
from ...stage import InputStage, LayerStage, Selecting, Stage
from .clock import Spread
from .latency import milliseconds


@dataclass(frozen=True)
class Sizes:
    """What a visual and its signals measure: dimension of features, of encoder features, of keys; LLM heads, words."""

    features: int = 4096
    encoder: int = 1024
    keys: int = 64
    heads: int = 32
    text: int = 32


@dataclass(frozen=True)
class SelectionTime:
    """Median milliseconds of one selection with making the output tokens (so merging counts); iqr: spread of the middle half.

    naive_ms: the median with the naive twins of all kernels in their place; None where the method calls none.
    processor_ms: the median of the time that all processors of this process spent, which other processes do not lengthen much.
    """

    method: str
    milliseconds: float
    iqr: float
    naive_ms: float | None
    processor_ms: float


def random_signal(
    name: str, visuals: int, tokens: int, sizes: Sizes, generator: torch.Generator, spread: float, frames: int = 1
) -> Tensor:
    """A signal of the shape that `Visuals` says, where there are so many frames; `spread` 0: the same for every token."""
    kind = name.partition("@")[0]

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * spread

    widths = {
        "keys": sizes.keys, "joint_keys": sizes.encoder, "encoder_features": sizes.encoder, "final_states": sizes.features,
        "clip_patches": sizes.encoder,
    }  # fmt: skip
    if kind in widths:
        return noise(visuals, tokens, widths[kind]) + torch.randn(widths[kind], generator=generator)
    if kind == "cls_features":
        return torch.randn(visuals, frames, sizes.encoder, generator=generator)
    if kind in ("cls_feature", "clip_text"):
        return torch.randn(visuals, sizes.encoder, generator=generator)
    if kind in ("text_embeddings", "text_final_states"):
        return torch.randn(visuals, sizes.text, sizes.features, generator=generator)
    if kind in ("text_attention", "rotary_gain"):
        return noise(visuals, sizes.text, tokens).exp() / tokens
    if kind == "text_attention_heads":
        return noise(visuals, sizes.heads, sizes.text, tokens).exp() / tokens
    if kind in ("text_key_norms", "text_relevance"):
        return torch.rand(visuals, sizes.text, generator=generator)
    values = noise(visuals, tokens)
    return values if "logits" in kind or kind == "clip_relevance" else values.softmax(-1)


def random_visuals(
    stage: Stage, k: int, layout: mm.Layout, sizes: Sizes, visuals: int = 1, spread: float = 1.0, seed: int = 3
) -> mm.Visuals:
    """Visuals with everything that `stage` may read."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(visuals, layout.cells, sizes.features, generator=generator) * spread
    features = features + torch.randn(sizes.features, generator=generator)
    signals = {
        n: random_signal(n, visuals, layout.cells, sizes, generator, spread, layout.frames)
        for n in names_of(stage.needs)
    }

    def road(rows: Tensor) -> Tensor:  # the projector's time is not the selection's
        same = sizes.encoder == sizes.features
        return rows if same else rows.new_zeros(*rows.shape[:-1], sizes.features)

    return mm.Visuals(features, layout, k, signals, road=road)


WRITTEN = {"sink_correction": "sink_correction(dims=(1415, 2533))"}
"""Plans of methods that cannot do without an option: the sink dimensions are those of LLaMA-2."""


NAIVE_REPEATS = 3
"""Runs of the naive twins, some of which take seconds, after one to warm up."""


def anyres(side: int = 24) -> mm.Layout:
    """A thumbnail and 2 x 2 tiles laid together: 2,880 tokens for the 24 of CLIP-L/14-336."""
    half = float(side)
    return mm.Layout(
        (mm.View((side, side), role="thumbnail"), mm.View((2 * side, 2 * side), role="tiles", seams=((half,), (half,))))
    )


@torch.no_grad()
def selection_times(
    plans: Iterable[str], keep: float = 0.1, repeats: int = 9, sizes: Sizes | None = None, side: int = 24,
    together: bool = False,
) -> Iterator[SelectionTime]:  # fmt: skip
    """Time every stage of the plans that selects tokens before or in the LLM, on the default layout of LLaVA-NeXT.

    `together`: all of them in each round, to be compared with each other, and named as the plans are; else one after the other,
    which takes no more memory than one of them.
    """
    layout, sizes = anyres(side), sizes or Sizes()
    stages = [
        (plan if together else stage.name, stage)
        for plan in plans
        for stage in mm.as_pipeline(WRITTEN.get(plan, plan)).parts
        if isinstance(stage, InputStage | LayerStage)
    ]
    for group in [stages] if together else [[one] for one in stages]:
        subjects = [(s, random_visuals(s, round(keep * layout.cells), layout, sizes)) for _, s in group]
        times: list[dict[str, list[float]]] = [{"auto": [], "naive": [], "processor": []} for _ in subjects]
        twins = []
        for stage, visuals in subjects:
            with preferring("naive") as naive:
                _whole(stage, visuals)
            twins.append(naive.used)
        for round_ in range(repeats + 2):
            for subject, measured, twin in zip(subjects, times, twins, strict=True):
                begun = time.process_time()
                measured["auto"].append(milliseconds(lambda s=subject: _whole(*s)))
                measured["processor"].append(1000 * (time.process_time() - begun))
                if twin and round_ < NAIVE_REPEATS:
                    with preferring("naive"):
                        measured["naive"].append(milliseconds(lambda s=subject: _whole(*s)))
        for (name, _), measured, twin in zip(group, times, twins, strict=True):
            spread, processor = Spread.of(measured["auto"][2:]), statistics.median(measured["processor"][2:])
            slow = statistics.median(measured["naive"]) if twin else None
            yield SelectionTime(name, spread.median, spread.iqr, slow, processor)


def _whole(stage: Selecting, visuals: mm.Visuals) -> Tensor:
    chosen = stage.select(visuals)
    return chosen.rows if chosen.rows is not None else chosen.apply(visuals.features)


def whole(stage: Selecting, visuals: mm.Visuals, implementation: str = "auto") -> bool:
    """A selection with making the output tokens. Returns whether it asked for a kernel."""
    with preferring(implementation) as preference:
        _whole(stage, visuals)
    return preference.used
