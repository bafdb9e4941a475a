# SPDX-License-Identifier: Apache-2.0
"""Budgets of `mmcompress.tune`: what plans leave of the visual tokens or of the FLOPs, and the `keep` that meets a budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .budget import percent
from .stage import LayerStage, Stage
from .trace import Trace

UNITS = ("tokens", "flops")


def visual_tokens(call: Trace) -> tuple[float, int, int]:
    """Of one call: visual tokens in an LLM layer, mean over the layers; all of them without compression; how many visuals."""
    visuals = call.visuals
    full = sum(visual.tokens for visual in visuals)
    gone = [
        sum(call.call.counts) - sum(row)
        for row in zip(*map(call.tokens_per_layer, range(call.call.batch)), strict=True)
    ]
    return full - sum(gone) / len(gone), full, len(visuals)


def spent(call: Trace, unit: str) -> tuple[float, int, int]:
    """Of one call: what is left, what there is without compression, and by how much a plan may be above its budget for rounding:
    a token per visual. FLOPs are those of the LLM layers, text included."""
    if unit == "tokens":
        return visual_tokens(call)
    found = call.report()
    return found.flops, found.full_flops, 0


def read_budget(text: str) -> tuple[float, str]:
    """A budget as users write it: 0.3, 30%, tokens=0.3 or flops=0.3."""
    unit, _, number = text.rpartition("=")
    try:
        part = percent(number)
        return float(number) if part is None else part, _known(unit or "tokens")
    except ValueError as error:
        raise ValueError(f"--budget {text}: write 0.3, 30%, tokens=0.3 or flops=0.3") from error


def _known(unit: str) -> str:
    if unit not in UNITS:
        raise ValueError(f"unit={unit!r}: choose one of {', '.join(UNITS)}")
    return unit


def check(budget: float | None, unit: str) -> None:
    """Refuse what is no budget."""
    _known(unit)
    if budget is not None and (not isinstance(budget, float) or not 0.0 < budget <= 1.0):
        of = "visual tokens" if unit == "tokens" else "FLOPs of the LLM layers"
        raise ValueError(f"budget={budget!r}: give the part of the {of} that may be left, a float in (0, 1]")


def at_budget(
    stages: tuple[Stage, ...],
    budget: float | None,
    unit: str,
    space: Mapping[str, Sequence[Any]],
    share: Callable[[tuple[Stage, ...]], float],
) -> tuple[Stage, ...]:
    """The stages with the `keep` that the budget allows, where a plan of one stage has one that is not searched: in tokens the
    budget itself before the LLM, in FLOPs the largest one within it. share: what stages leave of the FLOPs.

    Raises ValueError if nothing fits: text alone costs more.
    """
    alone = stages[0]
    if budget is None or len(stages) > 1 or not hasattr(alone, "keep") or f"{alone.name}.keep" in space:
        return stages
    if unit == "tokens":
        return stages if isinstance(alone, LayerStage) else (dataclasses.replace(alone, keep=budget),)  # type: ignore[call-arg]

    def kept(keep: float) -> tuple[Stage, ...]:
        return (dataclasses.replace(alone, keep=keep),)  # type: ignore[call-arg]

    low, high = 0.0, 1.0
    if share(kept(1.0)) <= budget:
        return kept(1.0)
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (middle, high) if share(kept(middle)) <= budget else (low, middle)
    if low == 0.0:
        raise ValueError(
            f"budget flops={budget}: {alone.name} keeps the fewest tokens that it can, and {share(kept(high)):.3f} of the FLOPs of "
            "the LLM layers are left (the text, and the layers before a cut): give a larger budget"
        )
    return kept(low)
