# SPDX-License-Identifier: Apache-2.0
"""What plans kept of pictures and videos, with what was answered: side by side, and the worst of each plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import mmcompress as mm

from ...explain.panes import panes
from ...visualize import encoded_view, kept_overlay
from ...visualize.overlay import scaled
from ..data import Question, open_picture
from ..data.question import open_clip
from ..evaluator import STOCK, load_record, rows_of
from ..inputs import inputs_of
from ..prompts import conversation, question_text
from ..statistics import RIGHT, paired
from ..synthetic.benchmark import takes_any_shape
from ..tasks import Row, task_of

SIDE, FRAMES = 240, 6
"""Pixels of a picture; frames of a video that are shown of it."""
EVERYTHING = "uniform(keep=1.0)"
"""The plan that changes nothing, and counts."""
Pictures = tuple[tuple[str, Image.Image], ...]
"""Each with what it is: "image 1", "frame 3"."""


@dataclass(frozen=True)
class Example:
    """A question as a plan answered it. before: the reply of the stock model; pictures: kept tokens bright; tokens: how many."""

    plan: str
    task: str
    question: str
    row: Row
    before: str
    pictures: Pictures
    tokens: str

    @property
    def right(self) -> bool:
        return (self.row.value or 0.0) >= RIGHT


class Gallery:
    """The answers and pictures of a sweep. Its model must be stock when pictures are made, and is stock again afterwards."""

    def __init__(
        self, model: Any, processor: Any, content: Mapping[str, Any], works: Sequence[Any], folder: Path
    ) -> None:
        self.model, self.processor = model, processor
        self.works = {work.name: {question.id: question for question in work.questions} for work in works}
        self.settings: dict[str, Any] = {}
        self.rows: dict[tuple[str, str], list[Row]] = {}
        for point in content["points"]:
            for task in () if point["refused"] else self.works:
                record = load_record(folder / point["tasks"][task]["record"])
                self.rows[point["plan"], task] = rows_of(record)
                self.settings.setdefault(task, record["settings"])

    @property
    def plans(self) -> list[str]:
        return list(dict.fromkeys(plan for plan, _ in self.rows if plan != STOCK))

    def worst(self, count: int = 3) -> list[Example]:
        """At most `count` answers of each plan and task that were right and are wrong."""
        return [
            self._example(plan, task, after, before.reply)
            for task in self.works
            for plan in self.plans
            for before, after in worst(self.rows[STOCK, task], self.rows[plan, task], count)
            if self.works[task][after.id].visuals
        ]

    def beside(self, plans: Sequence[str], count: int = 3) -> list[list[Example]]:
        """At most `count` questions of each task on which `plans` differ most, answered by the stock model and by each of them."""
        found = []
        for task, asked in self.works.items():
            answers = {plan: {row.id: row for row in self.rows[plan, task]} for plan in (STOCK, *plans)}
            shared = [row for row in self.rows[STOCK, task] if all(row.id in rows for rows in answers.values())]
            shared = [row for row in shared if asked[row.id].visuals]
            given = [[rows[row.id] for row in shared] for rows in answers.values()]
            for row in split(shared, given, count):
                found.append([self._example(plan, task, rows[row.id], row.reply) for plan, rows in answers.items()])
        return found

    def _example(self, plan: str, task: str, row: Row, before: str) -> Example:
        question, settings = self.works[task][row.id], self.settings[task]
        text = question_text(task_of(task), question, settings["protocol"], settings["suffix"])
        counts = len(question.images), settings["template"], len(question.videos)
        pictures, tokens = kept(
            self.model, self.processor, question, conversation(self.processor, text, *counts), plan
        )  # fmt: skip
        return Example(plan, task, question.text, row, before, pictures, tokens)


def worst(base: Sequence[Row], other: Sequence[Row], count: int) -> list[tuple[Row, Row]]:
    """Pairs of rows that went from right to wrong, the largest loss first, at most `count`: of different types where there are."""
    lost = [
        (a, b)
        for a, b in zip(*paired(base, other), strict=True)
        if a.value is not None and b.value is not None and a.value >= RIGHT > b.value
    ]
    lost.sort(key=lambda pair: (pair[1].value or 0.0) - (pair[0].value or 0.0))
    return _of_all_types(lost, [a.kind for a, _ in lost])[:count]


def split(rows: Sequence[Row], answers: Sequence[Sequence[Row]], count: int) -> list[Row]:
    """The rows on which as many of the answers are right as are wrong, at most `count`, of different types where there are."""
    shares = [sum((one.value or 0.0) >= RIGHT for one in every) / len(answers) for every in zip(*answers, strict=True)]
    ranked = [row for _, row in sorted(zip(shares, rows, strict=True), key=lambda pair: abs(pair[0] - 0.5))]
    return _of_all_types(ranked, [row.kind for row in ranked])[:count]


def _of_all_types(found: Sequence[Any], kinds: Sequence[str]) -> list[Any]:
    """The first of each type, then the second of each, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for number, kind in enumerate(kinds):
        ranked.append((seen.get(kind, 0), number))
        seen[kind] = seen.get(kind, 0) + 1
    return [found[number] for _, number in sorted(ranked)]


@torch.no_grad()
def kept(model: Any, processor: Any, question: Question, text: str, plan: str) -> tuple[Pictures, str]:
    """Pictures of the tokens that the last layer sees, of a video a strip of frames, and how many tokens there are."""
    _, inputs, wrong = inputs_of(model, processor, [question], [text], [0])
    if wrong:
        return (), ""
    inputs = inputs.to(model.device, model.dtype)
    with mm.compressed(model, EVERYTHING if plan == STOCK else plan):
        model(**inputs, use_cache=False, logits_to_keep=1)
        visuals = mm.trace(model).visuals
    shown = [(picture,) for picture in map(open_picture, question.images)]
    shown += [tuple(open_clip(video).pictures) for video in question.videos]
    if len(shown) != len(visuals):  # a video that the model takes for a row of pictures
        shown = [(frame,) for pictures in shown for frame in pictures]
    if question.images and not takes_any_shape(model):  # the processor may have cut the middle out
        shown = [(encoded_view(processor, pixels),) for pixels in inputs["pixel_values"]]
    made: list[tuple[str, Image.Image]] = []
    last = visuals[0].call.groups[-1].start
    for number, (visual, pictures) in enumerate(zip(visuals, shown, strict=False), 1):
        frames = sum(pane.role == "frame" for pane in panes(visual.layout)) or 1
        for frame in spread(frames):
            seen = pictures[frame * len(pictures) // frames]
            name = f"frame {frame + 1}" if frames > 1 else f"image {number}"
            made.append((name, scaled(seen, SIDE) if plan == STOCK else kept_overlay(seen, visual, None, SIDE, frame)))
    if len(made) > FRAMES and question.videos:
        made = [made[i] for i in spread(len(made))]
    return tuple(made), ", ".join(f"{len(visual.kept_cells(last))} of {visual.tokens}" for visual in visuals)


def spread(count: int) -> list[int]:
    """At most FRAMES numbers from 0 to `count` - 1, evenly."""
    return [(2 * i + 1) * count // (2 * min(count, FRAMES)) for i in range(min(count, FRAMES))]
