# SPDX-License-Identifier: Apache-2.0
"""Videos: a contact sheet, and an animated file. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..records import replacing
from .legend import font, strip, wrapped

_GAP, _LINE = 6, 17
_INK, _SOFT = (29, 31, 36), (92, 98, 112)


def contact_sheet(
    frames: Sequence[Image.Image],
    path: Path,
    columns: int | None = None,
    *,
    labels: Sequence[str] = (),
    title: str = "",
    legend: str = "",
    most: str = "",
) -> Path:
    """Frames of one size in one picture file, in a grid as near to a square as can be unless `columns` says otherwise.

    labels  lines of text below each (default: its number). title: above all. legend, most: below all, as `legend.strip` takes them.
    """
    columns = columns or math.ceil(math.sqrt(len(frames)))
    wide, high = frames[0].size
    texts = [_lines(label, wide) for label in labels or [f"frame {i}" for i in range(len(frames))]]
    bar = _LINE * max(map(len, texts)) + 4
    width = columns * (wide + _GAP) + _GAP
    above = [line for part in title.splitlines() for line in wrapped(part, width - 2 * _GAP)]
    below = strip(width, legend, most) if legend else Image.new("RGB", (1, 0))
    top = _GAP + _LINE * len(above) + (_GAP if above else 0)
    rows = math.ceil(len(frames) / columns)
    sheet = Image.new("RGB", (width, top + rows * (high + bar + _GAP) + below.height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(above):
        pen.text((_GAP, _GAP + i * _LINE), line, fill=_INK, font=font())
    for i, (frame, lines) in enumerate(zip(frames, texts, strict=True)):
        x, y = _GAP + i % columns * (wide + _GAP), top + i // columns * (high + bar + _GAP)
        sheet.paste(frame, (x, y))
        for j, line in enumerate(lines):
            pen.text((x, y + high + 2 + j * _LINE), line, fill=_SOFT if j else _INK, font=font())
    sheet.paste(below, (0, sheet.height - below.height))
    with replacing(path) as part:
        sheet.save(part, format=path.suffix.removeprefix("."))
    return path


def captioned(
    frame: Image.Image, label: str, title: str = "", legend: str = "", most: str = "", room: int = 2
) -> Image.Image:
    """One frame of an animation: title above, label and legend below. room: lines that the label has, so that frames are alike."""
    above = [line for part in title.splitlines() for line in wrapped(part, frame.width - 2 * _GAP)]
    below = strip(frame.width, legend, most) if legend else Image.new("RGB", (1, 0))
    top = _LINE * len(above) + _GAP * bool(above)
    found = Image.new("RGB", (frame.width, top + frame.height + _LINE * room + 6 + below.height), "white")
    found.paste(frame, (0, top))
    pen = ImageDraw.Draw(found)
    for i, line in enumerate(above):
        pen.text((_GAP, 2 + i * _LINE), line, fill=_INK, font=font())
    for i, line in enumerate(_lines(label, frame.width)[:room]):
        pen.text((_GAP, top + frame.height + 3 + i * _LINE), line, fill=_SOFT if i else _INK, font=font())
    found.paste(below, (0, found.height - below.height))
    return found


def animation(frames: Sequence[Image.Image], path: Path, milliseconds: int | Sequence[int] = 500) -> Path:
    """Frames one after the other, for ever, as an animated GIF, PNG or WebP by the file's name. milliseconds: of each or of all."""
    kind = path.suffix.removeprefix(".")
    if kind == "gif":  # one palette for all, so that colours do not flicker
        joined = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
        for i, frame in enumerate(frames):
            joined.paste(frame, (0, i * frame.height))
        palette = joined.quantize(255)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = milliseconds if isinstance(milliseconds, int) else list(milliseconds)
    with replacing(path) as part:
        frames[0].save(
            part, format=kind, save_all=True, append_images=list(frames[1:]), duration=duration, loop=0,
            **({"quality": 85} if kind == "webp" else {}),
        )  # fmt: skip
    return path


def _lines(label: str, width: int) -> list[str]:
    return [line for part in label.splitlines() for line in wrapped(part, width)] or [""]
