# SPDX-License-Identifier: Apache-2.0
"""What a plan did to a prompt, in one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..explain import Explanation
from ..explain.fates import steps


@dataclass(frozen=True)
class Gain:
    """What a plan saves of one prefill.

    flops         of the whole prefill, vision included, with the plan: part of the stock model's.
    milliseconds  to the first token, stock and with the plan, as measured; None: not measured.
    """

    flops: float
    milliseconds: tuple[float, float] | None = None


def headlines(found: Sequence[Explanation], gains: Mapping[str, Gain] | None = None) -> list[tuple[str, str]]:
    """Of every plan among explanations of one prompt (of the stock model, if it is alone) its name and the sentence."""
    models = list({one.plan: one for one in reversed(found)}.values())[::-1]
    stock = next((one for one in models if not one.plan), None)
    lines = []
    for one in [one for one in models if one.plan] or models:
        last = steps(one.trace, one.row)[-1]
        said = [f"{last.tokens} of {len(last.stands)} visual tokens left"]
        gain = (gains or {}).get(one.plan)
        if one.plan:
            said += [part for part in (_flops(one, gain), _time(gain)) if part]
        if one.answer:
            other = ""
            if stock is not None and stock is not one:
                other = ", as stock" if stock.answer == one.answer else f", stock “{stock.answer}”"
            said.append(f"answer “{one.answer}”{other}")
        lines.append((one.plan or "stock model", "; ".join(said)))
    return lines


def _flops(found: Explanation, gain: Gain | None) -> str:
    """How many FLOPs are saved, and of what."""
    part, whole = (gain.flops, "the prefill, vision included") if gain else (part_of_llm(found), "the LLM layers")
    return "" if part is None else f"{100 * abs(1 - part):.0f} % {'more' if part > 1 else 'fewer'} FLOPs of {whole}"


def part_of_llm(found: Explanation) -> float | None:
    """What the prompt costs in the layers of the language model, as a part of what it would without compression."""
    report = found.trace.report()
    return report.flops / report.full_flops if found.trace.call.batch == 1 and report.full_flops else None


def _time(gain: Gain | None) -> str:
    if gain is None or gain.milliseconds is None:
        return ""
    before, after = gain.milliseconds
    return f"first token in {_milliseconds(after)} here, stock {_milliseconds(before)}"


def _milliseconds(value: float) -> str:
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{value:.0f} ms" if value >= 20 else f"{value:.1f} ms"
