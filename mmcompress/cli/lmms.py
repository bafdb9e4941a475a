# SPDX-License-Identifier: Apache-2.0
"""`mmcompress eval --harness lmms`: tasks of lmms-eval with plans."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

OWN = ("data", "images", "split", "protocol", "template", "suffix", "strict", "subtitles")
"""Options of our own evaluator: lmms-eval has its data, prompts and metrics in its tasks."""

FRAMES = 8
"""Most frames of a video where nobody says."""


def add_options(measure: argparse.ArgumentParser) -> None:
    """The options of `mmcompress eval` that belong to lmms-eval."""
    group = measure.add_argument_group("with --harness lmms", "needs pip install 'mmcompress[lmms]'")
    group.add_argument("--include", type=Path, help="folder with more task files")
    group.add_argument("--attention", help="attention implementation of the checkpoint, such as sdpa or eager")
    group.add_argument("--gen-kwargs", help="as of lmms-eval, for example temperature=0.2")
    group.add_argument("--cache", type=Path, help="folder of lmms-eval's response cache")


def run(options: argparse.Namespace, console: Console, defaults: argparse.ArgumentParser) -> None:
    """Run the tasks and show a line per plan."""
    from ..eval.evaluator import STOCK
    from ..eval.lmms import run_lmms

    for name in OWN:
        if getattr(options, name) != defaults.get_default(name):
            raise ValueError(
                f"--{name} belongs to our own evaluator; with --harness lmms a task has its data and prompts itself, and "
                "--tasks NAME=FOLDER says where its data lie"
            )
    plans = [*([] if options.no_stock else [STOCK]), *options.plan]
    records = run_lmms(
        options.model, plans, [task.strip() for task in options.task.split(",") if task.strip()], options.out,
        include=options.include, limit=options.questions, batch_size=options.batch_size or 1, device=options.device,
        dtype=options.dtype, attn_implementation=options.attention, max_new_tokens=options.max_new_tokens or 1024,
        frames=options.frames or FRAMES, generation=options.gen_kwargs, cache=options.cache,
        show=lambda line: console.print(line, markup=False, highlight=False),
    )  # fmt: skip
    if not records:  # a process of `accelerate launch` beside the first
        return
    console.print(table(records))
    for record in records:
        if empty := sum(record["empty"].values()):
            console.print(f"{record['plan']}: {empty} empty answers", markup=False, highlight=False)
    console.print(
        f"records: {options.out}; `mmcompress compare` shows two of one task side by side",
        markup=False,
        highlight=False,
    )


def table(records: Sequence[dict[str, Any]]) -> Table:
    """Every score of every task, a line per plan; behind a score of a plan its part of the first record's."""
    from rich.markup import escape
    from rich.table import Table

    names = [(task, name) for task, scores in records[0]["scores"].items() for name in scores]
    shown = Table(title=f"{records[0]['settings']['pretrained']}, {records[0]['settings']['harness']}")
    shown.add_column("plan")
    for task, name in names:
        shown.add_column(f"{task} {name}", justify="right")
    for record in records:
        cells = []
        for task, name in names:
            value, base = record["scores"].get(task, {}).get(name), records[0]["scores"][task][name]
            part = f" ({value / base:.1%})" if value is not None and base and record is not records[0] else ""
            cells.append("-" if value is None else f"{value:.4g}{part}")
        shown.add_row(escape(record["plan"]), *cells)
    return shown
