# SPDX-License-Identifier: Apache-2.0
"""Which plan for this model on this machine: every candidate is asked and timed, stock answers are what counts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from .api import compressed, trace
from .eval.cost.record import Cost, costs
from .plan import as_pipeline
from .presets import NAMES, preset
from .spending import spent

LADDER = (
    "voronoi(keep=0.5)",
    "voronoi(keep=0.35)",
    "voronoi(keep=0.25)",
    "voronoi(keep=0.15)",
    "voronoi(keep=0.1)",
    "voronoi(keep=0.25) >> dart(layer=2, keep=0.4)",
    "dart(layer=2, keep=0.25)",
    "divprune(keep=0.25)",
)
"""What is tried beside the presets: the method to take when one does not know, from mild to strong, and its neighbours."""


@dataclass(frozen=True)
class Advice:
    """One plan on all prompts. agreement: part of the words (tokens) of the stock model's answers that the compressed model would
    write too, each behind the same words; left: what the plan leaves of the budget's unit; cost: on the first prompt, stock beside
    it. refused: why the model does not take it, and nothing else is known then."""

    plan: str
    presets: tuple[str, ...] = ()
    agreement: float = 0.0
    left: float = 1.0
    cost: Cost | None = None
    refused: str = ""

    @property
    def loss(self) -> float:
        """Points of agreement that are lost."""
        return 100 * (1 - self.agreement)

    @property
    def speedup(self) -> float:
        """Of the time to the first token, measured."""
        return self.cost.speedup if self.cost else 0.0

    def fits(self, most_loss: float, budget: float | None) -> bool:
        """Whether it is within what may be lost and what may be left."""
        return not self.refused and self.loss <= most_loss + 1e-9 and (budget is None or self.left <= budget + 1e-9)


class _Told(LogitsProcessor):
    """Makes `generate` write a given answer, and counts where the model would have written the same."""

    def __init__(self, answers: Tensor, prompt: int) -> None:
        self.answers, self.prompt = answers, prompt
        self.same: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        told = self.answers[:, input_ids.shape[1] - self.prompt]
        self.same.append(scores.argmax(-1) == told)
        return torch.full_like(scores, float("-inf")).scatter_(1, told[:, None], 0.0)


@torch.no_grad()
def answers_of(model: Any, inputs: Mapping[str, Any], new_tokens: int) -> Tensor:
    """Greedy answers [B, T] of a model to prompts."""
    out: Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=new_tokens)
    return out[:, inputs["input_ids"].shape[1] :]


@torch.no_grad()
def agreement(model: Any, inputs: Mapping[str, Any], answers: Tensor) -> float:
    """Part of the tokens of `answers` (of one prompt, [1, T]) that the model would write at their place, behind the same words."""
    judge = _Told(answers, inputs["input_ids"].shape[1])
    model.generate(
        **inputs, do_sample=False, max_new_tokens=answers.shape[1], logits_processor=LogitsProcessorList([judge])
    )
    return torch.stack(judge.same).double().mean().item()


def candidates(family: str | None, plans: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Plans to try, each once, and the presets that stand for them."""
    named = {name: repr(as_pipeline(preset(name, family).plan)) for name in NAMES}
    tried = [repr(as_pipeline(plan)) for plan in (*named.values(), *(plans or LADDER))]
    return {plan: tuple(name for name in NAMES if named[name] == plan) for plan in dict.fromkeys(tried)}


def advise(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    plans: Sequence[str] = (),
    unit: str = "tokens",
    new_tokens: int = 32,
    repeats: int = 5,
    show: Callable[[str, float], object] = lambda text, part: None,
) -> list[Advice]:
    """Try the presets of the model's family and `plans` (default LADDER) on prompts, each a batch of one with visuals on the
    model's device; in the order in which they are tried. Times and FLOPs are those of the first prompt. unit: of `left`, see
    `mmcompress.spending`. Cost: per plan an answer to each prompt, and `repeats` more to the first."""
    tried = candidates(getattr(model.config, "model_type", None), plans)
    told = []
    for number, inputs in enumerate(prompts):
        show("the stock model answers", number / len(prompts))
        told.append(answers_of(model, inputs, new_tokens))
    found: dict[str, Advice] = {}
    for number, (plan, names) in enumerate(tried.items()):
        show(plan, number / len(tried))
        try:
            with compressed(model, plan):
                same = [agreement(model, inputs, told_) for inputs, told_ in zip(prompts, told, strict=True)]
                now, full, _ = spent(trace(model), unit)
        except (ValueError, NotImplementedError) as error:
            found[plan] = Advice(plan, names, refused=str(error).splitlines()[0])
            continue
        weights = [answer.shape[1] for answer in told]
        mean = sum(a * w for a, w in zip(same, weights, strict=True)) / sum(weights)
        found[plan] = Advice(plan, names, mean, now / full)
    works = [plan for plan, one in found.items() if not one.refused]
    show("timing", 0.0)
    rounds = repeats + 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = costs(
            model, prompts[0], works, repeats, 1, max(2, min(8, new_tokens)), lambda done: show("timing", done / rounds)
        )
    measured = {row.counts.plan: row for row in rows}
    return [
        one if one.refused else Advice(one.plan, one.presets, one.agreement, one.left, measured[one.plan])
        for one in found.values()
    ]


def best(found: Sequence[Advice], most_loss: float, budget: float | None) -> tuple[Advice, bool]:
    """The fastest plan within both limits, and True; if none is: of those within the budget (of all, if none is) the one that
    agrees most, and False. Raises ValueError if the model takes none."""
    works = [one for one in found if not one.refused]
    if not works:
        raise ValueError(f"the model takes none of the plans; {found[0].plan}: {found[0].refused}")
    within = [one for one in works if one.fits(most_loss, budget)]
    if within:
        return max(within, key=lambda one: one.speedup), True
    cheap = [one for one in works if one.fits(float("inf"), budget)] or works
    return max(cheap, key=lambda one: (one.agreement, one.speedup)), False
