# SPDX-License-Identifier: Apache-2.0
"""Where things stand on a page, and how it is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .content import KINDS, LINES, Content, Split, make_content

Box = tuple[int, int, int, int]
UNIT = 8
"""Side of what one visual token of the embedded model shows, in pixels."""
SIZES = ((144, 144), (160, 128), (128, 160), (176, 120), (136, 152))
"""Width and height of pages: 320 to 330 visual tokens."""
BODY = (10, 12, 14)
"""Sizes of the font of lines."""
LARGER = 3
"""How much larger headings are."""
BACKGROUNDS = ("plain", "grain")
GRID = 4
"""Text begins at multiples of this many pixels: a model of this size learns to read in an hour and not in a day."""


@dataclass(frozen=True)
class Field:
    """A piece of text. box: left, top, right, bottom of its ink; line: its number from 1, 0 for headings and names of columns;
    column: number in its line, from 0."""

    text: str
    box: Box
    size: int
    line: int = 0
    column: int = 0


@dataclass(frozen=True)
class Page:
    """A page; everything follows from split, seed and whether it is a snippet."""

    seed: int
    content: Content
    size: tuple[int, int]
    fields: tuple[Field, ...]
    bars: tuple[Box, ...]
    rules: tuple[Box, ...]
    background: str


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)  # type: ignore[return-value]


def _snap(length: int) -> int:
    """The next multiple of `GRID`."""
    return -(-length // GRID) * GRID


def _place(text: str, left: int, top: int, size: int, line: int = 0, column: int = 0, right: bool = False) -> Field:
    """A field that begins (or ends) at `left`."""
    font = font_of(size)
    if right:
        left = (left - round(font.getlength(text))) // GRID * GRID
    a, b, c, d = font.getbbox(text, anchor="la")
    return Field(text, (int(left + a), int(top + b), int(left + c), int(top + d)), size, line, column)


def _width(texts: tuple[str, ...], size: int) -> int:
    return max(round(font_of(size).getlength(text)) for text in texts)


def make_page(seed: int, split: Split = "train", snippet: bool = False) -> Page:
    """The page of a seed. snippet: one to three lines on a picture that is just large enough, for teaching an encoder to read."""
    rng = np.random.default_rng((8001, ("train", "dev", "test").index(split), int(snippet), seed))
    while True:
        kind = KINDS[int(rng.integers(len(KINDS)))]
        count = int(rng.integers(1, 4)) if snippet and kind != "chart" else int(rng.integers(LINES[0], LINES[1] + 1))
        heading = not snippet or rng.random() < 0.25
        if snippet and rng.random() < 0.3:
            kind = KINDS[0]
        codes = 0.75 if snippet else 0.4  # characters are what an encoder learns last, for want of examples
        content = make_content(split, kind, count, int(rng.integers(2, 4)), heading, rng, codes)
        size = SIZES[int(rng.integers(len(SIZES)))]
        page = _lay_out(seed, content, None if snippet else size, rng)
        if page is not None:
            return page


def _lay_out(seed: int, content: Content, size: tuple[int, int] | None, rng: np.random.Generator) -> Page | None:
    """The page, on a picture of `size` or one that is just large enough; None if it does not fit."""
    body = BODY[int(rng.integers(len(BODY)))]
    pitch = _snap(body + int(rng.integers(3, 9)))
    left, top = GRID * int(rng.integers(1, 4)), GRID * int(rng.integers(1, 8 if size else 4))
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    ruled = bool(rng.integers(2))
    fields: list[Field] = []
    y = top
    if content.heading:
        x, large = left, body + LARGER
        for number, word in enumerate(content.heading):
            fields.append(_place(word, x, y, large, 0, number))
            x += _snap(_width((word,), large) + 5)
        y += _snap(large + int(rng.integers(5, 10)))
    labels = _width(tuple(line[0] for line in content.lines), body)
    second = left + _snap(labels + int(rng.integers(6, 20)))
    room = (size[0] if size else 120 + int(rng.integers(0, 30))) - GRID
    starts = [second]
    if content.columns:
        wide = [_snap(_width((name, "00"), body) + int(rng.integers(5, 12))) for name in content.columns]
        starts = [second + sum(wide[:i]) for i in range(len(wide))]
        fields += [
            _place(name, x, y, body, 0, i + 1) for i, (name, x) in enumerate(zip(content.columns, starts, strict=True))
        ]
        y += pitch
    bars: list[Box] = []
    rules: list[Box] = []
    for number, line in enumerate(content.lines, 1):
        fields.append(_place(line[0], left, y, body, number))
        for i, text in enumerate(line[1:]):
            right = content.kind == "receipt" and ruled
            fields.append(_place(text, room if right else starts[i], y, body, number, i + 1, right))
        if content.bars:
            long = max(round(content.bars[number - 1] * (room - second)), 2)
            bars.append((second, y + 1, second + long, y + body))
        elif ruled and content.kind in ("form", "table"):
            rules.append((left, y + pitch - 3, room, y + pitch - 3))
        y += pitch
    right, bottom = (max(f.box[i] for f in fields) for i in (2, 3))
    right = max([right, *(bar[2] for bar in bars), *(rule[2] for rule in rules)])
    if content.bars and room - second < 48:
        return None
    if size is None:
        size = tuple(-(-(end + 3) // UNIT) * UNIT for end in (right, bottom))  # type: ignore[assignment]
        size = (max(size[0], 64), max(size[1], 32))
    elif right > size[0] - 1 or bottom > size[1] - 1:
        return None
    return Page(seed, content, size, tuple(fields), tuple(bars), tuple(rules), background)


def draw_page(page: Page) -> Image.Image:
    """The picture of a page, RGB, at the size at which the embedded model sees it."""
    rng = np.random.default_rng((8002, page.seed))
    width, height = page.size
    paper = rng.integers(225, 256, size=3)
    if page.background == "grain":
        coarse = (rng.normal(0, 10, size=(4, 4, 3)) + paper - 40).clip(0, 255).astype(np.uint8)
        field = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), np.float32)
        field = field + rng.normal(0, float(rng.uniform(2, 8)), size=(height, width, 1))
        image = Image.fromarray(field.clip(0, 255).astype(np.uint8))
    else:
        image = Image.new("RGB", page.size, tuple(int(v) for v in paper))
    pen = ImageDraw.Draw(image)
    ink = tuple(int(v) for v in rng.integers(0, 60, size=3))
    for rule in page.rules:
        pen.line(rule, fill=(150, 150, 150))
    for bar in page.bars:
        pen.rectangle(bar, fill=tuple(int(v) for v in rng.integers(40, 170, size=3)))
    for field in page.fields:
        a, b, *_ = font_of(field.size).getbbox(field.text, anchor="la")
        pen.text((field.box[0] - a, field.box[1] - b), field.text, fill=ink, font=font_of(field.size), anchor="la")
    return image
