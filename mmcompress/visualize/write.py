# SPDX-License-Identifier: Apache-2.0
"""Everything there is to see about explanations, in one folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..explain import Explanation
from .figure import cannot_draw
from .figures import layers_figure, scores_figure, stages_figure, words_figure, words_of
from .film import kept_animation, kept_sheet, tokens_figure, word_animation, word_strip
from .headline import Gain
from .page import page


def write_all(
    found: Sequence[Explanation],
    out: Path,
    *,
    about: str = "",
    notes: Sequence[str] = (),
    words: Sequence[str] = (),
    gains: Mapping[str, Gain] | None = None,
) -> list[Path]:
    """Page and pictures of explanations of one prompt (stock and compressed, one or several methods) in the folder `out`; the page
    comes first (about, notes, words, gains: as there). words: those that maps are drawn of. Without matplotlib the page alone."""
    written = [page(found, about=about, notes=notes, words=words, gains=gains).save(out / "index.html")]
    if cannot_draw():
        return written
    plans = list({one.plan: one for one in reversed(found)}.values())[::-1]
    for i, one in enumerate(one for one in plans if one.plan):
        more = f"_{i + 1}" if i else ""
        written.append(stages_figure(one, out / f"stages{more}.png"))
        if path := scores_figure(one, out / f"scores{more}.png"):
            written.append(path)
    written.append(layers_figure(plans, out / "layers.png"))
    written += _films(plans, out)
    for method in dict.fromkeys(one.method for one in found):
        rows = [one for one in found if one.method == method]
        name = method.lower().replace(" ", "-")
        moving = {visual for film in rows[0].films for visual, _ in film.places}
        still = [visual for visual in range(len(rows[0].visuals)) if visual not in moving]
        for visual in still:
            end = f"_{visual + 1}" if len(still) > 1 else ""
            written.append(words_figure(rows, out / f"{name}{end}.png", visual, words))
        for one in rows:
            written += _words_over_time(one, out, f"{name}_{'compressed' if one.plan else 'stock'}", words)
    return written


def _films(plans: Sequence[Explanation], out: Path) -> list[Path]:
    """Of every video a contact sheet and an animation of what was kept by each plan (stock if there is none), and the curves."""
    written: list[Path] = []
    reduced = [one for one in plans if one.plan] or list(plans)
    for number, one in enumerate(reduced):
        for i, film in enumerate(one.films):
            end = _end(one, i) + (f"_plan{number + 1}" if number else "")
            written.append(kept_sheet(one, film, out / f"kept_frames{end}.png"))
            written.append(kept_animation(one, film, out / f"kept_frames{end}.webp"))
    for i in range(len(plans[0].films)):
        written.append(tokens_figure(reduced, out / f"tokens_per_frame{_end(plans[0], i)}.png", i))
    return written


def _words_over_time(found: Explanation, out: Path, name: str, words: Sequence[str]) -> list[Path]:
    """Of every video a film strip of the maps of words, and an animation of the first one's beside what was kept."""
    written: list[Path] = []
    numbers = [word for word in words_of(found, words) if found.explained(found.words[word].tokens[0])]
    for i in range(len(found.films) if numbers else 0):
        end = _end(found, i)
        written.append(word_strip(found, i, numbers, out / f"{name}_frames{end}.png"))
        written.append(word_animation(found, i, numbers[0], out / f"{name}_frames{end}.webp"))
    return written


def _end(found: Explanation, film: int) -> str:
    return f"_{film + 1}" if len(found.films) > 1 else ""
