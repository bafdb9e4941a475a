# SPDX-License-Identifier: Apache-2.0
"""Scenes of the synthetic benchmark: coloured shapes and one sign with a code on a textured background.

A scene is a 3 x 3 board of cells. Each object stands somewhere inside its cell (jittered), in a random size, slightly
turned; one cell holds a sign with a code of three characters. Everything follows from one integer seed, so a split is a
range of seeds and the same scene is drawn on every machine.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 215, 50),
    "purple": (150, 60, 190),
    "cyan": (60, 205, 220),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "ring", "star", "cross")
CHARACTERS = "23456789cehklptx"
CODE_LENGTH = 3
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
BOARD = 3
"""Cells per side."""
SIDE = 96
"""Side of a square scene in drawing units (the picture itself is `SIDE * SCALE` pixels)."""
SCALE = 3
CELL = SIDE // BOARD
WIDEST = 1.6
"""How much wider than high (or the other way round) a stretched scene can be."""
FEWEST, MOST = 2, 6
"""Number of objects in a scene, both ends included."""

_FONT = ImageFont.load_default(size=14 * SCALE)


@dataclass(frozen=True)
class Thing:
    """One object. `cell` is the index of its cell in raster order; centre and radius are in drawing units."""

    color: str
    shape: str
    cell: int
    center: tuple[float, float]
    radius: float
    angle: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def place(self) -> str:
        return f"{ROWS[self.cell // BOARD]} {COLUMNS[self.cell % BOARD]}"


@dataclass(frozen=True)
class Sign:
    """The sign: its code and the boxes (left, top, right, bottom) of the characters in drawing units."""

    code: str
    cell: int
    boxes: tuple[tuple[float, float, float, float], ...]


@dataclass(frozen=True)
class Scene:
    """`cell` is width and height of a cell in drawing units; `more_signs` are for training encoders (`full_of_signs`)."""

    seed: int
    things: tuple[Thing, ...]
    sign: Sign
    cell: tuple[float, float] = (CELL, CELL)
    more_signs: tuple[Sign, ...] = ()

    @property
    def size(self) -> tuple[float, float]:
        """Width and height in drawing units."""
        return BOARD * self.cell[0], BOARD * self.cell[1]

    @property
    def signature(self) -> str:
        """What is where, without the drawing details: equal for two scenes that have the same questions and answers."""
        things = sorted(f"{t.cell} {t.name}" for t in self.things)
        return f"{things} {self.sign.cell} {self.sign.code}"

    @property
    def held_out(self) -> bool:
        """Whether this scene belongs to the test split: one signature in ten, by its checksum."""
        return zlib.crc32(self.signature.encode()) % 10 == 0


def scenes(split: str, count: int, start: int = 0, stretched: bool = False) -> list[Scene]:
    """The first `count` scenes of `split` ("train" or "test") from seed `start` on; `stretched`: of different shapes.

    The splits are disjoint in what the scenes show, not only in seeds (`Scene.held_out`).
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r}: choose 'train' or 'test'")
    found: list[Scene] = []
    seed = start
    while len(found) < count:
        scene = make_scene(seed, stretched)
        if scene.held_out == (split == "test"):
            found.append(scene)
        seed += 1
    return found


def make_scene(seed: int, stretched: bool = False) -> Scene:
    """The scene of `seed`: 2 to 6 objects and one sign.

    stretched: one picture in four is square, the others are up to `WIDEST` times wider than high or higher than wide;
    objects keep their shape and have more room in their cells.
    """
    cell = (float(CELL), float(CELL))
    if stretched:
        shape = np.random.default_rng((7004, seed))
        kind, longer = int(shape.integers(4)), round(CELL * float(shape.uniform(1.15, WIDEST)))
        if kind:
            wide = bool(shape.integers(2))
            cell = (float(longer), cell[1]) if wide else (cell[0], float(longer))
    width, height = cell
    rng = np.random.default_rng((7001, seed))
    count = int(rng.integers(FEWEST, MOST + 1))
    places = rng.permutation(BOARD * BOARD)
    # Repeated colours and shapes make counting worth asking: draw from a palette that is smaller than the alphabet.
    palette = rng.choice(list(COLORS), size=int(rng.integers(2, 6)), replace=False)
    shapes = rng.choice(SHAPES, size=int(rng.integers(2, 6)), replace=False)
    made = []
    for place in places[:count]:
        radius = float(rng.uniform(8.5, 13.0))
        x_slack, y_slack = width / 2 - radius - 0.5, height / 2 - radius - 0.5
        row, column = divmod(int(place), BOARD)
        center = (
            (column + 0.5) * width + float(rng.uniform(-x_slack, x_slack)),
            (row + 0.5) * height + float(rng.uniform(-y_slack, y_slack)),
        )
        made.append(
            Thing(
                str(rng.choice(palette)),
                str(rng.choice(shapes)),
                int(place),
                center,
                radius,
                float(rng.uniform(-12, 12)),
            )
        )
    return Scene(seed, tuple(made), _make_sign(int(places[count]), cell, rng), cell)


