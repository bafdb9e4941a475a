# SPDX-License-Identifier: Apache-2.0
"""Sweeps: plans x keep ratios x tasks into one folder, restartable. What sweep.json says needs no other file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

import mmcompress as mm

from ...api import plan_for
from ...plan import as_pipeline, methods
from ...records import RecordError, write_text
from ..comparison import compare
from ..cost.record import conditions, costs, prompt_text
from ..data import Question, Showing, read_questions
from ..evaluator import STOCK, Prepared, Progress, Setup, drawn_questions, evaluate, read_record, record_path
from ..inputs import AskError, inputs_of
from ..remembered import remembered
from ..statistics import RIGHT
from ..tasks import task_of
from ..team import Team

FILE = "sweep.json"
FORMAT = 2
DIGITS = 6
"""Digits behind the point of what is written: more are noise."""
FREE = ("explain_compress",)
"""Methods that may have trained weights and, without, are a training-free method of their own."""


@dataclass
class Point:
    """One plan.

    tasks: task -> what `summary` says of the answers; cost: its row of `mmcompress bench`; refused: why it did not run.
    """

    plan: str
    method: str = STOCK
    keep: float | int | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    cost: dict[str, Any] = field(default_factory=dict)
    refused: str = ""


@dataclass(frozen=True)
class Work:
    """A task with its questions."""

    name: str
    questions: Sequence[Question]


def is_choice(name: str) -> bool:
    """Whether a method takes a budget (attention stages drop nothing, and the ramp of aim_prune ends at none)."""
    return any(field.name == "keep" for field in fields(methods()[name]))


def training_free() -> list[str]:
    """The methods that need no weights of their own."""
    return [name for name, cls in methods().items() if "weights" not in cls.__dataclass_fields__ or name in FREE]


def points(plans: Iterable[str], keeps: Sequence[float | int], model: Any = None) -> list[Point]:
    """The stock model, and every plan at every ratio: a method that takes a budget, or a text with {keep} in it; another plan is
    taken once, as it is. "all" stands for every method that needs no weights of its own. model: whose family presets are for."""
    found = [Point(STOCK)]
    for plan in plans:
        for name in training_free() if plan == "all" else [plan]:
            if name.isidentifier() and name in methods() and is_choice(name):
                found += [Point(f"{name}(keep={keep})", name, keep) for keep in keeps]
            elif "{keep}" in name:
                found += [Point(name.replace("{keep}", str(keep)), name, keep) for keep in keeps]
            else:
                found.append(Point(name, name))
    for point in found[1:]:
        point.plan = repr(as_pipeline(point.plan) if model is None else plan_for(model, point.plan))
    return list({point.plan: point for point in reversed(found)}.values())[::-1]


def read_tasks(
    texts: Sequence[str], count: int | None, model: Any, start: int = 1_000_000, showing: Showing | None = None
) -> list[Work]:
    """Tasks written as NAME=DATA (embedded ones alone), with their first `count` questions; drawn ones from seed `start` on."""
    found = []
    for text in texts:
        name, _, data = text.partition("=")
        if bool(task_of(name).drawn) == bool(data):
            raise ValueError(
                f"--task {text}: " + (f"{name} has its own data" if data else f"write {name}=FOLDER or FILE")
            )
        asked = (
            read_questions(name, Path(data), showing=showing)
            if data
            else drawn_questions(name, count or 210, model, start)
        )
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
    timed: tuple[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer every task with every plan, and measure what each plan costs on one question; returns what sweep.json holds.

    A plan that the model refuses is named with the reason, and the others go on. Run again, a sweep makes only what is missing:
    answers as `evaluate` does, with vision blocks `remembered` from plan to plan; costs are measured anew, all together, if any is
    missing (repeats=0: not at all). timed: name and model whose costs are measured instead, such as a wider copy
    (`mmcompress.eval.widen`).
    """
    if Team.here().size > 1:
        raise ValueError(
            "a sweep runs in one process, since it also measures times; `mmcompress eval` can be launched in several"
        )
    folder = Path(folder)
    if (folder / FILE).exists():
        load_sweep(folder / FILE)  # what is none is not written over
    found = [replace(point, tasks={}, cost={}) for point in wanted]
    inputs = _prompt(model, processor, works)
    for point in found[1:]:
        point.refused = refused(model, inputs, point.plan)
    runs, tasks, machine = [point for point in found if not point.refused], {}, {}
    with remembered(model):
        for work in works:
            task, prepared, base = replace(setup, task=work.name), Prepared(), None
            for point in list(runs):
                try:
                    record = evaluate(
                        model, processor, work.questions, task, point.plan, folder, name,
                        None if show is None else lambda now, point=point, work=work: show(work.name, point.plan, now), prepared,
                    )  # fmt: skip
                except (NotImplementedError, ValueError) as error:
                    if point.plan == STOCK or isinstance(error, RecordError | AskError):
                        raise
                    point.refused = str(error)
                    runs.remove(point)
                    continue
                if base is None:
                    base, machine = record, record["machine"]
                    tasks[work.name] = _about(record)
                tasks[work.name]["failed"] = record["failed"] | tasks[work.name]["failed"]
                point.tasks[work.name] = summary(base, record) | {"record": record_path(folder, record).name}
    about: dict[str, Any] = {}
    if repeats:
        which, one = timed or (name, model)
        about = _costs(one, inputs, runs, folder, which, repeats, new_tokens)
    content = {
        "mmcompress": "sweep", "format": FORMAT, "model": name, "machine": machine, "tasks": tasks, "cost": about,
        "points": [asdict(point) for point in found],
    }  # fmt: skip
    return _write(content, folder / FILE)


