# SPDX-License-Identifier: Apache-2.0
"""What colours mean, on every picture: as a strip by Pillow, and under figures of matplotlib."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .colours import HEAT, cluster_colour, heat

FATES = {"kept": "kept", "merged": "merged, one colour for each token", "dropped": "dropped"}
UNKNOWN = "no token"
_INK, _DARK = (29, 31, 36), (34, 34, 34)
_PAD, _SIDE = 8, 13


@functools.cache
def font(size: int = 13) -> Any:
    """The letters of figures where matplotlib is installed, so that more than Latin is legible; else those of Pillow."""
    try:
        import matplotlib

        return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
    except (ImportError, OSError):
        return ImageFont.load_default(size)


def wrapped(text: str, width: int, size: int = 13) -> list[str]:
    """Lines of `text` that are at most `width` pixels wide, broken between words; a longer word is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font(size).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    for i, line in enumerate(lines):
        while len(line) > 1 and font(size).getlength(line) > width:
            line = line[:-2] + "…"
        lines[i] = line
    return lines


def strip(width: int, kind: str = "fate", most: str = "") -> Image.Image:
    """A legend `width` pixels wide: of kept, merged and dropped cells ("fate"), or of a map ("heat").

    most: what the brightest colour of a map stands for.
    """
    pieces = list(FATES.items()) if kind == "fate" else [("ramp", most), ("none", UNKNOWN)]
    spots: list[tuple[int, int, str, str]] = []
    x, y = _PAD, _PAD // 2
    for name, text in pieces:
        wide = (90 if name == "ramp" else _SIDE) + 6 + round(font().getlength(text)) + 18
        if x > _PAD and x + wide - 18 > width:
            x, y = _PAD, y + 20
        spots.append((x, y, name, text))
        x += wide
    picture = Image.new("RGB", (width, y + 22), "white")
    pen = ImageDraw.Draw(picture)
    for x, y, name, text in spots:
        wide = 90 if name == "ramp" else _SIDE
        picture.paste(swatch(name, wide, _SIDE), (x, y + 2))
        pen.text((x + wide + 6, y + 1), text, fill=_INK, font=font())
    return picture


def swatch(name: str, width: int, height: int) -> Image.Image:
    """A sample of "kept", "merged", "dropped", "ramp" (of colours from 0 to 1) or "none"."""
    if name == "ramp":
        row = heat(np.linspace(0, 1, width, dtype=np.float32))
        return Image.fromarray(np.broadcast_to(row, (height, width, 3)).astype(np.uint8))
    found = Image.new("RGB", (width, height), {"kept": (150, 150, 150), "dropped": _DARK}.get(name, (60, 60, 60)))
    pen = ImageDraw.Draw(found)
    if name == "kept":
        pen.rectangle((0, 0, width - 1, height - 1), outline=(70, 70, 70))
        pen.rectangle((1, 1, width - 2, height - 2), outline="white")
    elif name == "merged":
        for i in range(2):
            colour = tuple(round(c) for c in cluster_colour(i))
            pen.rectangle((i * width // 2, 0, (i + 1) * width // 2 - 1, height - 1), fill=colour)
    elif name == "none":
        for i in range(-height, width, 4):
            pen.line((i, height, i + height, 0), fill=(130, 130, 130))
    return found


def under(picture: Image.Image, kind: str, most: str = "") -> Image.Image:
    """A picture with its legend below."""
    legend = strip(picture.width, kind, most)
    both = Image.new("RGB", (picture.width, picture.height + legend.height), "white")
    both.paste(picture, (0, 0))
    both.paste(legend, (0, picture.height))
    return both


def fate_legend(figure: Any) -> None:
    """The same below a figure of matplotlib."""
    from matplotlib.patches import Patch

    colour = "#{:02x}{:02x}{:02x}".format(*map(round, cluster_colour(0)))
    faces = {"kept": ("#969696", "#ffffff"), "merged": (colour, colour), "dropped": ("#222222", "#222222")}
    handles = [Patch(facecolor=f, edgecolor=e, linewidth=2, label=FATES[name]) for name, (f, e) in faces.items()]
    held = figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    for patch in held.get_patches()[:1]:  # a white frame on white paper
        from matplotlib.patheffects import Normal, withStroke

        patch.set_path_effects([withStroke(linewidth=4, foreground="#555555"), Normal()])


def heat_legend(figure: Any, axes: Any, most: str, about: str, own: bool = False) -> None:
    """A bar of the colours of a map below the axes of a figure, up to `most`, with a line of text below it.

    own: `axes` is one that is there for the bar alone.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    colours = ScalarMappable(cmap=LinearSegmentedColormap.from_list("heat", HEAT))
    if own:
        bar = figure.colorbar(colours, cax=axes, orientation="horizontal")
        axes.set_box_aspect(0.025)
    else:
        bar = figure.colorbar(colours, ax=axes, location="bottom", shrink=0.5, aspect=40, pad=0.04)
    bar.set_ticks([0, 1], labels=["0" if most.startswith("brightest") else "lowest", most])
    bar.ax.tick_params(labelsize=8, length=0)
    bar.set_label(about, fontsize=8)