def _make_sign(place: int, cell: tuple[float, float], rng: np.random.Generator) -> Sign:
    row, column = divmod(place, BOARD)
    code = "".join(rng.choice(list(CHARACTERS), size=CODE_LENGTH))
    left = column * cell[0] + 0.5 + float(rng.uniform(0, cell[0] - 31))
    top = row * cell[1] + 1 + float(rng.uniform(0, cell[1] - 18))
    return Sign(code, place, tuple((left + 10 * i, top, left + 10 * i + 10, top + 16) for i in range(CODE_LENGTH)))


def full_of_signs(scene: Scene) -> Scene:
    """The same scene with a sign in every empty cell: characters are what an encoder learns last, for want of examples."""
    rng = np.random.default_rng((7005, scene.seed))
    taken = {thing.cell for thing in scene.things} | {scene.sign.cell}
    signs = (_make_sign(place, scene.cell, rng) for place in range(BOARD * BOARD) if place not in taken)
    return replace(scene, more_signs=tuple(signs))


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, `SCALE` pixels for each drawing unit."""
    rng = np.random.default_rng((7002, scene.seed))
    image = background(rng, round(scene.size[0] * SCALE), round(scene.size[1] * SCALE))
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        draw_thing(pen, thing, rng)
    for sign in (scene.sign, *scene.more_signs):
        draw_sign(pen, sign, rng)
    return image


def draw_sign(pen: ImageDraw.ImageDraw, sign: Sign, rng: np.random.Generator) -> None:
    first, last = sign.boxes[0], sign.boxes[-1]
    pen.rounded_rectangle(_scaled((first[0], first[1], last[2], last[3])), radius=2 * SCALE, fill=(240, 236, 220))
    ink = tuple(int(v) for v in rng.integers(0, 50, size=3))
    for character, box in zip(sign.code.upper(), sign.boxes, strict=True):
        middle = ((box[0] + box[2]) / 2 * SCALE, (box[1] + box[3]) / 2 * SCALE)
        pen.text(middle, character, fill=ink, font=_FONT, anchor="mm")


def background(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A muted texture: a smooth colour field, fine grain, and sometimes stripes."""
    base = rng.integers(70, 130, size=3)
    coarse = rng.normal(0, 14, size=(5, 5, 3)) + base
    field = np.asarray(
        Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    )
    grain = np.asarray(
        Image.fromarray(rng.integers(0, 256, size=(height // 4, width // 4), dtype=np.uint8)).resize((width, height)),
        np.float32,
    )
    texture = field + (grain[..., None] - 128) * float(rng.uniform(0.02, 0.12))
    if rng.random() < 0.5:
        angle, period = float(rng.uniform(0, math.pi)), float(rng.uniform(12, 40))
        y, x = np.mgrid[:height, :width].astype(np.float32)
        wave = np.sin((x * math.cos(angle) + y * math.sin(angle)) * (2 * math.pi / period))
        texture = texture + wave[..., None] * float(rng.uniform(3, 10))
    return Image.fromarray(texture.clip(0, 255).astype(np.uint8))


def _scaled(box: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    return tuple(v * SCALE for v in box)  # type: ignore[return-value]


def draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, rng: np.random.Generator) -> None:
    jitter = rng.integers(-14, 15, size=3)
    fill = tuple(int(v) for v in np.clip(np.array(COLORS[thing.color]) + jitter, 0, 255))
    (x, y), r = thing.center, thing.radius

    def turned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        c, s = math.cos(math.radians(thing.angle)), math.sin(math.radians(thing.angle))
        return [((x + (px * c - py * s) * r) * SCALE, (y + (px * s + py * c) * r) * SCALE) for px, py in points]

    if thing.shape == "circle":
        pen.ellipse(_scaled((x - r * 0.92, y - r * 0.92, x + r * 0.92, y + r * 0.92)), fill=fill)
    elif thing.shape == "ring":
        pen.ellipse(_scaled((x - r, y - r, x + r, y + r)), outline=fill, width=round(r * 0.36 * SCALE))
    elif thing.shape == "square":
        pen.polygon(turned([(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]), fill=fill)
    elif thing.shape == "triangle":
        pen.polygon(turned([(0, -1), (0.95, 0.8), (-0.95, 0.8)]), fill=fill)
    elif thing.shape == "star":
        spokes = [(1.0 if i % 2 == 0 else 0.42, -math.pi / 2 + i * math.pi / 5) for i in range(10)]
        pen.polygon(turned([(length * math.cos(a), length * math.sin(a)) for length, a in spokes]), fill=fill)
    else:  # cross
        pen.polygon(turned([(-0.3, -1), (0.3, -1), (0.3, 1), (-0.3, 1)]), fill=fill)
        pen.polygon(turned([(-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)]), fill=fill)
