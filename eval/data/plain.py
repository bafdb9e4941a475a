# SPDX-License-Identifier: Apache-2.0
"""Plain tables: one row per question, with columns under any of the usual names."""

from __future__ import annotations

import ast
import base64
import binascii
import json
import string
from pathlib import Path
from typing import Any

from .files import Images
from .question import Picture, Question

COLUMNS = {
    "id": ("id", "question_id", "questionId", "index", "uid", "qid"),
    "text": ("question", "text", "prompt", "query"),
    "answers": ("answers", "answer", "label", "gt_answer", "gold", "target"),
    "image": ("image", "images", "image_path", "img", "imgname", "image_1", "file_name", "filename"),
    "options": ("options", "choices", "option", "candidates"),
    "hint": ("hint", "context"),
    "kind": ("kind", "type", "category", "question_type", "answer_type", "types"),
}
"""What a column may be called, the first that a row has counts."""


_TOLD = {name for what in ("text", "answers", "image", "options", "hint") for name in COLUMNS[what]}


def table_questions(rows: list[dict[str, Any]], path: Path, finder: Images, numbered: bool = False) -> list[Question]:
    """Questions of the rows of a table. Columns: `COLUMNS`; options also as A, B, C, ... or choice_a, choice_b, ...; pictures as
    paths, as bytes (hub datasets) or in base64, several as a list or as image_1, image_2, ...; all other short columns are
    kept as extra. numbered: a gold answer like "2" is the number of an option from 0, not its text."""
    cache: dict[str, Picture] = {}
    found = []
    for number, row in enumerate(rows):
        text = _get(row, "text")
        if text is None:
            raise ValueError(
                f"{path}, row {number}: no question: a column {', '.join(COLUMNS['text'])} is needed; it has {', '.join(row)}"
            )
        options = _options(row)
        answers = _answers(_get(row, "answers"), options, numbered)
        hint, kind, key = _get(row, "hint"), _get(row, "kind"), _get(row, "id")
        extra = {
            name: str(value)
            for name, value in row.items()
            if isinstance(value, (str, int, float)) and name not in _TOLD and len(name) > 1 and len(str(value)) < 200
        }
        found.append(
            Question(
                id=str(number if key is None else key),
                text=str(text),
                images=tuple(_picture(value, finder, cache) for value in _pictures(row)),
                answers=answers,
                options=options,
                hint="" if hint is None or str(hint).lower() == "nan" else str(hint),
                kind=str((kind[0] if isinstance(kind, list) and kind else kind) or ""),
                group=str(row.get("group") or ""),
                extra=extra,
            )
        )
    finder.check()
    return found


def _get(row: dict[str, Any], what: str) -> Any:
    return next((row[name] for name in COLUMNS[what] if row.get(name) not in (None, "")), None)


def as_list(value: Any) -> list[Any]:
    """A list, also if it is written as text ("['a', 'b']") or is a single value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        for read in (json.loads, ast.literal_eval):
            try:
                made = read(value)
            except (ValueError, SyntaxError):
                continue
            if isinstance(made, list):
                return made
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _options(row: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    given = _get(row, "options")
    if isinstance(given, dict) and set(given) <= set(string.ascii_uppercase):
        return tuple((letter, str(text)) for letter, text in sorted(given.items()))
    if given is not None:
        return tuple(zip(string.ascii_uppercase, (str(text) for text in as_list(given)), strict=False))
    for form in ("{}", "choice_{}", "option_{}"):
        letters = string.ascii_uppercase if form == "{}" else string.ascii_lowercase
        columns = [letter for letter in letters[:10] if row.get(form.format(letter)) not in (None, "")]
        if len(columns) > 1:
            texts = ((letter.upper(), str(row[form.format(letter)])) for letter in columns)
            return tuple((letter, text) for letter, text in texts if text.lower() != "nan")
    return ()


def _answers(value: Any, options: tuple[tuple[str, str], ...], numbered: bool) -> tuple[str, ...]:
    """Gold answers as strings; of a multiple choice as letters, also if the file has its number or its text."""
    if value is None:
        return ()
    given = [entry.get("answer") if isinstance(entry, dict) else entry for entry in as_list(value)]
    answers = tuple(str(entry) for entry in given if entry is not None)
    if not options:
        return answers
    letters, texts = [letter for letter, _ in options], [text for _, text in options]

    def letter_of(answer: str) -> str:
        if answer.strip().upper().rstrip(".") in letters:
            return answer.strip().upper().rstrip(".")
        index = answer.isdigit() and int(answer) < len(letters)
        if answer in texts and not (index and (numbered or isinstance(value, int))):
            return letters[texts.index(answer)]
        if index:
            return letters[int(answer)]
        raise ValueError(f"the answer {answer!r} is none of the options {', '.join(map(': '.join, options))}")

    return tuple(letter_of(answer) for answer in answers)


def _pictures(row: dict[str, Any]) -> list[Any]:
    if row.get("image_1") is not None:
        return [row[f"image_{i}"] for i in range(1, 20) if row.get(f"image_{i}") is not None]
    value = _get(row, "image")
    return [] if value is None else as_list(value)


def _picture(value: Any, finder: Images, cache: dict[str, Picture]) -> Picture:
    if isinstance(value, dict):  # the hub's Image feature
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes):
        return value
    text = str(value)
    if len(text) > 512:
        if text not in cache:
            try:
                cache[text] = base64.b64decode(text, validate=True)
            except binascii.Error as error:
                raise ValueError(f"a picture is neither a path nor base64: {text[:40]}...") from error
        return cache[text]
    return finder.find(text)
