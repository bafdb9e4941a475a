# SPDX-License-Identifier: Apache-2.0
"""Tables on narrow screens: a table that does not fit becomes a block per row, and nothing in it is cut."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


def fitted(table: Table, console: Console) -> Any:
    """The table itself where it fits the console or has no headings, else its rows below each other: the first cell, and under it
    the others, each behind its heading."""
    if not table.show_header or _fits(table, console):
        return table
    parts: list[Any] = [Text.from_markup(str(table.title)) if table.title else Text()]
    headings = [_flat(column.header) for column in table.columns]
    for row in zip_longest(*(list(column.cells) for column in table.columns), fillvalue=""):
        first, *others = (_flat(cell) for cell in row)
        told = [f"{heading} {cell}" for heading, cell in zip(headings[1:], others, strict=True) if cell]
        parts += [
            Text(first, style="bold"),
            *(Padding(Text(line), (0, 0, 0, 2)) for line in _lines(told, console.width - 2)),
        ]
    if table.caption:
        parts.append(Text.from_markup(str(table.caption), style="dim"))
    return Group(*parts)


def _fits(table: Table, console: Console) -> bool:
    """Whether no cell has to be wrapped for the table to fit."""
    wide = console.options.update(width=10_000, max_width=10_000)
    return console.measure(table, options=wide).maximum <= console.width


def _flat(cell: Any) -> str:
    """A cell on one line, its markup taken out."""
    text = cell if isinstance(cell, Text) else Text.from_markup(str(cell))
    return " ".join(text.plain.split())


def _lines(parts: list[str], width: int) -> list[str]:
    """Parts joined to lines of at most `width` columns; a part that is longer has a line of its own."""
    lines: list[str] = []
    for part in parts:
        if lines and len(lines[-1]) + 3 + len(part) <= width:
            lines[-1] += f" · {part}"
        else:
            lines.append(part)
    return lines
