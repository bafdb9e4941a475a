# SPDX-License-Identifier: Apache-2.0
"""Everything there is to see about explanations, in one folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..explain import Explanation
from .fates import steps
from .figure import cannot_draw
from .figures import fate_picture, heat_picture, layers_figure, scores_figure, stages_figure, strength, words_figure
from .frames import animation, contact_sheet, frames_of
from .page import page


def write_all(found: Sequence[Explanation], out: Path, *, about: str = "", notes: Sequence[str] = ()) -> list[Path]:
    """Page and pictures of explanations of one prompt (stock and compressed, one or several methods) in the folder `out`; the page
    comes first (about, notes: as there). Without matplotlib the page alone."""
    written = [page(found, about=about, notes=notes).save(out / "index.html")]
    if cannot_draw():
        return written
    plans = {one.plan: one for one in reversed(found)}
    for i, one in enumerate(one for plan, one in plans.items() if plan):
        more = f"_{i + 1}" if i else ""
        written.append(stages_figure(one, out / f"stages{more}.png"))
        if path := scores_figure(one, out / f"scores{more}.png"):
            written.append(path)
    written.append(layers_figure(list(reversed(plans.values())), out / "layers.png"))
    for method in dict.fromkeys(one.method for one in found):
        rows = [one for one in found if one.method == method]
        name = method.lower().replace(" ", "-")
        for visual in range(len(found[0].visuals)):
            end = f"_{visual + 1}" if len(found[0].visuals) > 1 else ""
            written.append(words_figure(rows, out / f"{name}{end}.png", visual))
        for one in rows:
            written += videos(one, out, f"{name}_{'compressed' if one.plan else 'stock'}")
    return written


def videos(found: Explanation, out: Path, name: str) -> list[Path]:
    """Of every video a contact sheet and an animated GIF of its first answer word's map, beside what was kept of each frame."""
    written: list[Path] = []
    word, last = found.answer_words[:1], steps(found.trace)[-1]
    for visual in range(len(found.visuals)):
        count = frames_of(found, visual)
        if count < 2:
            continue
        frames = [fate_picture(found, last, visual, 320, i) for i in range(count)]
        if word:
            values = found.word_map(word[0], visual) / (strength(found, word[0]) or 1)
            frames = [_beside(heat_picture(found, values, visual, 320, i), frame) for i, frame in enumerate(frames)]
        written.append(contact_sheet(frames, out / f"{name}_frames_{visual + 1}.png"))
        written.append(animation(frames, out / f"{name}_frames_{visual + 1}.gif"))
    return written


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width + 4, max(left.height, right.height)), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 4, 0))
    return both
