# SPDX-License-Identifier: Apache-2.0
"""The command `mmcompress sweep`."""

from __future__ import annotations

import argparse

from rich.console import Console

from . import Command, Load, OutFolder, add_load_options, check_least

KEEPS = ("50%", "25%", "10%")
START = 1_000_000


def add_command(command: Command, load: Load, models: tuple[str, ...]) -> None:
    """Add the command; `load` makes model, processor and device of the options."""
    sweep = command(
        "sweep",
        lambda options, console: run(options, console, load),
        "plans x keep ratios x tasks: answers, costs, plots and a report in one folder (restartable)",
    )
    sweep.add_argument("model", help=f"folder or hub name of a supported checkpoint, or one of {', '.join(models)}")
    sweep.add_argument(
        "--plan",
        action="append",
        required=True,
        help="method that takes a budget, plan with {keep} in it, other plan or method (once, as it is), or all: every method that "
        "needs no trained weights; may be given several times",
    )
    sweep.add_argument(
        "--keep",
        nargs="+",
        default=list(KEEPS),
        help="ratios as 0.25 or 25%%, or counts as 64 (default 50%% 25%% 10%%)",
    )
    sweep.add_argument(
        "--task",
        action="append",
        help="shapes (default), pages, videos, or NAME=FOLDER or NAME=FILE as of `mmcompress eval`; several allowed",
    )
    sweep.add_argument(
        "--questions", type=int, metavar="N", help="only the first N of each task (shapes, pages, videos: default 210)"
    )
    sweep.add_argument(
        "--start",
        type=int,
        default=START,
        metavar="SEED",
        help=f"first seed of drawn questions (default {START:,}): another one for questions that nothing was chosen by",
    )
    sweep.add_argument(
        "--protocol", default="official", help="whose prompts and metric: official (default), llava or lmms"
    )
    sweep.add_argument(
        "--suffix",
        help="instruction behind each question, '' for none (default: that of the protocol; for own tables none)",
    )
    sweep.add_argument("--batch-size", type=int, default=8, help="default 8; 1 for numbers to publish (no padding)")
    sweep.add_argument("--strict", action="store_true", help="stop at a question that cannot be asked")
    sweep.add_argument(
        "--time-on",
        metavar="MODEL",
        help="measure costs on this model instead: MODEL@8x4 answers as MODEL does, and costs what real ones cost",
    )
    sweep.add_argument("--repeats", type=int, default=5, help="rounds of the costs (default 5; 0: no costs)")
    sweep.add_argument("--examples", type=int, default=3, help="worst examples of each plan and task (default 3)")
    sweep.add_argument("--out", type=OutFolder, default="sweep_output", help="folder of everything")
    add_load_options(sweep)


def run(options: argparse.Namespace, console: Console, load: Load) -> None:
    """Sweep, then table, plot and report."""
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from ...budget import read_keep
    from ...visualize.figure import cannot_draw
    from ..comparison import remarks
    from ..evaluator import Progress, Setup, load_record
    from ..metrics import check_protocol
    from ..sweep.examples import examples
    from ..sweep.pareto import plot
    from ..sweep.report import write_report
    from ..sweep.retained import standings, table, undecided
    from ..sweep.run import FILE, load_sweep, points, read_tasks, sweep

    check_least(options, questions=1, repeats=0, examples=0, start=START)
    if (options.out / FILE).exists():
        load_sweep(options.out / FILE)
    wanted = points(options.plan, [read_keep(keep) for keep in options.keep])
    tasks = options.task or ["shapes"]
    first = tasks[0].partition("=")[0]
    setup = Setup(
        first,
        check_protocol(options.protocol),
        suffix=options.suffix,
        batch_size=options.batch_size,
        strict=options.strict,
    )
    model, processor, _ = load(options)
    works = read_tasks(tasks, options.questions, model, options.start)
    other = options.time_on
    timed = (other, load(argparse.Namespace(**{**vars(options), "model": other}))[0]) if other else None
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
    lines = undecided(rows)
    for work in works:
        stock = load_record(options.out / content["points"][0]["tasks"][work.name]["record"])
        lines += remarks(processor, work.questions, [stock])
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    picture = None
    missing = cannot_draw()
    if content["cost"] and not missing:
        picture = plot({options.model: rows}, f"on {', '.join(content['tasks'])}", options.out / "pareto.png")
    found = examples(model, processor, content, works, options.out, options.examples)
    report = write_report(content, rows, found, picture, options.out / "report.html")
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
