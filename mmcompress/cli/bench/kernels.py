# SPDX-License-Identifier: Apache-2.0
"""`mmcompress bench kernels`: every kernel in its implementations."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..common import OutFile, OutPicture

if TYPE_CHECKING:
    from rich.console import Console

OPTIONS = ("op", "n", "d", "k", "dtype", "provider", "device", "full", "base", "patience", "csv", "plot")
"""Options of bench that mean nothing without kernels (device and dtype apart)."""


def add_options(bench: argparse.ArgumentParser) -> None:
    """The options of `mmcompress bench` that belong to kernels."""
    kernels = bench.add_argument_group(
        "bench kernels", "every kernel in its implementations, interleaved, on random tokens"
    )
    kernels.add_argument("--op", nargs="+", help="operations (default: all)")
    for name, text in (
        ("n", "numbers of tokens"),
        ("d", "widths of tokens"),
        ("k", "numbers of tokens to pick or to keep"),
    ):
        kernels.add_argument(f"--{name}", nargs="+", type=int, help=text)
    kernels.add_argument("--dtype", nargs="+", help="float32, float16, bfloat16")
    kernels.add_argument(
        "--provider", nargs="+", help="naive, compile (torch.compile of the naive one), blocked, triton (on a GPU)"
    )
    kernels.add_argument("--device", help="default: cuda where there is one")
    kernels.add_argument("--full", action="store_true", help="more sizes, types and providers: hours on a CPU")
    kernels.add_argument("--base", metavar="REV", help="also time the kernels of this commit of the repository")
    kernels.add_argument("--patience", type=float, help="leave out what takes longer than so many seconds a run")
    kernels.add_argument("--csv", type=OutFile, help="also write the record as a table")
    kernels.add_argument("--plot", type=OutPicture, help="also draw time against N")


def run(options: argparse.Namespace, console: Console) -> None:
    """Time, show, write the record and the plot."""
    import torch

    from ...eval.kernel_bench.measure import Base, Sweep, keep, measure, read, write_csv
    from ...eval.kernel_bench.plot import plot

    if options.what != ["kernels"] or options.plan:
        raise ValueError("bench kernels: by itself, without other things to measure and without --plan")
    sweep = Sweep.usual(
        options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        options.full,
        ops=options.op,
        n=options.n,
        d=options.d,
        k=options.k,
        dtypes=options.dtype,
        providers=options.provider,
        repeats=options.repeats,
        patience=options.patience,
    )
    base = Base(options.base) if options.base else None
    if options.out:
        read(options.out)
    rows: list[Any] = []
    with console.status("measuring the device") as status:
        for case in measure(sweep, base):
            if rows and rows[-1].op != case[0].op:
                _show([row for row in rows if row.op == rows[-1].op], console)
            rows += case
            status.update(f"{case[0].op}: N = {case[0].n}, D = {case[0].d} measured")
            if options.out:
                keep(rows, options.out)
            if options.csv:
                write_csv(rows, options.csv)
    if not rows:
        raise ValueError("bench kernels: every k is above every N; give smaller k or larger N")
    _show([row for row in rows if row.op == rows[-1].op], console)
    console.print(
        "[dim]ms: median of interleaved runs, beside it the quantiles 0.2 and 0.8; extra MiB: beyond inputs and outputs at the "
        "peak; roofline: the time that the measured copy bandwidth or matmul rate would allow, over the median[/dim]"
    )
    if options.plot:
        plot(rows, options.plot)
    for path in filter(None, (options.out, options.csv, options.plot)):
        console.print(f"record: {path}", markup=False)


def _show(rows: Sequence[Any], console: Console) -> None:
    """The rows of one operation: a table for each type, and why there are gaps."""
    from rich import box
    from rich.table import Table

    from ...eval.kernel_bench.measure import AS_BEFORE
    from ...eval.kernel_bench.operations import OPERATIONS
    from ...eval.machine import threads

    naive = {row.key()[:-1]: row for row in rows if row.provider == "naive"}
    for dtype in dict.fromkeys(row.dtype for row in rows):
        mine = [row for row in rows if row.dtype == dtype]
        title = f"{mine[0].op}: {OPERATIONS[mine[0].op].text}; {dtype}, {mine[0].device}, {threads(mine[0].threads)}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in mine[0].HEADINGS:
            table.add_column(heading, justify="left" if heading == "provider" else "right")
        for row in mine:
            table.add_row(*row.cells(naive.get(row.key()[:-1])))
        console.print(table)
    for row in rows:
        if row.note and not row.note.startswith(AS_BEFORE):
            size = f"N = {row.n}, D = {row.d}, k = {row.k}, {row.dtype}"
            console.print(f"{row.provider}, {size}: {row.note}", style="dim", highlight=False, markup=False)
