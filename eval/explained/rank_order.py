# SPDX-License-Identifier: Apache-2.0
"""Whether token activation maps of a compressed model keep the order of those of the stock model."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...api import compressed
from ...assets import MODELS, model_path
from ...explain import Explanation
from ...explain.activation import activation_of
from ...explain.session import session
from ...explain.taps import StatesTap
from ..synthetic.benchmark import Item, items, load, takes_any_shape
from .faithful import record

PLANS = (
    "fastv(layer=2, keep=0.5)",
    "divprune(keep=0.5)",
    "plan(divprune(keep=0.5), positions='keep')",
    "visionzip(keep=0.5)",
    "plan(visionzip(keep=0.5), positions='keep')",
    "tome(keep=0.5)",
)
"""Half of the tokens: chosen in the language model, spread out, by attention with the rest merged, merged in the encoder. By
default those before the language model number positions anew (not in Qwen): two also with the positions of the full prompt."""


def rank_agreement(first: Explanation, second: Explanation) -> float:
    """Spearman correlation of two explanations of the same answer, over the cells whose own tokens both know, mean over answer
    tokens (those whose values are all equal left out; nan if all are)."""
    kept = torch.cat([a.kept & b.kept for a, b in zip(first.visuals, second.visuals, strict=True)])
    found = []
    for token in (i for i, t in enumerate(first.tokens) if t.part == "answer"):
        there = kept & ~(first.maps[token].isnan() | second.maps[token].isnan())
        ranks = torch.stack([_ranks(e.maps[token][there]) for e in (first, second)])
        if bool((ranks.std(1) > 0).all()):
            found.append(torch.corrcoef(ranks)[0, 1].item())
    return sum(found) / len(found) if found else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Place of each value in ascending order, [n]; equal values share the mean of theirs."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last.double() - (counts.double() - 1) / 2)[group]


FORMS: dict[str, dict[str, Any]] = {
    "maps": {},
    "before the filter": {"kernel": 1},
    "activations": {"kernel": 1, "interference": False},
}
"""What is ranked: the maps as they are, without the rank filter (which sees fewer neighbours where cells are missing), and the
activations themselves."""


@torch.no_grad()
def forms(model: Any, processor: Any, item: Item, answer: list[int] | None = None) -> dict[str, Explanation]:
    """Token activation maps of one run in every form."""
    with session(model, processor, item.picture, item.question.text, answer=answer, max_new_tokens=8) as s:
        tap = StatesTap()
        s.run(tap)
        return {form: activation_of(s, tap, **options) for form, options in FORMS.items()}


def agreement(
    name: str, model: Any, processor: Any, questions: Sequence[Item], plans: Sequence[str]
) -> list[dict[str, Any]]:
    """For every plan the mean agreement in each form over the questions, all with the stock model's answer, and its standard
    error; name: the model's. Plans that number the kept tokens anew are measured a second time with the positions of the full
    prompt."""
    stock = [forms(model, processor, item) for item in questions]
    rows = []
    for plan in plans:
        found: dict[str, list[float]] = {form: [] for form in FORMS}
        with compressed(model, plan):
            for item, full in zip(questions, stock, strict=True):
                half = forms(model, processor, item, full["maps"].answer_ids)
                for form in FORMS:
                    found[form].append(rank_agreement(full[form], half[form]))
        row: dict[str, Any] = {"model": name, "plan": plan, "questions": len(questions)}
        for form, values in found.items():
            known = [v for v in values if not math.isnan(v)]
            row[form] = {
                "n": len(known),
                "mean": statistics.mean(known),
                "error": statistics.stdev(known) / math.sqrt(len(known)),
            }
        rows.append(row)
    return rows


def main() -> None:
    """`python -m mmcompress.eval.explained.rank_order`: do maps of kept cells keep their order with half of the tokens?"""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--questions", type=int, default=35)
    parser.add_argument("--plan", action="append", help="default: " + ", ".join(PLANS))
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all; other rows of the record stay")
    parser.add_argument("--out", type=Path, default=Path("results/rank_order.json"))
    arguments = parser.parse_args()
    for name in arguments.model or MODELS:
        model, processor = load(model_path(name))
        questions = items(arguments.questions, stretched=takes_any_shape(model))
        found = agreement(name, model, processor, questions, arguments.plan or PLANS)
        for row in found:
            cells = ", ".join(f"{form} {row[form]['mean']:.2f} ± {row[form]['error']:.2f}" for form in FORMS)
            print(f"{name} {row['plan']}: {cells}", flush=True)
        record(arguments.out, found)


if __name__ == "__main__":
    main()
