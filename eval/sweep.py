# SPDX-License-Identifier: Apache-2.0
"""Sweeps: plans x keep ratios x tasks into one folder, restartable."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import mmcompress as mm

from ..plan import as_pipeline, methods
from .cost_record import conditions, costs, prompt_inputs
from .data import Question, open_picture, read_questions
from .evaluator import STOCK, Progress, Setup, evaluate, record_path, shapes_questions
from .standing import is_choice, plan_at
from .tasks import task_of

FILE = "sweep.json"


@dataclass
class Point:
    """One plan. records: task -> file of its record; cost: its row of `mmcompress bench`; refused: why it did not run."""

    plan: str
    method: str = STOCK
    keep: float | None = None
    records: dict[str, str] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Work:
    """A task with its questions."""

    name: str
    questions: Sequence[Question]


def points(plans: Iterable[str], keeps: Sequence[float]) -> list[Point]:
    """The stock model, and every plan at every ratio: a method that takes a budget, or a text with {keep} in it; another plan is
    taken as it is. "all" stands for every method with a budget that needs no weights of its own."""
    found = [Point(STOCK)]
    for plan in plans:
        names = [name for name in methods() if is_choice(name) and not _learned(name)] if plan == "all" else [plan]
        for name in names:
            if name.isidentifier() and name in methods() and is_choice(name):
                found += [Point(plan_at(name, keep), name, keep) for keep in keeps]
            elif "{keep}" in name:
                found += [Point(name.replace("{keep}", str(keep)), name, keep) for keep in keeps]
            else:
                found.append(Point(name, name))
    for point in found[1:]:
        point.plan = repr(as_pipeline(point.plan))
    return list({point.plan: point for point in reversed(found)}.values())[::-1]


def _learned(name: str) -> bool:
    return "weights" in methods()[name].__dataclass_fields__


def read_tasks(texts: Sequence[str], count: int | None, model: Any) -> list[Work]:
    """Tasks written as NAME=DATA (shapes alone), with their first `count` questions."""
    found = []
    for text in texts:
        name, _, data = text.partition("=")
        task_of(name)
        if (name == "shapes") == bool(data):
            raise ValueError(
                f"--task {text}: " + ("shapes has its own data" if data else f"write {name}=FOLDER or FILE")
            )
        asked = read_questions(name, Path(data)) if data else shapes_questions(count or 210, model)
        found.append(Work(name, asked[:count]))
    if len({work.name for work in found}) < len(found) or not found:
        raise ValueError("give each task once, and at least one")
    return found


def sweep(
    model: Any,
    processor: Any,
    works: Sequence[Work],
    wanted: Sequence[Point],
    setup: Setup,
    folder: Path | str,
    name: str,
    repeats: int = 5,
    new_tokens: int = 16,
    show: Callable[[str, str, Progress], None] | None = None,
) -> dict[str, Any]:
    """Answer every task with every plan, and measure what each plan costs on the first question; returns what sweep.json holds.

    A plan that the model refuses is named with the reason, and the others go on. Run again, a sweep makes only what is missing:
    answers as `evaluate` does; costs are measured anew, all together, if any is missing (repeats=0: not at all).
    """
    folder = Path(folder)
    found = [replace(point, records={}, cost={}) for point in wanted]
    question = next((q for work in works for q in work.questions if q.images), None)
    if question is None:
        raise ValueError("no question has a picture: there is nothing to compress")
    inputs = prompt_inputs(model, processor, open_picture(question.images[0]), question.text)
    for point in found[1:]:
        point.refused = refused(model, inputs, point.plan)
    runs = [point for point in found if not point.refused]
    for work in works:
        task = replace(setup, task=work.name)
        for point in list(runs):
            try:
                record = evaluate(
                    model, processor, work.questions, task, point.plan, folder, name,
                    None if show is None else lambda now, point=point, work=work: show(work.name, point.plan, now),
                )  # fmt: skip
            except NotImplementedError as error:
                if point.plan == STOCK:
                    raise
                point.refused = str(error)
                runs.remove(point)
                continue
            point.records[work.name] = record_path(folder, record).name
    about: dict[str, Any] = {}
    if repeats:
        about = _costs(model, inputs, runs, folder, name, repeats, new_tokens)
    content = {
        "mmcompress": "sweep", "format": 1, "model": name, "tasks": [work.name for work in works], "cost": about,
        "points": [asdict(point) for point in found],
    }  # fmt: skip
    unfinished = folder / f"{FILE}.tmp"
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / FILE)
    return content


@torch.no_grad()
def refused(model: Any, inputs: Any, plan: str) -> str:
    """Why a model cannot run a plan, found on one prompt; nothing if it can."""
    try:
        with mm.compressed(model, plan):
            model(**inputs, use_cache=True, logits_to_keep=1)
    except (NotImplementedError, ValueError) as error:
        return str(error)
    return ""


def _costs(
    model: Any, inputs: Any, runs: Sequence[Point], folder: Path, name: str, repeats: int, new_tokens: int
) -> dict[str, Any]:
    """Give each point its cost, from the sweep before or measured; returns the conditions."""
    about: dict[str, Any] = conditions(model, name, inputs, repeats, 2, new_tokens)
    content = json.loads((folder / FILE).read_text()) if (folder / FILE).exists() else {}
    before = content.get("cost", {})
    same = all(before.get(key) == about[key] for key in about if key != "machine")
    known = {point["plan"]: point["cost"] for point in content.get("points", []) if point["cost"]} if same else {}
    if missing := [point.plan for point in runs if point.plan not in known]:
        rows = costs(model, inputs, [point.plan for point in runs], repeats, about["warmup"], new_tokens)
        known = {row.counts.plan: row.to_dict() for row in reversed(rows)}  # of two baselines the first
    for point in runs:
        point.cost = known[point.plan]
    return about if missing else before
