# SPDX-License-Identifier: Apache-2.0
"""One row of a file with its place: typed access to its columns, so that every error names file, row and column."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

from ..metrics.strings import edit_distance
from .cells import looks_like_list, parse_list

COLUMNS = {
    "id": ("id", "question_id", "questionid", "index", "uid", "qid"),
    "text": ("question", "text", "prompt", "query"),
    "answers": ("answers", "answer", "label", "gt_answer", "gold", "target"),
    "image": ("image", "images", "image_path", "img", "imgname", "file_name", "filename"),
    "options": ("options", "choices", "option", "candidates"),
    "hint": ("hint", "context"),
    "kind": ("kind", "type", "category", "answer_type", "question_type", "question_types", "types", "question_type_id"),
    "group": ("group",),
    "domain": ("l2_category",),
    "dataset": ("dataset", "dataset_name"),
}
"""What a column of a plain table may be called (whatever the case, with dashes or underscores); the first that a row has counts."""
_KNOWN = frozenset({"content", *(name for names in COLUMNS.values() for name in names)})
"""Names that are no slip of another."""
MISSING = ("nan", "NaN", "<NA>")
"""How programs write a missing value as text."""
MISSING_CELL = (*MISSING, "NAN", "None", "null", "NULL", "NaT")
"""The same in files without types (CSV, TSV), where a text and its absence look alike."""
_ABSENT = {mark.lower() for mark in MISSING_CELL}
_YESNO = {"yes": "yes", "no": "no", "true": "yes", "false": "no"}


class Twice(dict[str, Any]):
    """An object of JSON in which a key is there twice."""

    key = ""


@lru_cache(4096)
def canonical(name: str) -> str:
    """A column's name in lower case, with underscores for dashes and spaces."""
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


@lru_cache(4096)
def _nearly(columns: frozenset[str], names: tuple[str, ...]) -> tuple[str, str] | None:
    """A column whose name is a name of four letters or more with one letter wrong; a plural is no slip."""
    return next(
        (
            (column, name)
            for column in sorted(columns)
            for name in names
            if len(name) > 3 and abs(len(column) - len(name)) < 2 and column.rstrip("s") != name.rstrip("s")
            and edit_distance(column, name) == 1
        ),
        None,
    )  # fmt: skip


def blank(value: Any) -> bool:
    """Nothing there, as a file writes it."""
    return value is None or (isinstance(value, str) and not value.strip())


def _unset(value: Any) -> bool:
    return blank(value) or value != value or (isinstance(value, str) and value.strip() in MISSING)


