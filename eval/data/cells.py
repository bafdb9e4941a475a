# SPDX-License-Identifier: Apache-2.0
"""Lists that a table holds as text: as JSON, Python and numpy write them."""

from __future__ import annotations

import ast
import math
import re
import warnings
from typing import Any

_TOKEN = re.compile(r"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|[\[\]{},:]|[^\s\[\]{},:'"]+)(\s*)""", re.DOTALL)
_WORDS = {
    "true": True,
    "True": True,
    "false": False,
    "False": False,
    "null": None,
    "None": None,
    "nan": math.nan,
    "NaN": math.nan,
}


def looks_like_list(text: str) -> bool:
    """Whether a cell is meant as a list or an object."""
    return re.match(r"\s*(\[|\{|array\(|\(\s*['\"])", text) is not None


def parse_list(text: str) -> Any:
    """The list or dict that `text` writes: `["a", 1]`, `['a', 1]`, or without commas as numpy prints it, `['a' 'b']`.

    Strings beside each other are two items, never one. Raises ValueError for anything else, such as a list that was cut short
    by "..." or that has some commas only.
    """
    stripped = text.strip()
    tokens, end = [], 0
    for found in _TOKEN.finditer(stripped):
        if found.start() != end:
            raise ValueError(f"{stripped[end:][:20]!r} is left over")
        end = found.end()
        tokens.append((found[1], bool(found[2])))
    if end != len(stripped):
        raise ValueError(f"a quote never closes: {stripped[end:][:20]!r}")
    value, at = _value([*tokens, ("", False)], 0)
    if at != len(tokens):
        raise ValueError(f"{tokens[at][0][:20]!r} is left over")
    return value


def _value(tokens: list[tuple[str, bool]], at: int) -> tuple[Any, int]:
    token = tokens[at][0]
    if token == "[":
        return _items(tokens, at + 1)
    if token == "{":
        return _pairs(tokens, at + 1)
    if token[:1] in ("'", '"') and token:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\c" is two letters, as Python says with a warning
            try:
                return ast.literal_eval(token.replace("\n", "\\n").replace("\r", "\\r")), at + 1
            except SyntaxError as error:
                raise ValueError(f"{token[:20]} is no string: {error.msg}") from error
    if token in _WORDS:
        return _WORDS[token], at + 1
    try:
        return (int(token) if re.fullmatch(r"-?\d+", token) else float(token)), at + 1
    except ValueError:
        raise ValueError(f"{token[:20]!r} is neither a number nor in quotes") from None


def _items(tokens: list[tuple[str, bool]], at: int) -> tuple[list[Any], int]:
    items: list[Any] = []
    commas = spaces = False
    while tokens[at][0] != "]":
        value, after = _value(tokens, at)
        items.append(value)
        at = after
        if tokens[at][0] == ",":
            commas, at = True, at + 1
        elif tokens[at][0] != "]":
            if not tokens[at - 1][1]:
                raise ValueError(f"no comma before {tokens[at][0][:20]!r}")
            spaces = True
    if commas and spaces:
        raise ValueError("some items have a comma between them and some do not")
    return items, at + 1


def _pairs(tokens: list[tuple[str, bool]], at: int) -> tuple[dict[Any, Any], int]:
    found: dict[Any, Any] = {}
    while tokens[at][0] != "}":
        key, at = _value(tokens, at)
        if tokens[at][0] != ":" or not isinstance(key, str) or key in found:
            raise ValueError(f"{key!r} is no key of its own")
        found[key], at = _value(tokens, at + 1)
        if tokens[at][0] == ",":
            at += 1
        elif tokens[at][0] != "}":
            raise ValueError(f"no comma before {tokens[at][0][:20]!r}")
    return found, at + 1
