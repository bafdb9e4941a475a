# SPDX-License-Identifier: Apache-2.0
"""Questions and answers about a scene, seven types, each with one right answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .scenes import BOARD, CHARACTERS, CODE_LENGTH, COLORS, SHAPES, Scene, Thing

MOST_COUNTED = 4
"""The largest count that is asked for."""


@dataclass(frozen=True)
class Question:
    """One question. `targets` are the objects (indices into `scene.things`) that it is about; empty for the sign."""

    kind: str
    text: str
    answer: str
    targets: tuple[int, ...] = ()


def _index(scene: Scene, wanted: Callable[[Thing], bool]) -> tuple[int, ...]:
    return tuple(i for i, thing in enumerate(scene.things) if wanted(thing))


def _color(scene: Scene, rng: np.random.Generator) -> Question | None:
    counts = Counter(thing.shape for thing in scene.things)
    unique = [i for i, thing in enumerate(scene.things) if counts[thing.shape] == 1]
    if not unique:
        return None
    i = int(rng.choice(unique))
    return Question("color", f"what color is the {scene.things[i].shape} ?", scene.things[i].color, (i,))


def _shape(scene: Scene, rng: np.random.Generator) -> Question | None:
    counts = Counter(thing.color for thing in scene.things)
    unique = [i for i, thing in enumerate(scene.things) if counts[thing.color] == 1]
    if not unique:
        return None
    i = int(rng.choice(unique))
    return Question("shape", f"what shape is {scene.things[i].color} ?", scene.things[i].shape, (i,))


def _count(scene: Scene, rng: np.random.Generator) -> Question | None:
    options: dict[int, list[tuple[str, tuple[int, ...]]]] = {}
    for color in COLORS:
        found = _index(scene, lambda t, c=color: t.color == c)  # type: ignore[misc]
        options.setdefault(len(found), []).append((f"how many {color} shapes ?", found))
    for shape in SHAPES:
        found = _index(scene, lambda t, s=shape: t.shape == s)  # type: ignore[misc]
        options.setdefault(len(found), []).append((f"how many {shape} shapes ?", found))
    # First the answer, then the question: otherwise most answers are 0 and 1.
    number = int(rng.choice([n for n in options if n <= MOST_COUNTED]))
    text, found = options[number][int(rng.integers(len(options[number])))]
    return Question("count", text, str(number), found)


def _existence(scene: Scene, rng: np.random.Generator) -> Question | None:
    present = {(t.color, t.shape) for t in scene.things}
    if rng.random() < 0.5:
        color, shape = sorted(present)[int(rng.integers(len(present)))]
    else:
        # Half of the absent pairs are made of a colour and a shape that are both there, on different objects.
        pool = [(c, s) for c in COLORS for s in SHAPES if (c, s) not in present]
        hard = [(c, s) for c, s in pool if any(c == p[0] for p in present) and any(s == p[1] for p in present)]
        pool = hard if hard and rng.random() < 0.5 else pool
        color, shape = pool[int(rng.integers(len(pool)))]
    found = _index(scene, lambda t: (t.color, t.shape) == (color, shape))
    return Question("existence", f"is there a {color} {shape} ?", "yes" if found else "no", found)


def _unique_pairs(scene: Scene) -> list[int]:
    counts = Counter(thing.name for thing in scene.things)
    return [i for i, thing in enumerate(scene.things) if counts[thing.name] == 1]


def _place(scene: Scene, rng: np.random.Generator) -> Question | None:
    unique = _unique_pairs(scene)
    if not unique:
        return None
    i = int(rng.choice(unique))
    return Question("place", f"where is the {scene.things[i].name} ?", scene.things[i].place, (i,))


def neighbours(scene: Scene, i: int) -> dict[str, int | None]:
    """What stands in the four cells beside object `i`: index of the object, or None for nothing or the sign."""
    at = {thing.cell: j for j, thing in enumerate(scene.things)}
    cell = scene.things[i].cell
    row, column = divmod(cell, BOARD)
    return {
        "left of": at.get(cell - 1) if column > 0 else None,
        "right of": at.get(cell + 1) if column < BOARD - 1 else None,
        "above": at.get(cell - BOARD) if row > 0 else None,
        "below": at.get(cell + BOARD) if row < BOARD - 1 else None,
    }


def _relation(scene: Scene, rng: np.random.Generator) -> Question | None:
    options = [(i, word, j) for i in _unique_pairs(scene) for word, j in neighbours(scene, i).items() if j is not None]
    if not options:
        return None
    i, word, j = options[int(rng.integers(len(options)))]
    return Question("relation", f"what is {word} the {scene.things[i].name} ?", scene.things[j].name, (i, j))


def _reading(scene: Scene, rng: np.random.Generator) -> Question | None:
    return Question("reading", "what does the sign say ?", " ".join(scene.sign.code))


KINDS: dict[str, Callable[[Scene, np.random.Generator], Question | None]] = {
    "color": _color,
    "shape": _shape,
    "count": _count,
    "existence": _existence,
    "place": _place,
    "relation": _relation,
    "reading": _reading,
}
CHANCE = {
    "color": 1 / len(COLORS),
    "shape": 1 / len(SHAPES),
    "count": 1 / (MOST_COUNTED + 1),
    "existence": 1 / 2,
    "place": 1 / BOARD**2,
    "relation": 1 / (len(COLORS) * len(SHAPES)),
    "reading": 1 / len(CHARACTERS) ** CODE_LENGTH,
}
"""Accuracy of a uniform guess among the answers that a type allows (exact match of the whole answer)."""


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """A question of `kind` about `scene`, or None if the scene has none (no unique object, no neighbours)."""
    return KINDS[kind](scene, rng)
