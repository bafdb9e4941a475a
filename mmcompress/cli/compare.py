# SPDX-License-Identifier: Apache-2.0
"""`mmcompress compare`: records side by side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..records import read, write_json
from .common import OutFile
from .eval import print_lines

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress compare eval_output/*.json --flips 3"


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("records", type=Path, nargs="+", help="records (.json), of one task or of several")
    parser.add_argument(
        "--base",
        type=Path,
        help="record to compare the others of its task with (default: that of the stock model, else the first)",
    )
    parser.add_argument(
        "--force", action="store_true", help="also compare records whose settings (prompt, questions, model) differ"
    )
    parser.add_argument(
        "--flips", type=int, default=0, metavar="N", help="show N answers that were right and are wrong"
    )
    parser.add_argument("--out", type=OutFile, help="also write the comparisons as JSON")


def run(options: argparse.Namespace, console: Console) -> None:
    """Compare all records of a task with the first, and sum up over tasks."""
    from ..eval.comparison import compare, kind_table, outlook, retention, stock_first, summary_table
    from ..eval.evaluator import load_record, rows_of
    from ..eval.statistics import RIGHT, paired

    if options.out:
        read(options.out, "`mmcompress compare`", lambda value: isinstance(value, list))
    told = [] if options.base is None else [load_record(options.base)]
    others = [load_record(path) for path in options.records if path != options.base]
    tasks: dict[str, list[dict[str, Any]]] = {}
    for record in (*told, *stock_first(others)):
        tasks.setdefault(record["settings"]["task"], []).append(record)
    if alone := [name for name, found in tasks.items() if len(found) < 2]:
        raise ValueError(f"{alone[0]}: one record alone, nothing to compare it with")
    found = []
    pairs: dict[str, Any] = {}
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
            print_lines(console, outlook(one))
            if one.flips.right_to_wrong + one.flips.wrong_to_right:
                print_lines(
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
