# SPDX-License-Identifier: Apache-2.0
"""`mmcompress bench peers`: our selections against plain PyTorch."""

from __future__ import annotations

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from . import kernels

if TYPE_CHECKING:
    from rich.console import Console

KIND = "`mmcompress bench peers`"


def run(options: argparse.Namespace, console: Console) -> None:
    """Time, show, write the record."""
    from rich import box
    from rich.table import Table

    from ...eval.cost.peers import LEVEL, Race, Row, names, race
    from ...eval.machine import machine
    from ...records import read, write_json

    if options.what != ["peers"]:
        raise ValueError("bench peers: by itself, without other things to measure")
    if alien := [name for name in kernels.OPTIONS if getattr(options, name) and name not in ("full", "patience")]:
        raise ValueError(f"--{alien[0]} belongs to `mmcompress bench kernels`")
    if unknown := [name for name in options.plan or () if name not in names()]:
        raise ValueError(f"bench peers: no {unknown[0]!r}; --plan names one of {', '.join(names())}")
    plan = Race.usual(options.full, options.repeats or 12, options.patience)
    if options.out:
        read(options.out, KIND, _fits)
    rows: list[Row] = []
    with console.status("measuring") as status:
        for row in race(plan, options.plan):
            rows.append(row)
            status.update(f"{row.name}: N = {row.n}, D = {row.d}, {row.threads} threads measured")
            if options.out:
                write_json(
                    options.out,
                    {
                        "machine": machine(),
                        "conditions": dataclasses.asdict(plan),
                        "rows": list(map(dataclasses.asdict, rows)),
                    },
                )
    table = Table(title="selections with making the output tokens, float32, one visual", box=box.SIMPLE_HEAD)
    for heading in Row.HEADINGS:
        table.add_column(heading, justify="left" if heading in ("selection", "against") else "right")
    for row in (row for row in rows if row.ratio is not None):
        table.add_row(*row.cells(), style="bold red" if row.ratio < LEVEL else None)
    console.print(table)
    for row in (row for row in rows if row.note):
        console.print(f"{row.name}, N = {row.n}, D = {row.d}: {row.note}", style="dim", highlight=False, markup=False)
    raced = [row for row in rows if row.ratio is not None]
    slower = [row for row in raced if row.ratio is not None and row.ratio < LEVEL]
    console.print(
        f"{len(raced)} races, {len(slower)} below {LEVEL}x. One thread: CPU time of the process; more threads: by the clock; "
        "medians of interleaved rounds",
        highlight=False,
    )
    if options.out:
        console.print(f"record: {options.out}", markup=False, highlight=False)


def _fits(value: Any) -> bool:
    return isinstance(value, dict) and {"machine", "conditions", "rows"} <= set(value)
