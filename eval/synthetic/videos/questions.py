# SPDX-License-Identifier: Apache-2.0
"""Questions and answers about a video, seven types, each with one right answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..questions import Question
from ..scenes import CHARACTERS, COLORS, SHAPES
from .content import CODE_LENGTH, DIRECTIONS, MOST_COMING, PARTS, Video

Ask = Callable[[Video], list[Question]]


def _about(video: Video, kind: str, text: str, answer: str, does: str, place: int = 0) -> Question:
    """A question whose target is the number of an actor."""
    return Question(kind, text, answer, (video.actors.index(video.doing(does)[place]),))


def _direction(video: Video) -> list[Question]:
    return [
        _about(video, "direction", f"which way does the {a.thing.name} go ?", a.goal, "goes")
        for a in video.doing("goes")
    ]


def _order(video: Video) -> list[Question]:
    coming = video.doing("comes")
    if len(coming) < 2:
        return []
    return [
        _about(video, "order", f"what comes {word} ?", coming[place].thing.name, "comes", place)
        for word, place in (("first", 0), ("last", -1))
    ]


def _count(video: Video) -> list[Question]:
    coming = video.doing("comes")
    targets = tuple(video.actors.index(actor) for actor in coming)
    return [Question("count", "how many shapes come ?", str(len(coming)), targets)]


def _change(video: Video) -> list[Question]:
    found = []
    for actor in video.doing("turns"):
        if actor.goal != actor.thing.color:
            shape = actor.thing.shape
            found.append(_about(video, "change", "which shape turns another color ?", shape, "turns"))
            found.append(_about(video, "change", f"what color does the {shape} turn ?", actor.goal, "turns"))
    return found


def _when(video: Video) -> list[Question]:
    return [Question("when", "when is the sign there ?", video.part)] if video.sign else []


def _last(video: Video) -> list[Question]:
    return [_about(video, "last", "what is in the last picture ?", a.thing.name, "last") for a in video.doing("last")]


def _reading(video: Video) -> list[Question]:
    return [Question("reading", "what does the sign say ?", " ".join(video.sign.code))] if video.sign else []


KINDS: dict[str, Ask] = {
    "direction": _direction,
    "order": _order,
    "count": _count,
    "change": _change,
    "when": _when,
    "last": _last,
    "reading": _reading,
}
CHANCE = {
    "direction": 1 / len(DIRECTIONS),
    "order": 1 / (len(COLORS) * len(SHAPES)),
    "count": 1 / (MOST_COMING + 1),
    "change": (1 / len(COLORS) + 1 / len(SHAPES)) / 2,
    "when": 1 / len(PARTS),
    "last": 1 / (len(COLORS) * len(SHAPES)),
    "reading": 1 / len(CHARACTERS) ** CODE_LENGTH,
}
"""Accuracy of a uniform guess among the answers that a type allows (exact match of the whole answer)."""


def ask(video: Video, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of `kind` about a video, or None if it has none."""
    options = KINDS[kind](video)
    return options[int(rng.integers(len(options)))] if options else None
