# SPDX-License-Identifier: Apache-2.0
"""What all layouts become: questions, and pictures that are opened when their turn comes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from PIL import Image

from ...pictures import PictureError, open_picture, picture_size

__all__ = ["Picture", "PictureError", "Question", "check_questions", "digest", "open_picture", "picture_size"]

Picture: TypeAlias = "Path | bytes | Callable[[], Image.Image]"
"""A file, the bytes of one, or what draws it."""


@dataclass(frozen=True)
class Question:
    """One question about pictures.

    text: as the file has it, without the instruction that a protocol adds; answers: all that are right (of a multiple
    choice its letter), none if they are not known; options: (letter, text); kind: for the breakdown by question type;
    group: questions that are judged together; extra: what only one benchmark has; place: file and row, for messages.
    """

    id: str
    text: str
    images: tuple[Picture, ...] = field(repr=False)
    answers: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    hint: str = ""
    kind: str = ""
    group: str = ""
    extra: Mapping[str, str] = field(default_factory=dict, hash=False)
    place: str = field(default="", repr=False, compare=False)


def check_questions(questions: Sequence[Question], where: Path | str) -> Sequence[Question]:
    """Raises ValueError if there are none or two of one id."""
    if not questions:
        raise ValueError(f"{where}: no questions in it")
    seen: dict[str, Question] = {}
    for question in questions:
        if (first := seen.setdefault(question.id, question)) is not question:
            raise ValueError(
                f"{question.place or where}: the id {question.id!r} is there twice (also in {first.place or where}); ids have "
                "to be unique"
            )
    return questions


def digest(questions: Iterable[Question]) -> str:
    """Sixteen hexadecimal digits that change with the questions: ids, texts, answers, options, names and sizes of pictures."""
    found = hashlib.sha256()
    for question in questions:
        words = [question.id, question.text, *question.answers, *map(str, question.options), question.hint]
        words += [f"{k}={v}" for k, v in sorted(question.extra.items())]
        for image in question.images:
            if isinstance(image, Path):
                words.append(f"{image.name} {image.stat().st_size}")
            elif isinstance(image, bytes):
                words.append(hashlib.sha256(image).hexdigest())
        found.update("\x1f".join(words).encode("utf-8", "surrogatepass") + b"\x1e")
    return found.hexdigest()[:16]
