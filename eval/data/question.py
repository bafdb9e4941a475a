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
from ...videos import Clip, read_video
from .film import Film

__all__ = [
    "Picture",
    "PictureError",
    "Question",
    "Video",
    "check_questions",
    "digest",
    "open_clip",
    "open_picture",
    "picture_size",
]

Picture: TypeAlias = "Path | bytes | Callable[[], Image.Image]"
"""A file, the bytes of one, or what draws it."""
Video: TypeAlias = "Path | bytes | Clip | Film | Callable[[], Clip]"
"""A file, the bytes of one, frames that are there already, a part of a file or so many frames of it, or what draws them."""


@dataclass(frozen=True)
class Question:
    """One question about pictures and videos.

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
    videos: tuple[Video, ...] = field(default=(), repr=False)

    @property
    def visuals(self) -> tuple[Picture | Video, ...]:
        return (*self.images, *self.videos)


def open_clip(video: Video) -> Clip:
    """All frames of a file, or those that are there already. Raises VideoError as `read_video`."""
    found = video() if callable(video) else video
    return found if isinstance(found, Clip) else read_video(found)


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
        for image in question.visuals:
            if isinstance(image, Path):
                words.append(f"{image.name} {image.stat().st_size}")
            elif isinstance(image, Film):
                words += image.words
            elif isinstance(image, bytes):
                words.append(hashlib.sha256(image).hexdigest())
        found.update("\x1f".join(words).encode("utf-8", "surrogatepass") + b"\x1e")
    return found.hexdigest()[:16]
