# SPDX-License-Identifier: Apache-2.0
"""Videos: a contact sheet, and an animated file. Pillow only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from ..explain import Explanation

Frame = Callable[[int], Image.Image]
_BAR, _GAP = 18, 6


def frames_of(found: Explanation, visual: int = 0) -> int:
    """How many frames of a visual have tokens; 0 for a picture."""
    return sum(pane.role == "frame" for pane in found.visuals[visual].panes)


def contact_sheet(frames: Sequence[Image.Image], path: Path, columns: int | None = None) -> Path:
    """Numbered frames of one size in a grid as near to a square as can be, in one picture file."""
    columns = columns or math.ceil(math.sqrt(len(frames)))
    width, height = frames[0].width + _GAP, frames[0].height + _GAP + _BAR
    sheet = Image.new("RGB", (columns * width + _GAP, math.ceil(len(frames) / columns) * height + _GAP), "white")
    pen = ImageDraw.Draw(sheet)
    for i, frame in enumerate(frames):
        x, y = _GAP + i % columns * width, _GAP + i // columns * height
        pen.text((x, y), f"frame {i}", fill=(60, 60, 60))
        sheet.paste(frame, (x, y + _BAR - 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def animation(frames: Sequence[Image.Image], path: Path, milliseconds: int = 500) -> Path:
    """Frames one after the other, for ever, as an animated GIF, PNG or WebP by the name of the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":  # one palette for all, so that colours do not flicker
        strip = Image.new("RGB", (frames[0].width, frames[0].height * len(frames)))
        for i, frame in enumerate(frames):
            strip.paste(frame, (0, i * frame.height))
        palette = strip.quantize(255)
        frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=milliseconds, loop=0)
    return path
