# SPDX-License-Identifier: Apache-2.0
"""The commands `mmcompress eval` and `mmcompress compare`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from ...records import read, write_json
from . import Command, Load, OutFile, OutFolder, add_load_options, check_least, lmms, sweep


def add_commands(command: Command, load: Load, models: tuple[str, ...]) -> None:
    """Add both commands; `load` makes model, processor and device of the options."""
    measure = command(
        "eval",
        lambda options, console: _eval(options, console, load, measure),
        "answer a benchmark, stock and with plans (restartable)",
    )
    measure.add_argument("model", help=f"folder or hub name of a supported checkpoint, or one of {', '.join(models)}")
    measure.add_argument("--plan", action="append", default=[], help="plan to evaluate; may be given several times")
    measure.add_argument(
        "--no-stock", action="store_true", help="leave the uncompressed model out (then nothing to retain)"
    )
    measure.add_argument(
        "--harness",
        choices=("own", "lmms"),
        default="own",
        help="who has data, prompts and metrics: this package (default) or lmms-eval",
    )
    measure.add_argument(
        "--task",
        "--tasks",
        default="shapes",
        help="vqav2, gqa, textvqa, pope, mme, mmbench, scienceqa, chartqa, docvqa, ...; for a table of your own exact, soft, "
        "anls, relaxed, letter, yesno or contains; shapes (default), pages, videos: the embedded benchmarks. With --harness lmms "
        "names of its tasks between commas, NAME=FOLDER for one whose data lie in a folder, or task files",
    )
    measure.add_argument(
        "--data", type=Path, help="folder of the benchmark, or file of questions (.jsonl, .csv, .tsv, .parquet)"
    )
    measure.add_argument(
        "--images", type=Path, help="folder of the pictures, if they are not where the layout has them"
    )
    measure.add_argument("--split", help="part of the benchmark, where the folder has several")
    measure.add_argument(
        "--questions", type=int, metavar="N", help="only the first N (shapes, pages, videos: how many, default 210)"
    )
    measure.add_argument(
        "--protocol", default="official", help="whose prompts and metric: official (default), llava or lmms"
    )
    measure.add_argument(
        "--template", default="chat", help="chat (the checkpoint's, default) or vicuna (LLaVA-1.5's scripts)"
    )
    measure.add_argument(
        "--suffix",
        help="instruction behind each question, '' for none (default: that of the protocol; for a table of your own none)",
    )
    measure.add_argument("--max-new-tokens", type=int, help="default: the protocol's")
    measure.add_argument("--batch-size", type=int, help="default 8 (lmms: 1); 1 for numbers to publish (no padding)")
    measure.add_argument("--strict", action="store_true", help="stop at a question that cannot be asked")
    measure.add_argument("--out", type=OutFolder, default="eval_output", help="folder of predictions and records")
    add_load_options(measure)

    lmms.add_options(measure)
    sweep.add_command(command, load, models)

    against = command(
        "compare",
        _compare,
        "records of `mmcompress eval` side by side: retention, agreement, flips, and same, better, worse or too few to tell",
    )
    against.add_argument("records", type=Path, nargs="+", help="records (.json), of one task or of several")
    against.add_argument(
        "--base",
        type=Path,
        help="record to compare the others of its task with (default: that of the stock model, else the first)",
    )
    against.add_argument(
        "--force", action="store_true", help="also compare records whose settings (prompt, questions, model) differ"
    )
    against.add_argument(
        "--flips", type=int, default=0, metavar="N", help="show N answers that were right and are wrong"
    )
    against.add_argument("--out", type=OutFile, help="also write the comparisons as JSON")


def _eval(options: argparse.Namespace, console: Console, load: Load, parser: argparse.ArgumentParser) -> None:
    if options.harness == "lmms":
        lmms.run(options, console, parser)
        return
    if "," in options.task:
        raise ValueError(f"--task {options.task}: one at a time, several with --harness lmms or `mmcompress sweep`")
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from ...plan import as_pipeline
    from .. import evaluator as runs
    from ..comparison import compare, outlook, remarks, summary_table
    from ..data import read_questions
    from ..metrics import check_protocol
    from ..tasks import task_of
    from ..team import Team

    if Team.here().rank:  # one process of a launch speaks for all
        console = Console(quiet=True)
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
    asked = None if options.data is None else read_questions(options.task, options.data, options.images, options.split)
    model, processor, _ = load(options)
    questions = (
        runs.drawn_questions(options.task, options.questions or 210, model)
        if asked is None
        else asked[: options.questions]
    )
    records = []
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

            record = runs.evaluate(model, processor, questions, setup, plan, options.out, options.model, show)
            records.append(record)
    console.print(summary_table(records[0], records[1:]))
    for other in records[1:]:
        _print(console, outlook(compare(records[0], other)))
    _print(console, *remarks(processor, questions, records))
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
    from ..tasks import TASKS, task_of

    drawn = bool(task_of(task).drawn)
    if data is None and not drawn:
        raise ValueError(f"--task {task} needs --data")
    if data is not None and drawn:
        own = ", ".join(name for name, one in TASKS.items() if one.own)
        raise ValueError(
            f"--data {data} needs a --task, which says how replies are judged: for a table of your own one of {own}, or the name "
            f"of a benchmark; {task} has its own data"
        )


def _print(console: Console, *lines: str) -> None:
    for line in lines:
        if line:
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _compare(options: argparse.Namespace, console: Console) -> None:
    from ..comparison import compare, kind_table, outlook, retention, stock_first, summary_table
    from ..evaluator import load_record, rows_of
    from ..statistics import RIGHT, paired

    if options.out:
        read(options.out, "`mmcompress compare`", lambda value: isinstance(value, list))
    told = [] if options.base is None else [load_record(options.base)]
    others = [load_record(path) for path in options.records if path != options.base]
    tasks: dict[str, list[dict[str, Any]]] = {}
    for record in (*told, *stock_first(others)):
        tasks.setdefault(record["settings"]["task"], []).append(record)
    if alone := [name for name, found in tasks.items() if len(found) < 2]:
        raise ValueError(f"{alone[0]}: one record alone, nothing to compare it with")
    found, pairs = [], {}
    for name, (base, *others) in tasks.items():
        compared = [compare(base, other, force=options.force) for other in others]
        for note in dict.fromkeys(note for one in compared for note in one.notes):
            console.print(f"NOT ALIKE, {name}: {note}", markup=False, highlight=False, style="bold red")
        console.print(summary_table(base, others, options.force))
        for one, other in zip(compared, others, strict=True):
            found.append(one)
            pairs.setdefault(one.other, []).append((base, other))
            if len(one.by_kind) > 1:
                console.print(f"{one.base} and {one.other}:", markup=False, highlight=False)
                console.print(kind_table(one))
            _print(console, outlook(one))
            if one.flips.right_to_wrong + one.flips.wrong_to_right:
                _print(
                    console,
                    f"{one.other}: if it flipped answers both ways alike, flips as uneven as these would still come in "
                    f"{100 * one.flips.p:.3g} % of such runs (McNemar, exact)",
                )
            lost = [
                (a, b)
                for a, b in zip(*paired(rows_of(base), rows_of(other)), strict=True)
                if (a.value or 0) >= RIGHT > (1.0 if b.value is None else b.value)
            ]
            for a, b in lost[: options.flips]:
                line = f"  {a.id} {a.kind}: {a.reply.strip()!r} became {b.reply.strip()!r}, right: {', '.join(a.answers[:3])}"
                console.print(line, markup=False, highlight=False)
    for plan, both in pairs.items():
        try:
            sums = retention(both, options.force)
        except ValueError as error:  # a base score of 0
            console.print(f"note: {plan}: no retention: {error}", markup=False, highlight=False)
            continue
        parts = [f"{name} {value:.3f}" if name == "OG" else f"{name} {value:.1f} %" for name, value in sums.items()]
        console.print(f"{plan} over {len(both)} benchmark(s): {', '.join(parts)}", markup=False, highlight=False)
    console.print(
        "[dim]RelAcc: mean of score / base; OP: root mean square of it; OG: its standard deviation over its mean; OL: part of the "
        "questions with the same answer[/dim]"
    )
    if options.out:
        write_json(options.out, [one.to_dict() for one in found])
        console.print(f"written: {options.out}", markup=False, highlight=False)
