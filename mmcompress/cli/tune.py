# SPDX-License-Identifier: Apache-2.0
"""`mmcompress tune`: the best options of a plan."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import read
from . import common
from .common import OutFile, Plan, add_load_options, add_model, check_least, say_presets

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress tune llava-shapes --plan vflowopt --budget 25% --trials 20 --out best.json"
HELD_OUT = 8_000_000
"""Scenes from this seed on are for tuning: the benchmark does not ask about them."""


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model(parser)
    parser.add_argument(
        "--plan",
        type=Plan,
        action="append",
        help="method or plan whose options are searched (default vflowopt); with several each is searched, and one without "
        "anything to search is judged as it is",
    )
    parser.add_argument(
        "--budget",
        help="largest part of the visual tokens that may be left, mean over the LLM layers (0.3, 30%%), or of the FLOPs of the LLM "
        "layers (flops=0.3)",
    )
    parser.add_argument(
        "--search",
        action="append",
        default=[],
        metavar="METHOD.OPTION=LOW:HIGH",
        help="also search this option (or METHOD.OPTION=ONE|OTHER); may be given several times",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of pictures, each with its question in a .txt of the same name, or with --task data of that benchmark; "
        "default: synthetic",
    )
    parser.add_argument("--question", default="Describe the picture.", help="for pictures in --data without a .txt")
    parser.add_argument("--samples", type=int, default=30, help="how many pictures (default 30)")
    parser.add_argument("--task", help="benchmark as of `mmcompress eval`, with its data in --data (shapes: none)")
    parser.add_argument(
        "--metric",
        default="state",
        choices=("state", "agreement", "score"),
        help="what plans keep: the final state (default), with --task the same answers as the stock model, or right ones",
    )
    parser.add_argument("--trials", type=int, default=50, help="plans to try, for each --plan")
    parser.add_argument("--seed", type=int, default=0, help="of the search")
    parser.add_argument(
        "--out", type=OutFile, default="plan.json", help="plan file; trials go beside it as .trials.jsonl"
    )
    add_load_options(parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Search every plan and write the best one found."""
    from rich.progress import Progress

    from ..plan import as_pipeline
    from ..spending import check, read_budget
    from ..tune import Trial, Tuned, need_optuna, own_space, parse_space, tune

    check_least(options, trials=1, samples=1)
    read(options.out, "`mmcompress tune`", lambda value: isinstance(value, dict) and "stages" in value)
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
    if any(trials):
        need_optuna()
    inputs, objective = _data(options)
    say_presets(console, inputs.model, plans)
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


def _data(options: argparse.Namespace) -> tuple[_Inputs, Any]:
    from ..eval.data import read_questions
    from ..eval.evaluator import drawn_questions
    from ..eval.tasks import task_of
    from ..eval.tuning import answers, batches
    from ..tune import FINAL_STATE
    from .eval import check_data

    task = options.task or ("shapes" if options.metric != "state" and options.data is None else None)
    if task is not None:
        task_of(task)
    if task is None:
        if options.metric != "state":
            raise ValueError(f"--metric {options.metric} needs --task, which says how the answers in --data are read")
        shown = pictures_of(options.data, options.question)[: options.samples] if options.data else None
        model, processor, _ = common.load(options)
        return _Inputs(model, _samples(model, processor, shown, options.samples)), FINAL_STATE
    check_data(task, options.data)
    asked = read_questions(task, options.data) if options.data else None
    model, processor, _ = common.load(options)
    if asked is None:
        asked = drawn_questions(task, max(len(task_of(task).drawn), options.samples), model, HELD_OUT)
    parts = batches(model, processor, task, asked[: options.samples])
    objective = FINAL_STATE if options.metric == "state" else answers(processor, task, parts, options.metric)
    return _Inputs(model, [part.inputs for part in parts]), objective


def pictures_of(folder: Path, question: str) -> list[tuple[Any, str]]:
    """Pictures of a folder in the order of their names, with their questions."""
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder")
    kinds = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in kinds)
    if not paths:
        raise ValueError(f"--data {folder}: no pictures ({', '.join(kinds)}) in it")
    texts = [path.with_suffix(".txt") for path in paths]
    questions = [text.read_text().strip() if text.is_file() else question for text in texts]
    return [(common.open_image(path), text) for path, text in zip(paths, questions, strict=True)]


def _samples(model: Any, processor: Any, pictures: list[tuple[Any, str]] | None, count: int) -> list[Any]:
    """Model inputs of pictures with questions, one by one; without any, of scenes that the synthetic benchmark does not ask
    about, in batches."""
    from ..eval.synthetic.benchmark import items, prepare, prompt, takes_any_shape

    if pictures is None:
        asked = items(count, start=HELD_OUT, stretched=takes_any_shape(model))
        found = [batch.inputs for batch in prepare(processor, asked, 10)]
    else:
        found = [
            processor(images=[picture], text=[prompt(processor, text)], return_tensors="pt")
            for picture, text in pictures
        ]
    return [inputs.to(model.device, model.dtype) for inputs in found]
