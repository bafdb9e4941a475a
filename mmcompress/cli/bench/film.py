# SPDX-License-Identifier: Apache-2.0
"""`mmcompress bench video`: what methods cost on a long video."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ...records import read, write_json
from ..common import check_least
from . import kernels, model, real

if TYPE_CHECKING:
    from rich.console import Console

ONLY = ("tokens", "no_memory")
TOKENS = 20_480
KIND = "`mmcompress bench video`"


def add_options(bench: argparse.ArgumentParser) -> None:
    """The options of `mmcompress bench video`."""
    group = bench.add_argument_group(
        "bench video",
        "a mid-size random Qwen2.5-VL and a video of 40 frames; --plan with {keep} in it is timed at 25% and 10%",
    )
    group.add_argument("--tokens", type=int, metavar="N", help=f"about so many visual tokens (default {TOKENS:,})")
    group.add_argument("--no-memory", action="store_true", help="leave the peak memory out, a process for each plan")


def run(options: argparse.Namespace, console: Console) -> None:
    """Measure what is not in the record yet, show, say whether selections are cheap enough."""
    from rich.markup import escape
    from rich.table import Table

    from ...eval.cost.film import HEADINGS, SHARE, Long, added, cells, measure_film, share, usual
    from ...eval.machine import threads

    if options.what != ["video"]:
        raise ValueError("bench video: by itself, without other things to measure")
    others = [name for name in (*kernels.OPTIONS, *model.ONLY, *real.ONLY) if getattr(options, name, None)]
    if others:
        raise ValueError(f"--{others[0].replace('_', '-')} means nothing to `mmcompress bench video`")
    check_least(options, repeats=1, tokens=80)
    setup = Long.of(options.tokens or TOKENS, options.repeats, not options.no_memory)
    known = read(options.out, KIND, _fits) if options.out else None

    def save(content: dict[str, Any]) -> None:
        if options.out:
            write_json(options.out, content)

    with console.status("") as status:
        content = measure_film(setup, options.plan or usual(), known, save, status.update)
    stock, here = content["stock"], content["conditions"]["machine"]
    table = Table(
        title=escape(f"{setup.tokens} visual tokens, batch 1, float32, {here['device']}, {threads(here['threads'])}"),
        caption="decode: of the file, and cutting into patches; signals: what vision takes longer for them; TTFT: the sum; of "
        "saved: selection alone, part of the prefill that the plan saves; peak: what the prefill adds, of a small model",
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "plan" else "right")
    for row in (stock, *content["rows"]):
        table.add_row(*map(escape, cells(row, stock)))
    console.print(table)
    for row in content["rows"]:
        if row.get("refused"):
            console.print(f"{row['plan']}: {row['refused']}", markup=False, highlight=False)
    dear = [row["plan"] for row in content["rows"] if (share(row) or 0) > SHARE]
    console.print(
        f"selections above {SHARE:.0%} of the prefill that they save, signals apart: {', '.join(dear) or 'none'}",
        markup=False,
        highlight=False,
    )
    if useless := [row["plan"] for row in content["rows"] if "refused" not in row and share(row) is None]:
        console.print(f"no shorter prefill than the stock model's: {', '.join(useless)}", markup=False, highlight=False)
    if (most := added(stock)) is not None:
        more = [row["plan"] for row in content["rows"] if (added(row) or 0.0) > most]
        console.print(
            f"peak memory above the stock prefill's: {', '.join(more) or 'none'}", markup=False, highlight=False
        )
    if options.out:
        console.print(f"record: {options.out}", markup=False, highlight=False)


def _fits(value: Any) -> bool:
    return isinstance(value, dict) and {"conditions", "rows"} <= set(value)
