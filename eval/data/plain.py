# SPDX-License-Identifier: Apache-2.0
"""Plain tables: one row per question, with columns under any of the usual names."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from .files import Images, is_picture
from .question import Picture, Question
from .rows import COLUMNS, MISSING, Row, absent

YESNO = ("pope", "mme", "yesno")
NUMBERED = ("ai2d", "scienceqa")
"""Benchmarks whose gold answers are yes or no; and those where "2" is the number of an option from 0, never its text."""
CHOICES = (*NUMBERED, "mmbench", "seedbench")
"""Benchmarks in which every question has options."""
PICTURED = ("scienceqa", "hallusionbench")
"""Benchmarks of which the questions without a picture are left out."""
_TOLD = {name for what in ("text", "answers", "image", "options", "hint") for name in COLUMNS[what]}
_LETTERS = tuple(string.ascii_lowercase)


def table_questions(rows: Sequence[Row], finder: Images, task: str = "exact") -> list[Question]:
    """Questions of the rows of a table. Columns: `COLUMNS`; options also as A, B, C, ... or choice_a, choice_b, ...; pictures as
    paths, as bytes (hub datasets) or in base64, several as a list or as image_1, image_2, ...; all other short columns are
    kept as extra. Gold answers are read as `task` has them.

    Raises ValueError that names file, row and column of what cannot be used.
    """
    found = []
    for number, row in enumerate(rows):
        if task == "seedbench" and is_video(row):
            continue
        pictures = _pictures(row)
        if not pictures and task in PICTURED:
            continue
        column = row.column(*COLUMNS["id"])
        options = options_of(row)
        if not options and task in CHOICES:
            raise ValueError(f"{row.place}: no options (column options, choices, A, B, ... or choice_a, choice_b, ...)")
        found.append(
            Question(
                id=row.text(column) if column else str(number),
                text=row.text(*COLUMNS["text"]),
                images=tuple(_picture(row, name, value, finder) for name, value in pictures),
                answers=golds(row, options, task),
                options=options,
                hint=row.maybe(*COLUMNS["hint"]),
                kind=row.label(*COLUMNS["kind"]),
                group=row.maybe(*COLUMNS["group"]),
                extra=_extra(row, task),
                place=row.place,
            )
        )
    if found and not any(question.images for question in found):
        raise ValueError(
            f"{found[0].place}: no picture in any row; a column {', '.join(COLUMNS['image'])} is needed, there are "
            f"{', '.join(rows[0].names.values())}"
        )
    finder.check()
    return found


def is_video(row: Row) -> bool:
    """Whether a question of SEED-Bench is about a video. Raises ValueError for another type than image and video."""
    kind = row.label("data_type") or "image"
    if kind not in ("image", "video"):
        raise row.wrong("data_type", kind, "image or video is needed")
    return kind == "video"


def _extra(row: Row, task: str) -> dict[str, str]:
    """Other short columns by canonical name; `dataset` whatever it is called, which OCRBench cannot do without."""
    found = {
        name: str(value)
        for name, value in row.fields.items()
        if isinstance(value, (str, int, float)) and name not in _TOLD and len(name) > 1 and len(str(value)) < 200
    }
    row.column(*COLUMNS["domain"])
    dataset = row.text(*COLUMNS["dataset"]) if task == "ocrbench" else row.maybe(*COLUMNS["dataset"])
    return found | ({"dataset": dataset} if dataset else {})


def options_of(row: Row) -> tuple[tuple[str, str], ...]:
    """(letter, text) of each option, from a list, an object by letters, or a column for each."""
    value = row.value(*COLUMNS["options"])
    if value is not None:
        column = row.column(*COLUMNS["options"]) or ""
        given = row.listed(column, value)
        letters = (
            [key.upper() for key in given] if isinstance(given, dict) else list(string.ascii_uppercase[: len(given)])
        )
        entries = list(given.values()) if isinstance(given, dict) else given
        if len(entries) != len(letters) or sorted(letters) != list(string.ascii_uppercase[: len(letters)]):
            raise row.wrong(column, value, "a list of at most 26 options, or an object with A, B, C, ... is needed")
        if len(entries) == 1 and isinstance(value, str):
            raise row.wrong(column, value, 'a list of several options is needed, as ["red", "blue"]')
        return tuple(
            sorted(
                (letter, row.as_text(column, entry, MISSING)) for letter, entry in zip(letters, entries, strict=True)
            )
        )
    for form in ("choice_{}", "option_{}", "{}"):
        columns = [name for name in row.fields if re.fullmatch(form.format("[a-z]"), name)]
        if form == "{}":
            if not {"a", "b"} & set(columns):
                continue  # x and y, say
            if others := [row.names[name] for name in row.fields if len(name) == 1 and name not in _LETTERS]:
                raise ValueError(
                    f"{row.place}, column {others[0]}: no letter, beside options by letter; give it a longer name"
                )
        chosen = row.series(form, _LETTERS)
        if len(chosen) == 1:
            raise row.wrong(form.format("a"), chosen[0][1], "but there is no second option")
        if chosen:
            return tuple((letter.upper(), row.as_text(form.format(letter), text, row.marks)) for letter, text in chosen)
    return ()


def golds(row: Row, options: Sequence[tuple[str, str]], task: str = "exact") -> tuple[str, ...]:
    """Gold answers as texts, () if the row has none: of a multiple choice letters, also if the file has its number or its text;
    yes or no where the task wants that. Raises ValueError for what is neither."""
    value = row.value(*COLUMNS["answers"])
    column = row.column(*COLUMNS["answers"])
    if column is None or value is None or row.listed(column, value) == []:
        return ()
    if task in YESNO:
        return (row.yesno(column, value),)
    if task == "hallusionbench":
        said = {"yes": "1", "no": "0"}.get(str(value).strip().lower()) or row.text(column)
        if said not in ("0", "1"):
            raise row.wrong(column, value, "0 (no) or 1 (yes) is needed")
        return (said,)
    if isinstance(value, bool):
        raise row.wrong(column, value, "a text is needed: write yes or no (--task yesno takes true and false too)")
    texts = row.texts(column)
    if not options:
        return texts
    numbers = [isinstance(entry, int) for entry in row.listed(column, value)]
    return tuple(
        letter_of(row, column, text, options, task in NUMBERED, number)
        for text, number in zip(texts, numbers, strict=True)
    )


def letter_of(
    row: Row, column: str, answer: str, options: Sequence[tuple[str, str]], numbered: bool = False, number: bool = False
) -> str:
    """The letter of a gold answer. numbered: digits are the number of an option from 0; number: so they are, if they are not
    the text of another as well."""
    letters = [letter for letter, _ in options]
    listed = ", ".join(map(": ".join, options))
    index = int(answer) if re.fullmatch("[0-9]{1,2}", answer) and int(answer) < len(letters) else None
    if numbered and index is not None:
        return letters[index]
    same = [letter for letter, text in options if text == answer]
    letter = answer.strip().upper().removesuffix(".")
    if letter in letters and len(answer) < 3 and not (answer != letter and same and letter not in same):
        return letter
    if len(same) > 1 or letter in letters or (number and index is not None and same and same != [letters[index]]):
        raise row.wrong(column, answer, f"which may be more than one of {listed}: give its letter")
    if same:
        return same[0]
    if index is None:
        raise row.wrong(column, answer, f"none of the options {listed}: give its letter, its number from 0 or its text")
    return letters[index]


def _pictures(row: Row) -> list[tuple[str, Any]]:
    """(column, value) of each picture of a row."""
    if "image_1" in row.fields or "image_2" in row.fields:
        return [(f"image_{i}", value) for i, value in row.series("image_{}", map(str, range(1, 20)))]
    value = row.value(*COLUMNS["image"])
    if absent(value):
        return []
    column = row.column(*COLUMNS["image"]) or ""
    if isinstance(value, (dict, bytes)):
        return [(column, value)]
    entries = row.listed(column, value)
    if isinstance(entries, dict) or not all(isinstance(entry, (str, dict, bytes)) for entry in entries):
        raise row.wrong(column, value, "a picture or a list of pictures is needed")
    return [(column, entry) for entry in entries]


def _picture(row: Row, column: str, value: Any, finder: Images) -> Picture:
    told = isinstance(value, dict)
    if told:  # the hub's Image feature
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes) and (told or is_picture(value)):
        return value
    if not isinstance(value, str) or absent(value) or "\0" in value:
        raise row.wrong(column, value, "a path, the bytes of a picture, or these in base64 are needed")
    found = finder.decoded(value)
    if found is None and value.startswith("data:"):
        raise row.wrong(column, value, "which is no data URI in base64")
    return found or finder.find(value, place=f"{row.place}, column {row.names[column]}")