def _prompt(model: Any, processor: Any, works: Sequence[Work]) -> Any:
    """Inputs of the first question with a picture or video that can be asked: what plans are tried and timed on."""
    wrong: dict[str, str] = {}
    for question in (question for work in works for question in work.questions if question.visuals):
        one = replace(question, images=question.images[:1], videos=() if question.images else question.videos[:1])
        said = prompt_text(processor, question.text, len(one.images), len(one.videos))
        _, inputs, failed = inputs_of(model, processor, [one], [said], [0])
        if inputs is not None:
            return inputs.to(model.device, model.dtype)
        wrong |= failed
    if wrong:
        name, reason = next(iter(wrong.items()))
        raise AskError(f"none of the {len(wrong)} questions with pictures or videos can be asked; {name!r}: {reason}")
    raise ValueError("no question has a picture or video: there is nothing to compress")


def _about(record: Mapping[str, Any]) -> dict[str, Any]:
    """What all plans of a task share: how it was asked, and of each type the ids of the questions in the order of the marks."""
    settings, ids = record["settings"], {}
    for row in record["rows"]:
        ids.setdefault(row["kind"], []).append(row["id"])
    asked = {name: settings[name] for name in ("protocol", "batch_size", "new_tokens", "weights", "data")}
    asked |= {name: settings[name] for name in ("frames", "subtitles") if name in settings}
    return {
        **asked, "questions": settings["questions"], "failed": record["failed"], "headline": record["headline"],
        "chance": record["chance"], "ids": ids,
    }  # fmt: skip


def summary(base: Mapping[str, Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a record, without its answers.

    marks: by type one character per question of the stock model's in order, 1 right, 0 wrong, - without a gold answer or left out;
    visual: visual tokens of a prompt, entering the LLM, and mean over its layers; against: the comparison with the stock model.
    """
    values = {row["id"]: row["value"] for row in record["rows"]}
    marks: dict[str, str] = {}
    for row in base["rows"]:
        value = values.get(row["id"])
        marks[row["kind"]] = marks.get(row["kind"], "") + ("-" if value is None else str(int(value >= RIGHT)))
    return {
        "scores": record["scores"], "marks": marks, "answered": record["answered"], "empty": record["empty"],
        "visual": {name: value["mean"] for name, value in record["visual_tokens"].items()},
        "against": None if record is base else compare(dict(base), dict(record)).to_dict(),
    }  # fmt: skip


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
    content = load_sweep(folder / FILE) if (folder / FILE).exists() else {}
    before = content.get("cost", {})
    same = all(before.get(key) == about[key] for key in about if key != "machine")
    known = {point["plan"]: point["cost"] for point in content.get("points", []) if point["cost"]} if same else {}
    if missing := [point.plan for point in runs if point.plan not in known]:
        rows = costs(model, inputs, [point.plan for point in runs], repeats, about["warmup"], new_tokens)
        known = {row.counts.plan: _brief(row.to_dict()) for row in reversed(rows)}  # of two baselines the first
    for point in runs:
        point.cost = known[point.plan]
    return about if missing else before


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    """A row of costs without what the point says already and without single repeats."""
    times = {part: {"median": one["median"], "iqr": one["iqr"]} for part, one in row["milliseconds"].items()}
    kept = {name: value for name, value in row.items() if name not in ("label", "plan")}
    return {**kept, "milliseconds": times}


def _write(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content, rounded, a line for each point. Returns what is written."""
    content = _rounded(content)
    parts = {key: json.dumps(value, ensure_ascii=False) for key, value in content.items()}
    parts["points"] = "[\n" + ",\n".join("  " + json.dumps(point) for point in content["points"]) + "\n ]"
    text = ",\n".join(f" {json.dumps(key)}: {part}" for key, part in parts.items())
    write_text(path, f"{{\n{text}\n}}\n")
    return content


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def load_sweep(path: Path | str) -> dict[str, Any]:
    """The content of a sweep.json; raises ValueError for anything else."""
    other = "is no record of `mmcompress sweep` of this version: move it away, and sweep again"
    return read_record(Path(path), "sweep", FORMAT, "; `mmcompress sweep` writes it", other)
