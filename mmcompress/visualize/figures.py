# SPDX-License-Identifier: Apache-2.0
"""Figures of explanations: stages, scores, words and layers; stock and compressed side by side. They need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..explain import Explanation
from ..explain.fates import Step, steps
from .colours import heat, unit
from .figure import new_figure, show_picture, written
from .legend import fate_legend, heat_legend
from .overlay import fate_overlay, heat_overlay, laid_out

_WIDE, _MOST = 2.6, 12
"""Inches of a picture; most words in one figure."""


def fate_picture(found: Explanation, step: Step, visual: int = 0, side: int = 480, frame: int = 0) -> Image.Image:
    """What became of the tokens of a visual behind a stage."""
    seen, first = found.visuals[visual], first_cell(found, visual)
    return laid_out(seen.pictures, seen.panes, lambda p, pane: fate_overlay(p, pane, step, first), side, frame)


def heat_picture(found: Explanation, values: Tensor, visual: int = 0, side: int = 480, frame: int = 0) -> Image.Image:
    """Values [N] from 0 to 1 (a map, or scores through `unit`) on the picture of a visual."""
    seen = found.visuals[visual]
    return laid_out(seen.pictures, seen.panes, lambda p, pane: heat_overlay(p, pane, values), side, frame)


def first_cell(found: Explanation, visual: int) -> int:
    """Number of a visual's first cell among those of all visuals."""
    return sum(len(seen.valid) for seen in found.visuals[:visual])


def named(found: Explanation) -> str:
    return found.plan or "stock model"


def place_name(step: Step) -> str:
    """Where in the model a stage acts."""
    if not step.stage:
        return "all tokens"
    return "before the LLM" if step.layer is None else f"before layer {step.layer}"


def stages_figure(found: Explanation, path: Path) -> Path:
    """What was kept, merged and dropped: a row per visual, a column per stage; of a video the frame of which most is left."""
    found_steps = steps(found.trace, found.row)
    shown = shown_frames(found)
    pictures = [[fate_picture(found, step, i, frame=frame) for step in found_steps] for i, (frame, _) in shown.items()]
    figure, axes = _grid(pictures, named(found), 0.9)
    for row, (i, (_, when)) in enumerate(shown.items()):
        first = first_cell(found, i)
        for axis, step, picture in zip(axes[row], found_steps, pictures[row], strict=True):
            mine = step.stands[first : first + len(found.visuals[i].valid)]
            left = len(mine[mine >= 0].unique())
            above = f"{place_name(step)}\n{step.stage}"
            show_picture(axis, picture, above, f"{left} of {len(mine)} tokens{when}")
    fate_legend(figure)
    return written(figure, path)


def shown_frames(found: Explanation) -> dict[int, tuple[int, str]]:
    """Of every visual the frame to draw where there is room for one (that of which most is left), and what to say of it. Of a video
    that the model takes for a row of pictures one stands for all."""
    shown = dict.fromkeys(range(len(found.visuals)), (0, ""))
    for film in found.films:
        best = int(film.tokens[-1].argmax())
        for visual, _ in film.places:
            shown.pop(visual, None)
        visual, frame = film.places[best]
        shown[visual] = (frame, f"; here {'the frame at ' * bool(film.times)}{film.label(best)}")
    return dict(sorted(shown.items()))


def _grid(pictures: Sequence[Sequence[Image.Image]], title: str, more: float) -> tuple[Any, Any]:
    """A figure with axes [rows, columns] that are as high as the pictures need, and `more` inches for title and legend."""
    columns = len(pictures[0])
    width = max(_WIDE * columns, 5.0)
    heights = [max(p.height / p.width for p in row) * width / columns + 0.7 for row in pictures]
    figure = new_figure(width, sum(heights) + more, title)
    return figure, figure.subplots(len(pictures), columns, squeeze=False, height_ratios=heights)


def scores_figure(found: Explanation, path: Path) -> Path | None:
    """By which scores the stages chose, a column per stage that says so; None where none does."""
    scored = [step for step in steps(found.trace, found.row) if step.scores is not None]
    if not scored:
        return None
    values, pictures = [], []
    for i, (frame, _) in shown_frames(found).items():
        mine = slice(first_cell(found, i), first_cell(found, i) + len(found.visuals[i].valid))
        values.append([step.scores[mine] for step in scored if step.scores is not None])
        pictures.append([heat_picture(found, unit(one), i, frame=frame) for one in values[-1]])
    figure, axes = _grid(pictures, f"{named(found)}\nscores that decided", 1.3)
    for i, row in enumerate(values):
        for axis, step, one, picture in zip(axes[i], scored, row, pictures[i], strict=True):
            finite = one[one.isfinite()]
            below = f"{finite.min():.3g} to {finite.max():.3g}" if len(finite) else "none here"
            show_picture(axis, picture, f"{place_name(step)}\n{step.stage}", below)
    heat_legend(figure, axes, "highest", "hatched: not seen by the stage")
    return written(figure, path)


