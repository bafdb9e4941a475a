# SPDX-License-Identifier: Apache-2.0
"""`mmcompress models`: what every architecture of transformers takes, from the table of the crossed test."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress models llava"


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.description = (parser.description or "") + " `mmcompress check` says it of one checkpoint."
    parser.add_argument(
        "words", nargs="*", metavar="WORD", help="only rows whose name or checkpoints contain one of these"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="rows as JSON, for machines")
    form.add_argument("--markdown", action="store_true", help="the page docs/models.md, with all rows")


def run(options: argparse.Namespace, console: Console) -> None:
    """Print the rows, their reasons, and counts."""
    from rich.table import Table

    from ..architectures import COLUMNS, HEADINGS, REASONS, architectures, counts, markdown

    if options.markdown:
        print(markdown(), end="")
        return
    found = architectures(options.words)
    if not found:
        raise ValueError(
            f"no architecture or checkpoint with {' or '.join(options.words)}: `mmcompress models` lists all"
        )
    if options.json:
        print(json.dumps({one.name: {**one.row, "checkpoints": one.checkpoints} for one in found}, indent=1))
        return
    shown = Table(padding=(0, 1), collapse_padding=True)
    for heading in HEADINGS:
        shown.add_column(heading, overflow="fold", no_wrap=heading == HEADINGS[0])
    for one in found:
        shown.add_row(one.name, "\n".join(one.checkpoints), *one.cells)
    console.print(shown)
    said = {one.row.get(kind) for one in found for kind in (*COLUMNS, "signal")}
    for word, (_, sentence) in REASONS.items():
        if word in said and word not in ("no videos", "no audio"):
            console.print(f"{word}: {sentence}", markup=False, highlight=False)
    console.print(f"{len(found)} architectures. Exact: {counts(found)}", markup=False, highlight=False)
