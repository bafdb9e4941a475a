# SPDX-License-Identifier: Apache-2.0
"""`mmcompress sweep`: plans x keep ratios x tasks."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import common
from .common import Model, OutFolder, Plan, add_load_options, add_model, add_video_options, check_least

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress sweep llava-shapes --plan voronoi --plan divprune --keep 25% 10% --questions 70"
KEEPS = ("50%", "25%", "10%")
START = 1_000_000


class SweepPlan(Plan):
    """A method or plan, with {keep} in it or not, or all."""

    def check(self, option: str) -> None:
        from ..catalog import check_plan

        if self != "all":
            check_plan(self.replace("{keep}", "0.5"))


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model(parser)
    parser.add_argument(
        "--plan",
        type=SweepPlan,
        action="append",
        required=True,
        help="method that takes a budget, plan with {keep} in it, other plan or method (once, as it is), or all: every method that "
        "needs no trained weights; may be given several times",
    )
    parser.add_argument(
        "--keep",
        nargs="+",
        default=list(KEEPS),
        help="ratios as 0.25 or 25%%, or counts as 64 (default 50%% 25%% 10%%)",
    )
    parser.add_argument(
        "--task",
        action="append",
        help="shapes (default), pages, videos, or NAME=FOLDER or NAME=FILE as of `mmcompress eval`; several allowed",
    )
    parser.add_argument(
        "--questions", type=int, metavar="N", help="only the first N of each task (shapes, pages, videos: default 210)"
    )
    parser.add_argument(
        "--start",
        type=int,
        default=START,
        metavar="SEED",
        help=f"first seed of drawn questions (default {START:,}): another one for questions that nothing was chosen by",
    )
    parser.add_argument(
        "--protocol", default="official", help="whose prompts and metric: official (default), llava or lmms"
    )
    parser.add_argument(
        "--suffix",
        help="instruction behind each question, '' for none (default: that of the protocol; for own tables none)",
    )
    parser.add_argument("--batch-size", type=int, default=8, help="default 8; 1 for numbers to publish (no padding)")
    add_video_options(parser)
    parser.add_argument("--strict", action="store_true", help="stop at a question that cannot be asked")
    parser.add_argument(
        "--time-on",
        type=Model,
        metavar="MODEL",
        help="measure costs on this model instead: MODEL@8x4 answers as MODEL does, and costs what real ones cost",
    )
    parser.add_argument("--repeats", type=int, default=5, help="rounds of the costs (default 5; 0: no costs)")
    parser.add_argument(
        "--examples",
        type=int,
        default=3,
        help="questions of each task shown side by side, and of each plan the worst (default 3; 0: none)",
    )
    parser.add_argument("--out", type=OutFolder, default="sweep_output", help="folder of everything")
    add_load_options(parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Sweep, then table, plot and report."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from ..budget import read_keep
    from ..eval.comparison import remarks
    from ..eval.evaluator import Progress, Setup, load_record
    from ..eval.metrics import check_protocol
    from ..eval.sweep.best import bests, headline
    from ..eval.sweep.examples import Gallery
    from ..eval.sweep.pareto import plot
    from ..eval.sweep.report import write_report
    from ..eval.sweep.retained import standings, table, undecided
    from ..eval.sweep.run import FILE, load_sweep, points, read_tasks, sweep
    from ..visualize.figure import cannot_draw

    check_least(options, questions=1, repeats=0, examples=0, start=START)
    if (options.out / FILE).exists():
        load_sweep(options.out / FILE)
    keeps = [read_keep(keep) for keep in options.keep]
    points(options.plan, keeps)  # a mistake is said before the model is loaded
    tasks = options.task or ["shapes"]
    first = tasks[0].partition("=")[0]
    setup = Setup(
        first,
        check_protocol(options.protocol),
        suffix=options.suffix,
        batch_size=options.batch_size,
        strict=options.strict,
    )
    shown = common.showing(options, *(task.partition("=")[0] for task in tasks))
    model, processor, _ = common.load(options)
    common.say_presets(console, model, options.plan)
    wanted = points(options.plan, keeps, model)
    works = read_tasks(tasks, options.questions, model, options.start, shown)
    other = options.time_on
    timed = (other, common.load(argparse.Namespace(**{**vars(options), "model": other}))[0]) if other else None
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        bar, total = bars.add_task("", total=None), sum(len(work.questions) for work in works) * len(wanted)
        done: dict[tuple[str, str], int] = {}

        def show(task: str, plan: str, now: Progress) -> None:
            done[task, plan] = now.done
            bars.update(bar, description=f"{task}, {plan}", completed=sum(done.values()), total=total)

        content = sweep(
            model, processor, works, wanted, setup, options.out, options.model, options.repeats, show=show, timed=timed
        )  # fmt: skip
    rows = standings(content)
    console.print(table(content, rows))
    console.print(headline(rows, bests(content, rows)), markup=False, highlight=False, soft_wrap=True)
    lines = undecided(rows)
    for work in works:
        stock = load_record(options.out / content["points"][0]["tasks"][work.name]["record"])
        lines += remarks(processor, work.questions, [stock])
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    picture = None
    missing = cannot_draw()
    if content["cost"] and not missing:
        picture = plot(
            {options.model: rows},
            f"what is left of the score on {', '.join(content['tasks'])}",
            options.out / "pareto.png",
        )
    gallery = Gallery(model, processor, content, works, options.out)
    report = write_report(content, rows, gallery, picture, options.out / "report.html", options.examples)
    for point in content["points"]:
        if point["refused"]:
            console.print(f"{point['plan']}: {point['refused']}", markup=False, highlight=False)
    for task, about in content["tasks"].items():
        for key, reason in list(about["failed"].items())[:5]:
            console.print(f"left out: {task}, question {key}: {reason}", markup=False, highlight=False)
        if failed := len(about["failed"]):
            console.print(f"{task}: {failed} of {about['questions']} questions were left out (--strict stops)")
    if content["cost"] and missing:
        console.print(f"no plot: {missing}; the same command draws it without measuring again", markup=False)
    console.print(f"record: {options.out / FILE}; report: {report}", markup=False, highlight=False)
