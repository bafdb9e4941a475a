# SPDX-License-Identifier: Apache-2.0
"""Questions and answers about a page, nine types, each with one right answer."""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

import numpy as np

from ..questions import Question
from ..scenes import CHARACTERS
from .content import AMOUNTS, HEADINGS, ITEMS, KEYS, LETTERS, LINES, NUMBERS, VALUES, Content, is_code

Ask = Callable[[Content, np.random.Generator], list[Question]]


def spelled(number: int | str) -> str:
    """A number as answers write it, digit by digit."""
    return " ".join(str(number))


def _form(content: Content, code: bool) -> list[Question]:
    kind = "code" if code else "value"
    return [
        Question(kind, f"what is the {key} ?", " ".join(value) if code else value)
        for key, value in (content.lines if content.kind == "form" else ())
        if is_code(value) == code
    ]


def _cell(content: Content, rng: np.random.Generator) -> list[Question]:
    return [
        Question("cell", f"what is the {column} of {line[0]} ?", spelled(cell))
        for line in (content.lines if content.kind == "table" else ())
        for column, cell in zip(content.columns, line[1:], strict=True)
    ]


def _amount(content: Content, rng: np.random.Generator) -> list[Question]:
    lines = content.lines if content.kind == "receipt" else ()
    return [Question("amount", f"how many {item} ?", amount) for item, amount in lines]


def _sum(content: Content, rng: np.random.Generator) -> list[Question]:
    lines = content.lines if content.kind == "receipt" else ()
    return [
        Question("sum", f"what is {a} plus {b} ?", spelled(int(x) + int(y)))
        for i, (a, x) in enumerate(lines)
        for j, (b, y) in enumerate(lines)
        if i != j
    ]


def _largest(content: Content, rng: np.random.Generator) -> list[Question]:
    if not content.bars:
        return []
    return [
        Question("largest", f"which is {word} ?", content.lines[int(find(content.bars))][0])
        for word, find in (("largest", np.argmax), ("smallest", np.argmin))
    ]


def _lines(content: Content, rng: np.random.Generator) -> list[Question]:
    return [Question("lines", "how many lines ?", str(len(content.lines)))]


def _heading(content: Content, rng: np.random.Generator) -> list[Question]:
    return [Question("heading", "what does the heading say ?", " ".join(content.heading))] if content.heading else []


def _listed(content: Content, rng: np.random.Generator) -> list[Question]:
    """As many words that are there as words that are not; of the same sort."""
    there = [line[0] for line in content.lines]
    absent = sorted({*(KEYS if content.kind == "form" else ITEMS)} - {*there})
    other = [absent[int(i)] for i in rng.permutation(len(absent))[: len(there)]]
    asked = [(word, "yes") for word in there] + [(word, "no") for word in other]
    return [Question("listed", f"is {word} listed ?", answer) for word, answer in asked]


KINDS: dict[str, Ask] = {
    "value": lambda content, rng: _form(content, code=False),
    "code": lambda content, rng: _form(content, code=True),
    "cell": _cell,
    "amount": _amount,
    "sum": _sum,
    "largest": _largest,
    "lines": _lines,
    "heading": _heading,
    "listed": _listed,
}
CHANCE = {
    "value": 1 / len(VALUES),
    "code": 1 / (len(LETTERS) * len(CHARACTERS)),
    "cell": 1 / (NUMBERS[1] - NUMBERS[0] + 1),
    "amount": 1 / (AMOUNTS[1] - AMOUNTS[0] + 1),
    "sum": 1 / (2 * (AMOUNTS[1] - AMOUNTS[0]) + 1),
    "largest": mean(1 / count for count in range(LINES[0], LINES[1] + 1)),
    "lines": 1 / (LINES[1] - LINES[0] + 1),
    "heading": 1 / (len(HEADINGS[0]) * len(HEADINGS[1])),
    "listed": 1 / 2,
}
"""Accuracy of a uniform guess among the answers that a type allows (exact match of the whole answer); "largest": among the bars."""


def ask(content: Content, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of `kind` about a page, or None if it has none."""
    options = KINDS[kind](content, rng)
    return options[int(rng.integers(len(options)))] if options else None
