# SPDX-License-Identifier: Apache-2.0
"""What all tables of docs/ are written with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..machine import told

NOT_YET = "Not measured yet."


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str] = ()) -> str:
    """A Markdown table; all columns but the first and those of `words` to the right."""
    lines = [headings, ["---" if i == 0 or name in words else "---:" for i, name in enumerate(headings)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def conditions(record: dict[str, Any]) -> str:
    """Where a record was measured."""
    return told(record["machine"])
