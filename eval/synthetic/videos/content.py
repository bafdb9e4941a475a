# SPDX-License-Identifier: Apache-2.0
"""What happens in a video: things that go, come, turn another colour or stay, a sign, a last picture; and whose split it is.

A video is a board of 3 x 3 cells, seen for 12 or 16 frames. Events begin with even frames: encoders of the Qwen kind see frames in
pairs. Everything follows from one integer seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..pages.content import SPLITS, Split, split_of
from ..scenes import BOARD, CHARACTERS, COLORS, SHAPES, Sign, Thing

LENGTHS = (12, 16)
"""Frames of a video."""
PAIR = 2
FPS = 2.0
"""Frames per second: those of an even number show what begins."""
CELL = 16
SIDE = BOARD * CELL
"""Side of a frame in pixels."""
DIRECTIONS: dict[str, tuple[int, int]] = {"up": (0, -1), "down": (0, 1), "left": (-1, 0), "right": (1, 0)}
PARTS = ("beginning", "middle", "end")
CODE_LENGTH = 2
MOST_COMING = 3
RADIUS = (7.0, 8.0)
"""Smallest and largest radius of a thing in pixels."""
TRAVEL = (20.0, 30.0)
"""How far what goes gets, in pixels."""


@dataclass(frozen=True)
class Actor:
    """A thing with what it does. does: goes, comes, turns, stays, or last (it is what the last picture shows).

    goal    the direction in which it goes, or the colour that it turns; empty otherwise.
    at      the frame in which it comes or turns; 0 otherwise.
    travel  pixels in x and y from the first frame to that before the last picture.
    """

    does: str
    thing: Thing
    goal: str = ""
    at: int = 0
    travel: tuple[float, float] = (0.0, 0.0)

    @property
    def atom(self) -> str:
        """What is said of it, as splits tell it apart."""
        thing = self.thing
        if self.does == "goes":
            return f"goes {thing.name} {self.goal}"
        if self.does == "turns":
            return f"turns {thing.name} {self.goal}"
        return f"{self.does} {thing.name} {thing.cell}"


@dataclass(frozen=True)
class Video:
    """frames: how many there are; cut: the first one that shows the last picture (`frames`: there is none). code and sign: what is
    written on it, from frame shown[0] to frame shown[1] (not included), in that part of the video."""

    seed: int
    frames: int
    cut: int
    actors: tuple[Actor, ...]
    sign: Sign | None = None
    shown: tuple[int, int] = (0, 0)
    part: str = ""

    def doing(self, does: str) -> list[Actor]:
        """Those that do so, in order of time."""
        return sorted((actor for actor in self.actors if actor.does == does), key=lambda actor: actor.at)

    def atoms(self) -> Iterator[str]:
        """What the video shows; each belongs to one split, and a video only has those of its own split."""
        yield from (actor.atom for actor in self.actors)
        if self.sign is not None:
            yield f"sign {self.sign.code}"


def make_video(seed: int, split: Split = "train", simple: bool = False) -> Video:
    """The video of `seed`, all of `split`. simple: with fewer things at a time, for the beginning of training.

    Something goes in six of ten videos, a sign is there in six, something turns another colour in half, up to three things come,
    one in two has a last picture; names are not used twice.
    """
    rng = np.random.default_rng((9001, SPLITS.index(split), seed))
    frames = LENGTHS[int(rng.integers(len(LENGTHS)))]
    cut = frames - PAIR * int(rng.random() < 0.5)
    often = 0.4 if simple else 1.0
    free = set(range(BOARD * BOARD))
    names: set[tuple[str, str]] = set()
    actors: list[Actor] = []

    def add(does: str, cells: Sequence[int], goals: Sequence[str] = ("",), **more: Any) -> None:
        """A thing of another name that does so, of this split, in one of the cells, where nothing else will be;
        or nothing, where all that the split allows is there already."""
        for _ in range(200):
            color, shape = str(rng.choice(list(COLORS))), str(rng.choice(SHAPES))
            cell, goal = cells[int(rng.integers(len(cells)))], str(rng.choice(goals))
            center = tuple((i + 0.5) * CELL + float(rng.uniform(-1, 1)) for i in (cell % BOARD, cell // BOARD))
            thing = Thing(color, shape, cell, center, float(rng.uniform(*RADIUS)), float(rng.uniform(-12, 12)))  # type: ignore[arg-type]
            actor = Actor(does, thing, goal, **more)
            mine = {(color, shape), (goal if does == "turns" else color, shape)}
            if not mine & names and goal != color and split_of(actor.atom) == split:
                names.update(mine)
                free.discard(cell)
                actors.append(actor)
                return

    if rng.random() < 0.6:
        direction = list(DIRECTIONS)[int(rng.integers(len(DIRECTIONS)))]
        (right, down), line = DIRECTIONS[direction], int(rng.integers(BOARD))
        far = float(rng.uniform(*TRAVEL))
        start = float(rng.uniform(CELL / 2, SIDE - CELL / 2 - far))
        begin = start if right + down > 0 else SIDE - start
        road = [cell for cell in range(BOARD**2) if (cell // BOARD if right else cell % BOARD) == line]
        add("goes", [road[int(begin) // CELL]], (direction,), travel=(right * far, down * far))
        for actor in actors[:1]:
            x, y = actor.thing.center
            actors[0] = replace(actor, thing=replace(actor.thing, center=(begin, y) if right else (x, begin)))
        free.difference_update(road)
    sign, shown, part = None, (0, 0), ""
    pairs = [cell for cell in free if cell % BOARD < BOARD - 1 and cell + 1 in free]
    if pairs and rng.random() < 0.6:
        cell = pairs[int(rng.integers(len(pairs)))]
        free -= {cell, cell + 1}
        sign = _sign(cell, split, rng)
        part = PARTS[int(rng.integers(len(PARTS)))]
        shown = _when(PARTS.index(part), frames, cut, rng)
    coming = min(int(rng.integers(MOST_COMING + 1)), len(free))
    times = rng.choice(np.arange(PAIR, cut, PAIR), size=coming, replace=False)
    for at in sorted(int(t) for t in times):
        add("comes", sorted(free), at=at)
    if free and rng.random() < 0.55 * often:
        add("turns", sorted(free), list(COLORS), at=PAIR * int(rng.integers(1, cut // PAIR)))
    if free and rng.random() < 0.5 * often:
        add("stays", sorted(free))
    if cut < frames:
        add("last", range(BOARD * BOARD))
    return Video(seed, frames, cut, tuple(actors), sign, shown, part)


def _sign(cell: int, split: Split, rng: np.random.Generator) -> Sign:
    """A sign in this cell and the one beside it."""
    code = ""
    while not code or split_of(f"sign {code}") != split:
        code = "".join(rng.choice(list(CHARACTERS), size=CODE_LENGTH))
    left = cell % BOARD * CELL + float(rng.uniform(1, 2 * CELL - 10 * CODE_LENGTH - 1))
    top = float(cell // BOARD * CELL)
    return Sign(code, cell, tuple((left + 10 * i, top, left + 10 * i + 10, top + 16) for i in range(CODE_LENGTH)))


def _when(part: int, frames: int, cut: int, rng: np.random.Generator) -> tuple[int, int]:
    """One or two pairs of frames within a third of the video, before the last picture."""
    pairs = np.arange(cut // PAIR)
    third = pairs[(pairs + 0.5) * len(PARTS) // (frames // PAIR) == part]
    first = int(rng.choice(third))
    last = min(first + int(rng.integers(2)), int(third[-1]))
    return PAIR * first, PAIR * (last + 1)