def words_figure(rows: Sequence[Explanation], path: Path, visual: int = 0, words: Sequence[str] = ()) -> Path:
    """A grid of maps: a column per word (default: the answer's), a row per explanation, above it its text coloured by how strong
    the map of each word is. Every map has all colours: what the brightest stands for is written below."""
    chosen = [words_of(found, words)[:_MOST] for found in rows]
    columns = max(1, *map(len, chosen))
    question = rows[0].question
    height = (_WIDE + 1.2) * len(rows) + 1.4
    figure = new_figure(max(_WIDE * columns, 6.0), height, cut(question, 20 * columns + 30))
    parts = figure.subfigures(len(rows) + 1, 1, squeeze=False, height_ratios=[*[_WIDE + 1.2] * len(rows), 0.7])[:, 0]
    for part, found, numbers in zip(parts, rows, chosen, strict=False):
        above, below_it = part.subfigures(2, 1, height_ratios=(0.6, _WIDE + 0.6))
        _text(above, found, columns)
        axes = below_it.subplots(1, columns, squeeze=False)[0]
        for axis in axes:
            axis.set_axis_off()
        for axis, word in zip(axes, numbers, strict=False):
            most = strength(found, word)
            below = "not explained" if most is None else f"brightest: {most:.2f} of 1"
            picture = heat_picture(found, found.word_map(word, visual) / (most or 1), visual)
            show_picture(axis, picture, cut(found.words[word].text, 24), below)
    heat_legend(
        parts[-1],
        parts[-1].subplots(),
        "brightest",
        "how much a place has to do with the word; hatched: no token",
        True,
    )
    return written(figure, path)


def words_of(found: Explanation, wanted: Sequence[str] = ()) -> list[int]:
    """Numbers of the words to draw: those that are written so and are there; without any named the answer's that say something."""
    if wanted:
        return [found.find(word)[0] for word in wanted if found.has(word)]
    spoken = [i for i in found.answer_words if not all(found.tokens[t].special for t in found.words[i].tokens)]
    return spoken or found.answer_words


def strength(found: Explanation, word: int) -> float | None:
    """The largest value of a word's maps in all visuals; None where it was not explained."""
    values = found.maps[list(found.words[word].tokens)]
    known = values[~values.isnan()]
    return known.max().item() if len(known) else None


def layers_figure(rows: Sequence[Explanation], path: Path) -> Path:
    """How many tokens entered each layer of the language model."""
    figure = new_figure(6.5, 3.2, "tokens that enter each layer of the language model, text included")
    axis = figure.subplots()
    wide = 0.8 / len(rows)
    for i, found in enumerate(rows):
        at = [layer + (i - (len(rows) - 1) / 2) * wide for layer in range(len(found.layers))]
        axis.bar(at, found.layers, wide, label=cut(named(found), 60), color=("#7a869a", "#ed6925", "#781c6d")[i % 3])
    axis.set(xlabel="layer", ylabel="tokens")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(rows))
    return written(figure, path)


def _text(part: Any, found: Explanation, columns: int) -> None:
    """The name of an explanation, and under it its words on a coloured ground."""
    from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea

    part.suptitle(f"{named(found)}: {found.method}", fontsize=9, x=0.01, ha="left", parse_math=False)
    boxes, room = [], 26 * columns + 20
    for i, word in enumerate(found.words):
        room -= len(word.text) + 2
        if room < 0:
            break
        value = strength(found, i) or 0.0
        colour = heat(_array(value)) / 255
        light = float(colour @ _array([0.3, 0.6, 0.1])) > 0.5
        style = {"fontsize": 9, "color": "black" if light else "white", "parse_math": False}
        area = TextArea(
            word.text or " ", textprops=style | {"bbox": {"facecolor": colour, "edgecolor": "none", "pad": 2}}
        )
        boxes.append(area)
        if word.part == "question" and i + 1 < len(found.words) and found.words[i + 1].part == "answer":
            boxes.append(TextArea("  answer: ", textprops={"fontsize": 9}))
    packed = HPacker(children=list(boxes), pad=0, sep=6)
    held = AnchoredOffsetbox(
        "lower left", child=packed, frameon=False, bbox_to_anchor=(0.0, 0.0), bbox_transform=part.transSubfigure
    )
    part.add_artist(held)


def _array(value: Any) -> Any:
    import numpy as np

    return np.asarray(value, dtype=np.float32)


def cut(text: str, most: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"
