# SPDX-License-Identifier: Apache-2.0
"""Every method on every embedded model, on the same questions: the table of methods in the README."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

import mmcompress as mm

from .latency import machine
from .synthetic import KINDS, evaluate, items, prepare
from .synthetic.benchmark import takes_any_shape

RATIOS = (0.5, 0.25, 0.1)


@dataclass(frozen=True)
class Standing:
    """One plan on one model. right: by question type, "1" or "0" for each question in order; tokens: visual tokens that each LLM
    layer sees, mean over the visuals of the last batch; refused: why the model cannot run it."""

    method: str
    plan: str
    keep: float
    right: dict[str, str]
    tokens: list[float]
    refused: str = ""

    @property
    def by_type(self) -> dict[str, float]:
        return {kind: marks.count("1") / len(marks) for kind, marks in self.right.items() if marks}

    @property
    def accuracy(self) -> float:
        """Mean over question types; nan if it was refused."""
        values = list(self.by_type.values())
        return sum(values) / len(values) if values else float("nan")


def plan_at(name: str, keep: float) -> str:
    """The plan of a method that leaves the part `keep` of the visual tokens, everything else as published."""
    return f"{name}(keep={keep})"


def is_choice(name: str) -> bool:
    """Whether a method takes a budget (attention stages drop nothing, and the ramp of aim_prune ends at none)."""
    return any(field.name == "keep" for field in fields(mm.methods()[name]))


def runs(names: Iterable[str], ratios: Sequence[float]) -> Iterator[tuple[str, str, float]]:
    """(method, plan, ratio) of everything to be measured; the stock model first."""
    yield "stock", "", 1.0
    for name in names:
        if is_choice(name):
            yield from ((name, plan_at(name, keep), keep) for keep in ratios)
        else:
            yield name, name, 1.0


def visual_tokens(model: Any) -> list[float]:
    """Mean number of visual tokens of a row of the last call in each LLM layer."""
    last = mm.trace(model)
    rows = sorted({visual.row for visual in last.visuals})
    totals = [0.0] * last.text_config.num_hidden_layers
    for row in rows:
        text = last.call.counts[row] - sum(v.tokens for v in last.visuals if v.row == row)
        for layer, count in enumerate(last.tokens_per_layer(row)):
            totals[layer] += (count - text) / len(rows)
    return totals


def measure(
    record: Path,
    models: Sequence[tuple[str, Any, Any]],
    names: Sequence[str],
    questions: int,
    ratios: Sequence[float] = RATIOS,
) -> Iterator[tuple[str, Standing]]:
    """Answer `questions` questions with every plan on every (name, model, processor); what the record holds is not done again."""
    content: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    for label, model, processor in models:
        kept = content.setdefault(label, {"questions": questions, "machine": machine(), "rows": []})
        if kept["questions"] != questions:
            raise ValueError(
                f"{record} holds {kept['questions']} questions for {label}, not {questions}: start a new record"
            )
        known = {row["plan"] for row in kept["rows"]}
        wanted = [run for run in runs(names, ratios) if run[1] not in known]
        batches = prepare(processor, items(questions, stretched=takes_any_shape(model))) if wanted else []
        for method, plan, keep in wanted:
            try:
                if plan:
                    mm.compress(model, plan)
                score = evaluate(model, processor, batches)
                right = {kind: "".join("01"[r] for r in score.right[kind]) for kind in KINDS}
                found = Standing(method, plan, keep, right, visual_tokens(model) if plan else [])
            except (NotImplementedError, ValueError) as error:
                found = Standing(method, plan, keep, {}, [], str(error))
            mm.uncompress(model)
            kept["rows"].append(asdict(found))
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text(json.dumps(content) + "\n")
            yield label, found


def difference(first: Sequence[Standing], second: Sequence[Standing], kind: str) -> tuple[float, float]:
    """How much better `first` answers questions of `kind` than `second`, both on the same models: mean over the questions of all
    models, and its standard error (paired)."""
    pairs = [
        float(a == "1") - float(b == "1")
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one.right.get(kind, ""), other.right.get(kind, ""), strict=True)
    ]
    values = torch.tensor(pairs, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(pairs) ** 0.5)
