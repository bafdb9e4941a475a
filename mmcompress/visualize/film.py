# SPDX-License-Identifier: Apache-2.0
"""Pictures of videos over time: what was kept of each frame, how many tokens, and where a word looked. They need matplotlib for the
curves alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..explain import Explanation, Film
from .figure import new_figure, written
from .figures import cut, fate_picture, heat_picture, named, place_name, strength
from .frames import animation, captioned, contact_sheet
from .legend import under

LINES = ("#7a869a", "#c2410c", "#2563eb", "#15803d", "#7c3aed", "#b45309")
"""Colours of curves; the first is what was there before any stage."""
_STRIP, _WORDS = 12, 4
"""Most frames and words of a film strip."""


def frame_label(film: Film, frame: int, step: int = -1) -> str:
    """Two lines: number and time of a frame, and what became of its tokens behind a stage."""
    kept, merged, dropped = film.fates[step, frame].tolist()
    when = f"frame {frame}, {film.label(frame)}" if film.times else f"frame {frame}"
    more = [f"{n} {what}" for n, what in ((merged, "merged"), (dropped, "dropped")) if n]
    return f"{when}: {kept} tokens\n{', '.join(more) or 'all'}"


def stage_name(film: Film, step: int) -> str:
    """What a curve is called."""
    one = film.steps[step]
    return f"{place_name(one)}: {one.stage}" if one.stage else place_name(one)


def kept_pictures(found: Explanation, film: Film, side: int = 0) -> list[Image.Image]:
    """What is left of each frame behind the last stage; side: pixels, by the number of frames unless given."""
    side = side or _side(len(film))
    return [fate_picture(found, film.steps[-1], visual, side, frame) for visual, frame in film.places]


def kept_sheet(found: Explanation, film: Film, path: Path) -> Path:
    """A contact sheet: every frame with its time and what was kept, merged and dropped of it."""
    labels = [frame_label(film, i) for i in range(len(film))]
    return contact_sheet(kept_pictures(found, film), path, labels=labels, title=_title(found, film), legend="fate")


def kept_animation(found: Explanation, film: Film, path: Path) -> Path:
    """The same one after the other, at the pace of the video."""
    title = _title(found, film)
    frames = [
        captioned(picture, frame_label(film, i), title, "fate")
        for i, picture in enumerate(kept_pictures(found, film, 400))
    ]
    return animation(frames, path, film.milliseconds())


def _title(found: Explanation, film: Film) -> str:
    now, before = int(film.tokens[-1].sum()), int(film.tokens[0].sum())
    return f"{named(found)}: {now} of {before} tokens of {len(film)} frames reach the last layer"


def tokens_figure(rows: Sequence[Explanation], path: Path, film: int = 0) -> Path:
    """Tokens of each frame over time: a plot for each model, a curve for each stage."""
    figure = new_figure(6.5, 2.9 * len(rows), "tokens of each frame")
    for axis, found in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        one = found.films[film]
        places = one.times or range(len(one))
        for i, counts in enumerate(one.tokens.tolist()):
            label = f"{cut(stage_name(one, i), 70)} ({sum(counts)})"
            axis.plot(places, counts, marker=".", label=label, color=LINES[i % len(LINES)], linewidth=1.8)
        axis.set_ylim(0, None)
        axis.set_title(named(found), fontsize=9, loc="left", parse_math=False)
        axis.set(xlabel="seconds" if one.times else "frame", ylabel="tokens")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.0, -0.25))
    return written(figure, path)


def word_strip(found: Explanation, film: int, words: Sequence[int], path: Path) -> Path:
    """A film strip: a row per word, its map on frames from first to last; of a long video on some, evenly chosen."""
    one, words = found.films[film], list(words)[:_WORDS]
    count = min(len(one), _STRIP)
    shown = [round(i * (len(one) - 1) / max(1, count - 1)) for i in range(count)]
    pictures, labels = [], []
    for word in words:
        values = found.over_time(word, film)
        for frame in shown:
            pictures.append(_map(found, one, word, frame, 180))
            value = values[frame].item()
            peak = "no token" if math.isnan(value) else f"up to {value:.2f}"
            labels.append(f"“{cut(found.words[word].text, 14)}”, {one.label(frame)}\n{peak}")
    peaks = [strength(found, word) for word in words]
    brightest = ", ".join(f"{p:.2f}" for p in peaks if p is not None) or "0"
    part = f", {count} of {len(one)} frames" if count < len(one) else ""
    title = f"{named(found)}: {found.method}{part}"
    legend = f"the most for the word: {brightest} of 1"
    return contact_sheet(pictures, path, count, labels=labels, title=title, legend="heat", most=legend)


def word_animation(found: Explanation, film: int, word: int, path: Path) -> Path:
    """The map of a word, frame after frame, beside what was kept."""
    one, values = found.films[film], found.over_time(word, film)
    title = f"{named(found)}: {found.method} of “{cut(found.words[word].text, 24)}”, and what was kept"
    most = f"the most: {strength(found, word) or 0:.2f} of 1"
    frames = []
    for i, kept in enumerate(kept_pictures(found, one, 320)):
        value = values[i].item()
        label = f"{frame_label(one, i).splitlines()[0]}; map {'missing' if math.isnan(value) else f'up to {value:.2f}'}"
        both = _beside(_map(found, one, word, i, 320), kept)
        frames.append(under(captioned(both, label, title, "heat", most, room=1), "fate"))
    return animation(frames, path, one.milliseconds())


def _map(found: Explanation, film: Film, word: int, frame: int, side: int) -> Image.Image:
    visual, number = film.places[frame]
    return heat_picture(found, found.word_map(word, visual) / (strength(found, word) or 1), visual, side, number)


def _side(frames: int) -> int:
    """Pixels of a frame in a sheet of so many."""
    return 320 if frames <= 9 else 220 if frames <= 36 else 150


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width + 4, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 4, 0))
    return both