def absent(value: Any) -> bool:
    """Nothing there, also as pandas writes it: NaN, or a word for it. For columns that may be empty."""
    return _unset(value) or (isinstance(value, str) and value.strip().lower() in _ABSENT)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Row:
    """A row: place ("FILE, row N"), columns by canonical name. typed: whether the file tells texts from numbers and nothing."""

    def __init__(self, place: str, fields: Any, typed: bool = True) -> None:
        self.place, self.typed = place, typed
        if not isinstance(fields, Mapping):
            raise ValueError(f"{place}: expected an object with a value for each column, got {short(fields)}")
        if isinstance(fields, Twice):
            raise ValueError(f"{place}: {fields.key!r} is there twice")
        self.names = {canonical(str(name)): str(name) for name in fields}
        if len(self.names) != len(fields):
            both = sorted(str(name) for name in fields if self.names[canonical(str(name))] != str(name))
            raise ValueError(f"{place}: two columns are called {both[0]!r} (but for case, dashes and spaces)")
        self.fields = {canonical(str(name)): value for name, value in fields.items()}

    def wrong(self, column: str, value: Any, wanted: str) -> ValueError:
        """The error of a value; `wanted` says what is allowed, and the way out."""
        return ValueError(f"{self.place}, column {self.names.get(column, column)}: got {short(value)}, {wanted}")

    def column(self, *names: str) -> str | None:
        """The first of the names (canonical) that the row has. Raises ValueError where it has one with a letter wrong instead."""
        for name in names:
            if name in self.fields:
                return name
        self._no_slip(names, _KNOWN)
        return None

    def _no_slip(self, names: tuple[str, ...], others: frozenset[str]) -> None:
        if near := _nearly(frozenset(self.fields) - others, names):
            raise ValueError(
                f"{self.place}, column {self.names[near[0]]}: there is no such column, only {near[1]!r}; give it that name, "
                "or one that is not so like it"
            )

    def value(self, *names: str) -> Any:
        """The value of the first of the names that the row has; None if it has none, or nothing in it.

        Raises ValueError if there is nothing in it but something in a column of a later name: which one counts?
        """
        column = self.column(*names)
        if column is None:
            return None
        if not blank(found := self.fields[column]):
            return found
        if other := next((name for name in names if not blank(self.fields.get(name))), None):
            raise self.wrong(
                column, found, f"but {short(self.fields[other])} in column {self.names[other]}: take one of them out"
            )
        return None

    def need(self, *names: str) -> tuple[str, Any]:
        """The column and its value. Raises ValueError if there is none."""
        value = self.value(*names)
        column = self.column(*names)
        if column is None:
            one = f"one of {', '.join(names)}" if len(names) > 1 else repr(names[0])
            raise ValueError(f"{self.place}: no column {one}; it has {', '.join(self.names.values())}")
        if value is None:
            raise self.wrong(column, self.fields[column], "there has to be something in it")
        return column, value

    def as_text(self, column: str, value: Any, marks: Sequence[str] = ()) -> str:
        """A text, or a number as one (2.0 as 2: what pandas makes of whole numbers beside a missing one).

        Raises ValueError for anything else, for NaN, and for one of `marks`.
        """
        if isinstance(value, str) and value.strip() not in marks:
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, (float, Decimal)) and math.isfinite(value):
            return str(int(value) if value == int(value) and isinstance(value, float) else value)
        raise self.wrong(column, value, "a text is needed")

    @property
    def marks(self) -> tuple[str, ...]:
        """Texts that stand for no text here."""
        return MISSING if self.typed else MISSING_CELL

    def text(self, *names: str) -> str:
        column, value = self.need(*names)
        return self.as_text(column, value, self.marks)

    def maybe(self, *names: str) -> str:
        """A text, "" if there is none or if it says that it is missing."""
        value = self.value(*names)
        return "" if absent(value) else self.as_text(self.column(*names) or "", value)

    def label(self, *names: str) -> str:
        """The name of a class, from the first of the columns that has one: a text, or the first of a list."""
        for name in (name for name in names if not absent(self.fields.get(name))):
            value: Any = self.listed(name, self.fields[name])
            value = value.get("structural") if isinstance(value, dict) else value[0] if value else None
            return "" if absent(value) else self.as_text(name, value)
        self.column(*names)
        return ""

    def listed(self, column: str, value: Any) -> list[Any] | dict[str, Any]:
        """A list (or object), also if it is written as text; one value is a list of one."""
        if isinstance(value, str) and looks_like_list(value):
            try:
                value = parse_list(value)
            except (ValueError, RecursionError) as error:
                raise self.wrong(
                    column,
                    value,
                    f"a list that cannot be read ({error}); a text that begins so is given as a list of one",
                ) from error
        if isinstance(value, Twice):
            raise self.wrong(column, dict(value), f"in which {value.key!r} is there twice")
        return value if isinstance(value, dict) else list(value) if isinstance(value, (list, tuple)) else [value]

    def texts(self, *names: str) -> tuple[str, ...]:
        """The answers of a column: a list of texts or of objects with "answer", or one text. Empty ones among several stay."""
        column, value = self.need(*names)
        entries = self.listed(column, value)
        if isinstance(entries, dict):
            raise self.wrong(column, entries, "a list of texts is needed")
        marks = self.marks if len(entries) == 1 else ()  # people may have answered "none"
        found = []
        for entry in entries:
            if isinstance(entry, Mapping):
                if isinstance(entry, Twice) or "answer" not in entry:
                    raise self.wrong(column, entry, 'an object with one "answer" is needed')
                entry = entry["answer"]
            found.append(self.as_text(column, entry, marks))
        if all(blank(text) for text in found):
            raise self.wrong(column, value, "there has to be a text in it")
        return tuple(found)

    def integer(self, *names: str) -> int:
        column, value = self.need(*names)
        try:
            number = int(self.as_text(column, value))
        except ValueError:
            raise self.wrong(column, value, "a whole number is needed") from None
        return number

    def yesno(self, column: str, value: Any) -> str:
        """yes or no, whatever the case, also from a boolean, a list of one, or several that say the same."""
        entries = self.listed(column, value)
        said = {_YESNO.get(str(entry).strip().rstrip(".").lower()) for entry in entries}
        if len(said) != 1 or None in said or isinstance(entries, dict):
            raise self.wrong(column, value, "yes or no is needed")
        return str(said.pop())

    def series(self, form: str, keys: Iterable[str]) -> list[tuple[str, Any]]:
        """The values of columns like choice_a, choice_b, ... by key, up to the last that has one. Raises ValueError where one
        between them has none."""
        columns = {key: form.format(key) for key in keys}
        there = [name in self.fields for name in columns.values()]
        given = [not _unset(self.fields.get(name)) for name in columns.values()]
        last = max((i for i, flag in enumerate(given) if flag), default=-1)
        if False in given[: last + 1]:
            names = [self.names.get(name, name) for name in columns.values()]
            raise ValueError(
                f"{self.place}, column {names[given.index(False)]}: got nothing, but there is something in column {names[last]}; "
                "fill it, or move the others up"
            )
        if any(there) and not all(there):
            self._no_slip((list(columns.values())[sum(there)],), frozenset(columns.values()))
        return [(key, self.fields[name]) for (key, name), flag in zip(columns.items(), given, strict=True) if flag]

    def row(self, name: str) -> Row:
        """The object in a column."""
        column, value = self.need(name)
        return Row(f"{self.place}, {self.names[column]}", value)

    def rows(self, name: str) -> list[Row]:
        """The objects of a list in a column, each a row of its own."""
        column, value = self.need(name)
        if not isinstance(value, list) or not value:
            raise self.wrong(column, value, "a list of objects is needed, one for each question")
        return [Row(f"{self.place}, row {i}", entry) for i, entry in enumerate(value, 1)]
