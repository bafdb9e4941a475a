# SPDX-License-Identifier: Apache-2.0
"""What `mmcompress tune` does."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

HELD_OUT = 8_000_000
"""Scenes from this seed on are for tuning: the benchmark does not ask about them."""


def run(
    options: argparse.Namespace,
    console: Console,
    load: Callable[[argparse.Namespace], tuple[Any, Any, str]],
    pictures: Callable[[Path, str], list[Any]],
    samples: Callable[[Any, Any, Any, int], list[Any]],
) -> None:
    """Search every plan and write the best one found."""
    from rich.progress import Progress

    from ..plan import as_pipeline
    from ..spending import check, read_budget
    from ..tune import Trial, Tuned, own_space, parse_space, tune

    if options.trials < 1 or options.samples < 1:
        raise ValueError("--trials and --samples: at least 1")
    plans = options.plan or ["vflowopt"]
    for plan in plans:
        as_pipeline(plan)
    space = parse_space(options.search)
    spaces = [own_space(plan, space) for plan in plans] if len(plans) > 1 else [space]
    if lost := [key for key in space if all(key not in mine for mine in spaces)]:
        raise ValueError(f"none of the plans has the option {lost[0]} to search")
    budget, unit = (None, "tokens") if options.budget is None else read_budget(options.budget)
    check(budget, unit)
    trials = [
        options.trials if len(plans) == 1 or own_space(plan, mine, declared=True) else 0
        for plan, mine in zip(plans, spaces, strict=True)
    ]
    inputs, objective = _data(options, load, pictures, samples)
    found: list[Tuned] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("trials", total=sum(trials) + len(plans))

        def show(trial: Trial) -> None:
            progress.update(bar, advance=1, description=f"trial {trial.number}: {trial.value:.4f}")

        for number, (plan, mine, tries) in enumerate(zip(plans, spaces, trials, strict=True)):
            mark = f".{number}" if len(plans) > 1 else ""
            found.append(
                tune(
                    inputs.model, inputs.batches, plan, mine, objective, budget=budget, unit=unit, trials=tries, seed=options.seed,
                    journal=options.out.with_suffix(f"{mark}.trials.jsonl"), show=show,
                )
            )  # fmt: skip
    for one in found:
        console.print(one.table())
        if failed := sum(bool(trial.note) for trial in one.trials):
            console.print(f"{failed} plans count 0: the journal says why", highlight=False)
    best = max(found, key=lambda one: one.best.value)
    if best.best.note:
        raise ValueError(f"no plan is within the budget: {best.best.note}")
    console.print(f"best plan: {best.save(options.out)}", markup=False)


class _Inputs:
    """A model and the batches that it is tuned on."""

    def __init__(self, model: Any, batches: list[Any]) -> None:
        self.model, self.batches = model, batches


def _data(
    options: argparse.Namespace,
    load: Callable[[argparse.Namespace], tuple[Any, Any, str]],
    pictures: Callable[[Path, str], list[Any]],
    samples: Callable[[Any, Any, Any, int], list[Any]],
) -> tuple[_Inputs, Any]:
    from ..tune import FINAL_STATE
    from .data import read_questions
    from .evaluator import shapes_questions
    from .tuning import answers, batches

    task = options.task or ("shapes" if options.metric != "state" and options.data is None else None)
    if task is None:
        if options.metric != "state":
            raise ValueError(f"--metric {options.metric} needs --task, which says how the answers in --data are read")
        shown = pictures(options.data, options.question)[: options.samples] if options.data else None
        model, processor, _ = load(options)
        return _Inputs(model, samples(model, processor, shown, options.samples)), FINAL_STATE
    if (task == "shapes") != (options.data is None):
        raise ValueError("--task shapes has its own data" if task == "shapes" else f"--task {task} needs --data")
    asked = read_questions(task, options.data) if options.data else None
    model, processor, _ = load(options)
    if asked is None:
        asked = shapes_questions(max(7, options.samples), model, HELD_OUT)
    parts = batches(model, processor, task, asked[: options.samples])
    objective = FINAL_STATE if options.metric == "state" else answers(processor, task, parts, options.metric)
    return _Inputs(model, [part.inputs for part in parts]), objective
