# SPDX-License-Identifier: Apache-2.0
"""How plans differ question by question, over the models of several sweeps: the tables of docs/mass.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..plan import as_pipeline, methods
from .evaluator import STOCK

OWN = "voronoi"


@dataclass(frozen=True)
class Margin:
    """How much more one plan answers rightly than another, in points, with the paired standard error."""

    value: float
    error: float

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard errors from 0."""
        return abs(self.value) > 2 * self.error

    def __str__(self) -> str:
        return f"{self.value:+.1f} ± {self.error:.1f}"


Marks = list[str]
"""Of each question of a plan, by type and in order: 1 right, 0 wrong, - not judged."""


def marks_of(point: Mapping[str, Any], task: str) -> Marks:
    """Every answer of a plan of a sweep."""
    return [mark for line in point["tasks"][task]["marks"].values() for mark in line]


def margin(pairs: Iterator[tuple[Marks, Marks]]) -> Margin:
    """The first of each pair less the second; both of the same questions, all pairs together."""
    found = [
        (one == "1") - (other == "1")
        for first, second in pairs
        for one, other in zip(first, second, strict=True)
        if "-" not in (one, other)
    ]
    return Margin(100 * statistics.mean(found), 100 * statistics.stdev(found) / math.sqrt(len(found)))


class Answers:
    """The answers of several models to one task: plan -> model -> marks; refused plans are not there."""

    def __init__(self, sweeps: Mapping[str, Mapping[str, Any]], task: str) -> None:
        self.models = list(sweeps)
        self.questions = {model: sweeps[model]["tasks"][task]["questions"] for model in sweeps}
        self.plans: dict[str, dict[str, Marks]] = {}
        self.named: dict[tuple[str, float | int | None], str] = {}
        for model, content in sweeps.items():
            for point in content["points"]:
                if not point["refused"] and task in point["tasks"]:
                    self.plans.setdefault(point["plan"], {})[model] = marks_of(point, task)
                    self.named.setdefault((point["method"], point["keep"]), point["plan"])

    def everywhere(self, plan: str) -> bool:
        """Whether every model ran the plan."""
        return len(self.plans.get(plan, {})) == len(self.models)

    def accuracy(self, plan: str, model: str) -> float:
        """In percent of the judged answers."""
        judged = [mark == "1" for mark in self.plans[plan][model] if mark != "-"]
        return 100 * sum(judged) / len(judged)

    def mean(self, plan: str) -> float:
        """Accuracy over all answers of all models."""
        return statistics.mean(self.accuracy(plan, model) for model in self.models)

    def margin(self, plan: str, other: str, models: Sequence[str] = ()) -> Margin:
        """`plan` less `other`, of these models (all)."""
        chosen = models or self.models
        return margin((self.plans[plan][model], self.plans[other][model]) for model in chosen)


def rivals(answers: Answers, keep: float) -> list[str]:
    """The plans of single methods at a ratio that ran everywhere, best first."""
    plans = [plan for (name, at), plan in answers.named.items() if at == keep and name in methods() and name != OWN]
    return sorted((plan for plan in plans if answers.everywhere(plan)), key=lambda plan: -answers.mean(plan))


def against(answers: Answers, keep: float) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: accuracy of every method at a ratio, in brackets `voronoi` less it; all models together last, if there
    are several."""
    own, several = answers.named[OWN, keep], len(answers.models) > 1

    def line(plan: str, label: str) -> list[str]:
        cells = [f"{answers.accuracy(plan, m):.1f} ({answers.margin(own, plan, [m])})" for m in answers.models]
        total = answers.margin(own, plan)
        mark = " *" if total.clear else ""
        return [label, *cells, f"{total}{mark}"] if several else [label, cells[0] + mark]

    first = [f"**`{OWN}`**", *(f"**{answers.accuracy(own, m):.1f}**" for m in answers.models), *([""] * several)]
    lines = [line(STOCK, "stock, all tokens"), first]
    lines += [line(plan, f"`{_name(answers, plan)}`") for plan in rivals(answers, keep)]
    return ["method", *answers.models, *([f"`{OWN}` less it, all models"] * several)], lines


def completed(answers: Answers, keeps: Sequence[float]) -> tuple[list[str], list[list[str]]]:
    """Headings and lines: every method that can be a host, alone and completed by `absorb`; "-" where not every model ran both.
    Sorted by the gain at the last ratio."""
    lines = []
    for name in methods():
        gains, cells = [], []
        for keep in keeps:
            alone, whole = answers.named.get((name, keep), ""), _absorbed(name, keep)
            if not answers.everywhere(alone) or not answers.everywhere(whole):
                gains.append(-math.inf)
                cells += ["-"] * 3
                continue
            gain = answers.margin(whole, alone)
            gains.append(gain.value)
            cells += [f"{answers.mean(alone):.1f}", f"{answers.mean(whole):.1f}", str(gain) + " *" * gain.clear]
        if max(gains) > -math.inf:
            lines.append((gains[::-1], [f"`{name}`", *cells]))
    headings = [text for keep in keeps for text in (f"alone, {keep:.0%}", "completed", "gain")]
    return ["host", *headings], [line for _, line in sorted(lines, key=lambda line: line[0], reverse=True)]


def over(
    answers: Answers, keeps: Sequence[float], floors: Sequence[str]
) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings and lines: accuracy of every method of one model at each ratio, in brackets what it is above the best of `floors`
    there, `-` where it did not run; best first. And the methods that are above it by two errors nowhere."""
    (model,) = answers.models

    def plans(name: str) -> list[str]:
        return [answers.named.get((name, keep), "") for keep in keeps]

    names = [name for name in methods() if any(plans(name))]
    best = [
        max((plan for plan in column if plan in answers.plans), key=lambda plan: answers.accuracy(plan, model))
        for column in zip(*(plans(name) for name in floors), strict=True)
    ]
    lines, clear = {}, set()
    for name in names:
        cells = []
        for plan, floor in zip(plans(name), best, strict=True):
            if plan not in answers.plans:
                cells.append("-")
                continue
            more = answers.margin(plan, floor)
            clear |= {name} if more.clear and more.value > 0 else set()
            said = "" if plan == floor else f" ({more})"
            cells.append(f"{answers.accuracy(plan, model):.1f}{said}" + " *" * more.clear)
        lines[name] = cells

    def order(name: str) -> float:
        there = [answers.accuracy(plan, model) for plan in plans(name) if plan in answers.plans]
        return -statistics.mean(there) - 1000 * (len(there) == len(keeps))

    ranked = sorted(names, key=order)
    headings = ["method", *(f"{keep:.0%}" for keep in keeps)]
    stock = ["stock, all tokens", *[f"{answers.accuracy(STOCK, model):.1f}"] * len(keeps)]
    rows = [[f"`{name}`" + " (floor)" * (name in floors), *lines[name]] for name in ranked]
    return headings, [stock, *rows], [name for name in ranked if name not in clear and name not in floors]


def _absorbed(name: str, keep: float) -> str:
    """The plan that completes a host, written as sweeps write plans; nothing for a method that cannot be one."""
    try:
        return repr(as_pipeline(f"absorb(host='{name}', keep={keep})"))
    except ValueError:
        return ""


def _name(answers: Answers, plan: str) -> str:
    return next(name for (name, _), text in answers.named.items() if text == plan)
