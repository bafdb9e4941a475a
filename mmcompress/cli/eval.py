# SPDX-License-Identifier: Apache-2.0
"""`mmcompress eval`: a benchmark, stock and with plans."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common, lmms
from .common import OutFolder, Plan, add_load_options, add_model, add_video_options, check_least

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress eval llava-shapes --plan 'voronoi(keep=25%)' --plan 'divprune(keep=25%)' --questions 70"


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model(parser)
    parser.add_argument(
        "--plan", type=Plan, action="append", default=[], help="plan to evaluate; may be given several times"
    )
    parser.add_argument(
        "--no-stock", action="store_true", help="leave the uncompressed model out (then nothing to retain)"
    )
    parser.add_argument(
        "--harness",
        choices=("own", "lmms"),
        default="own",
        help="who has data, prompts and metrics: this package (default) or lmms-eval",
    )
    parser.add_argument(
        "--task",
        "--tasks",
        default="shapes",
        help="vqav2, gqa, textvqa, pope, mme, mmbench, scienceqa, chartqa, docvqa, ..., mvbench, videomme, mlvu, "
        "longvideobench, egoschema, nextqa, or NAME=FOLDER instead of --data FOLDER; for a table of your own exact, soft, "
        "anls, relaxed, letter, yesno or contains; shapes (default), pages, videos: the embedded benchmarks. With --harness lmms "
        "names of its tasks between commas, NAME=FOLDER for one whose data lie in a folder, or task files",
    )
    parser.add_argument(
        "--data", type=Path, help="folder of the benchmark, or file of questions (.jsonl, .csv, .tsv, .parquet)"
    )
    parser.add_argument(
        "--images",
        "--videos",
        type=Path,
        metavar="FOLDER",
        help="of the pictures or videos, if they are not where the layout has them",
    )
    add_video_options(parser)
    parser.add_argument("--split", help="part of the benchmark, where the folder has several")
    parser.add_argument(
        "--questions", type=int, metavar="N", help="only the first N (shapes, pages, videos: how many, default 210)"
    )
    parser.add_argument(
        "--protocol", default="official", help="whose prompts and metric: official (default), llava or lmms"
    )
    parser.add_argument(
        "--template", default="chat", help="chat (the checkpoint's, default) or vicuna (LLaVA-1.5's scripts)"
    )
    parser.add_argument(
        "--suffix",
        help="instruction behind each question, '' for none (default: that of the protocol; for a table of your own none)",
    )
    parser.add_argument("--max-new-tokens", type=int, help="default: the protocol's")
    parser.add_argument("--batch-size", type=int, help="default 8 (lmms: 1); 1 for numbers to publish (no padding)")
    parser.add_argument("--strict", action="store_true", help="stop at a question that cannot be asked")
    parser.add_argument("--out", type=OutFolder, default="eval_output", help="folder of predictions and records")
    add_load_options(parser)
    lmms.add_options(parser)
    parser.set_defaults(parser=parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Answer, compare, and say where the records are."""
    if options.harness == "lmms":
        lmms.run(options, console, options.parser)
        return
    if "," in options.task:
        raise ValueError(f"--task {options.task}: one at a time, several with --harness lmms or `mmcompress sweep`")
    named, _, folder = options.task.partition("=")
    if folder and options.data is not None:
        raise ValueError(f"--task {options.task} and --data {options.data}: give the folder once")
    if folder:
        options.task, options.data = named, Path(folder)
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ..eval import evaluator as runs
    from ..eval.comparison import compare, outlook, remarks, summary_table
    from ..eval.data import read_questions
    from ..eval.metrics import check_protocol
    from ..eval.tasks import task_of
    from ..eval.team import Team
    from ..plan import as_pipeline

    if Team.here().rank:  # one process of a launch speaks for all
        console.quiet = True
    task = task_of(options.task)
    setup = runs.Setup(
        options.task,
        check_protocol(options.protocol),
        options.template,
        options.suffix,
        options.max_new_tokens,
        8 if options.batch_size is None else options.batch_size,
        options.strict,
    )
    plans = [*([] if options.no_stock else [runs.STOCK]), *options.plan]
    if not plans:
        raise ValueError("nothing to evaluate: --no-stock needs a --plan")
    for plan in options.plan:
        as_pipeline(plan)
    check_least(options, questions=1)
    check_data(options.task, options.data)
    given = options.task, options.data, options.images, options.split, common.showing(options, options.task)
    asked = None if options.data is None else read_questions(*given)
    model, processor, _ = common.load(options)
    common.say_presets(console, model, options.plan)
    questions = (
        runs.drawn_questions(options.task, options.questions or 210, model)
        if asked is None
        else asked[: options.questions]
    )
    records, prepared = [], runs.Prepared()
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.fields[rate]}"),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        for plan in plans:
            bar = progress.add_task(plan, total=len(questions), rate="")

            def show(now: runs.Progress, bar: Any = bar) -> None:
                rate = f"{now.tokens_per_second:.1f} tokens/s" if now.tokens_per_second else ""
                progress.update(bar, completed=now.done, rate=rate)

            record = runs.evaluate(model, processor, questions, setup, plan, options.out, options.model, show, prepared)
            records.append(record)
    console.print(summary_table(records[0], records[1:]))
    for other in records[1:]:
        print_lines(console, outlook(compare(records[0], other)))
    print_lines(console, *remarks(processor, questions, records))
    for record in records:
        plan = record["settings"]["plan"]
        if record["empty"]:
            console.print(f"{plan}: {record['empty']} empty answers", markup=False, highlight=False)
        if record["cut"]:
            console.print(f"{plan}: {record['cut']} answers end at --max-new-tokens", markup=False, highlight=False)
        if record["without_gold_answer"]:
            console.print(f"{plan}: {record['without_gold_answer']} questions have no gold answer", highlight=False)
        console.print(f"record: {runs.record_path(options.out, record)}", markup=False, highlight=False)
    failed = {key: reason for record in reversed(records) for key, reason in record["failed"].items()}
    for key, reason in list(failed.items())[:5]:
        console.print(f"left out: question {key}: {reason}", markup=False, highlight=False, soft_wrap=True)
    if failed:
        console.print(f"{len(failed)} of {len(questions)} questions were left out (--strict stops)", highlight=False)
    console.print(f"task: {task.title}", markup=False, highlight=False)


def check_data(task: str, data: Path | None) -> None:
    """Raise ValueError unless a benchmark has its data, and the embedded one its own."""
    from ..eval.tasks import TASKS, task_of

    drawn = bool(task_of(task).drawn)
    if data is None and not drawn:
        raise ValueError(f"--task {task} needs --data")
    if data is not None and drawn:
        own = ", ".join(name for name, one in TASKS.items() if one.own)
        raise ValueError(
            f"--data {data} needs a --task, which says how replies are judged: for a table of your own one of {own}, or the name "
            f"of a benchmark; {task} has its own data"
        )


def print_lines(console: Console, *lines: str) -> None:
    """Sentences, whole, one below the other; empty ones are left out."""
    for line in lines:
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
