# SPDX-License-Identifier: Apache-2.0
"""`mmcompress bench serving MODEL`: servers of vLLM, stock and compressed, under load."""

from __future__ import annotations

import argparse
import dataclasses
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ...records import update
from ..common import check_least

if TYPE_CHECKING:
    from rich.console import Console

ONLY = ("questions", "concurrency", "server")
LEVELS = (1, 4, 16, 32)
KIND = "`mmcompress bench serving`"


def add_options(bench: argparse.ArgumentParser) -> None:
    group = bench.add_argument_group("bench serving MODEL", "asks servers of vLLM questions of the embedded benchmark")
    group.add_argument("--questions", type=int, help="requests at each concurrency (default 64)")
    group.add_argument("--concurrency", type=int, nargs="+", help="requests at a time (default 1 4 16 32)")
    group.add_argument("--server", action="append", help="an option of vLLM's server, as --server=--max-model-len=2048")


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure each plan beside the stock server."""
    from rich.table import Table

    from ...eval.serving import STOCK, measure
    from ...eval.synthetic.benchmark import items
    from ...plan import as_pipeline

    if len(options.what) != 2:
        raise ValueError("bench serving takes one checkpoint: mmcompress bench serving MODEL --plan PLAN")
    if find_spec("vllm") is None:
        raise ImportError("vLLM is not here: pip install 'mmcompress[vllm]', or see docs/serving.md for a CPU")
    count, levels = options.questions or 64, options.concurrency or LEVELS
    check_least(argparse.Namespace(questions=count, concurrency=min(levels)), questions=1, concurrency=1)
    plans = [repr(as_pipeline(plan)) for plan in options.plan or ["divprune(keep=0.25)"]]
    model = options.what[1]
    rows = []
    for row in measure(model, [None, *plans], items(count), levels, options.server or (), 8):
        rows.append(row)
        console.print(f"{row.plan} at {row.concurrency}: {row.rate:.2f} requests/s", markup=False, highlight=False)
    table = Table(title=f"{model}, {count} requests at each concurrency")
    headings = (
        "plan",
        "at a time",
        "requests/s",
        "of stock",
        "TTFT p50 ms",
        "p95 ms",
        "gain",
        "by FLOPs",
        "prompt tokens",
        "right",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    stock = {row.concurrency: row for row in rows if row.plan == STOCK}
    for row in rows:
        other = stock[row.concurrency]
        table.add_row(
            row.plan, str(row.concurrency), f"{row.rate:.2f}", f"{row.rate / other.rate:.2f}", f"{1e3 * row.ttft_p50:.0f}",
            f"{1e3 * row.ttft_p95:.0f}", f"{other.ttft_p50 / row.ttft_p50:.2f}", f"{other.flops / row.flops:.2f}",
            f"{row.prompt_tokens:.0f}", f"{row.accuracy:.1%}",
        )  # fmt: skip
    console.print(table)
    if options.out:
        measured = {model: [dataclasses.asdict(row) for row in rows]}
        update(
            options.out, KIND, lambda record: {**(record or {}), **measured}, lambda record: isinstance(record, dict)
        )
