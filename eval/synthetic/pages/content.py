# SPDX-License-Identifier: Apache-2.0
"""What pages say: words, lines and headings, and which split each association belongs to."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from ..scenes import CHARACTERS

Split: TypeAlias = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEYS = _words("name city color month tool fruit drink sport shop team room metal tree bird plan boss")
"""What forms ask for."""
VALUES = _words(
    "rome oslo lima cairo delhi quito jade amber coral ivory silk wool oak pine maple cedar "
    "tiger zebra otter eagle piano flute drum harp judo golf chess polo moon comet venus mars"
)
"""What forms say; a value fits every key, so that only the page tells which one it is."""
ITEMS = _words(
    "milk rice bread soap salt corn tea egg honey lemon sugar pasta "
    "bean fish ham jam leek mint nut oil pear plum soda yam"
)
"""What receipts and tables list, and what bars stand for."""
COLUMNS = _words("price size age year rank mass rate cost")
HEADINGS = (
    _words("north south east west first final daily yearly small grand"),
    _words("report order list survey bill table notice record chart sheet"),
)
"""First and second word of a heading."""
DIGITS = "0123456789"
LETTERS = tuple(c for c in CHARACTERS if c not in DIGITS)
"""What a code begins with; its second and last character is any of `CHARACTERS`."""
CODE_LENGTH = 2
NUMBERS = (10, 99)
"""Smallest and largest number in a table."""
AMOUNTS = (1, 6)
"""Smallest and largest amount on a receipt."""
LINES = (3, 6)
"""Fewest and most lines of a page (entries, rows, items or bars; heading and names of columns do not count)."""
KINDS = ("form", "table", "receipt", "chart")


@dataclass(frozen=True)
class Content:
    """What a page says.

    lines     form: (key, value); table: (label, number, ...), one for each of `columns`; receipt: (item, amount); chart: (label,).
    bars      lengths of a chart's bars, parts of the longest; empty otherwise.
    """

    kind: str
    heading: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...] = ()
    bars: tuple[float, ...] = ()

    def atoms(self) -> Iterator[str]:
        """The associations that the page states; each belongs to one split, and a page only has those of its own split."""
        if self.heading:
            yield " ".join(("heading", *self.heading))
        for number, line in enumerate(self.lines):
            if self.kind == "table":
                yield from (f"table {line[0]} {c} {cell}" for c, cell in zip(self.columns, line[1:], strict=True))
            elif self.kind == "receipt":
                yield f"receipt {number} {' '.join(line)}"
            elif self.kind == "chart":
                yield f"chart {self.lines[number - 1][0] if number else ''} {line[0]}"
            else:
                yield f"form {' '.join(line)}"


def split_of(atom: str) -> Split:
    """The split of an association, by its checksum: one in ten is of the test, one of the dev split."""
    return {0: "test", 1: "dev"}.get(zlib.crc32(atom.encode()) % 10, "train")  # type: ignore[return-value]


def make_content(
    split: Split, kind: str, lines: int, columns: int, heading: bool, rng: np.random.Generator, codes: float = 0.4
) -> Content:
    """Random content with so many lines (and columns, in a table), all of whose associations are of `split`. codes: how many values
    of a form are codes."""

    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    above: tuple[str, ...] = ()
    while heading and not (above and _fits(split, Content(kind, above, ()))):
        above = (pick(HEADINGS[0]), pick(HEADINGS[1]))
    named: tuple[str, ...] = ()
    if kind == "table":
        named = tuple(COLUMNS[int(i)] for i in rng.permutation(len(COLUMNS))[:columns])
    made: list[tuple[str, ...]] = []
    tries = 0
    while len(made) < lines:
        tries += 1
        if tries % 500 == 0:  # no bar of this split may stand below the last one
            made = []
        label = pick(KEYS if kind == "form" else ITEMS)
        if any(label == line[0] for line in made):
            continue
        line: tuple[str, ...] = (label,)
        if kind == "form":
            line = (label, _code(rng) if rng.random() < codes else pick(VALUES))
        elif kind == "receipt":
            line = (label, str(rng.integers(AMOUNTS[0], AMOUNTS[1] + 1)))
        elif kind == "table":
            line = (label, *(_number(split, label, name, rng) for name in named))
        if _fits(split, Content(kind, (), (*made, line), named)):
            made.append(line)
    bars: tuple[float, ...] = ()
    if kind == "chart":
        bars = _bars(lines, rng)
    return Content(kind, above, tuple(made), named, bars)


def _fits(split: Split, content: Content) -> bool:
    return all(split_of(atom) == split for atom in content.atoms())


def _code(rng: np.random.Generator) -> str:
    return LETTERS[int(rng.integers(len(LETTERS)))] + CHARACTERS[int(rng.integers(len(CHARACTERS)))]


def _number(split: Split, label: str, column: str, rng: np.random.Generator) -> str:
    while True:
        number = str(rng.integers(NUMBERS[0], NUMBERS[1] + 1))
        if split_of(f"table {label} {column} {number}") == split:
            return number


def _bars(count: int, rng: np.random.Generator) -> tuple[float, ...]:
    """Lengths in which the largest and the smallest stand out by a tenth at least."""
    while True:
        bars = rng.uniform(0.2, 1.0, count)
        bars = bars / bars.max()
        low, *_, high = ranked = sorted(bars)
        if ranked[1] - low >= 0.1 and high - ranked[-2] >= 0.1:
            return tuple(float(bar) for bar in bars)


def is_code(text: str) -> bool:
    """Whether a value is a code and no word."""
    return len(text) == CODE_LENGTH and text[0] in LETTERS and text[1] in CHARACTERS
