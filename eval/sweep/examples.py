# SPDX-License-Identifier: Apache-2.0
"""The worst examples of a plan: answers that were right and are wrong, with pictures of the tokens that were kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import mmcompress as mm

from ...visualize import encoded_view, kept_overlay
from ..data import Question, open_picture
from ..evaluator import STOCK, load_record, rows_of
from ..prompts import conversation, question_text
from ..statistics import RIGHT, paired
from ..synthetic.benchmark import takes_any_shape
from ..tasks import Row, task_of

SIDE = 240


@dataclass(frozen=True)
class Example:
    """A question that a plan answers wrong and the stock model right; one picture per visual, kept tokens bright."""

    plan: str
    task: str
    question: str
    row: Row
    before: str
    pictures: tuple[Image.Image, ...]
    tokens: str


def worst(base: Sequence[Row], other: Sequence[Row], count: int) -> list[tuple[Row, Row]]:
    """Pairs of rows that went from right to wrong, the largest loss first, at most `count`: of different types where there are."""
    lost = [
        (a, b)
        for a, b in zip(*paired(base, other), strict=True)
        if a.value is not None and b.value is not None and a.value >= RIGHT > b.value
    ]
    lost.sort(key=lambda pair: (pair[1].value or 0.0) - (pair[0].value or 0.0))
    seen: dict[str, int] = {}
    ranked = []
    for number, (a, b) in enumerate(lost):
        ranked.append((seen.get(a.kind, 0), number, a, b))
        seen[a.kind] = seen.get(a.kind, 0) + 1
    ranked.sort(key=lambda entry: entry[:2])
    return [(a, b) for _, _, a, b in ranked[:count]]


def examples(
    model: Any, processor: Any, content: dict[str, Any], works: Sequence[Any], folder: Path, count: int = 3
) -> list[Example]:
    """At most `count` of each plan and task of a sweep. The model must be stock, and is stock again afterwards."""
    points = [point for point in content["points"] if not point["refused"]]
    stock = next(point for point in points if point["plan"] == STOCK)
    found = []
    for work in works:
        asked = {question.id: question for question in work.questions}
        record = load_record(folder / stock["tasks"][work.name]["record"])
        for point in points:
            if point["plan"] == STOCK:
                continue
            rows = rows_of(load_record(folder / point["tasks"][work.name]["record"]))
            for a, b in worst(rows_of(record), rows, count):
                question, settings = asked[a.id], record["settings"]
                if question.images:
                    text = question_text(task_of(work.name), question, settings["protocol"], settings["suffix"])
                    said = conversation(processor, text, len(question.images), settings["template"])
                    pictures, tokens = kept(model, processor, question, said, point["plan"])
                    found.append(Example(point["plan"], work.name, question.text, b, a.reply, pictures, tokens))
    return found


@torch.no_grad()
def kept(model: Any, processor: Any, question: Question, text: str, plan: str) -> tuple[tuple[Image.Image, ...], str]:
    """Pictures of the tokens that the last layer sees, and how many there are."""
    pictures = [open_picture(image) for image in question.images]
    inputs = processor(images=pictures, text=[text], return_tensors="pt").to(model.device, model.dtype)
    with mm.compressed(model, plan):
        model(**inputs, use_cache=False, logits_to_keep=1)
        visuals = mm.trace(model).visuals
    whole = takes_any_shape(model)  # else the processor may have cut the middle out
    views = pictures if whole else [encoded_view(processor, pixels) for pixels in inputs["pixel_values"]]
    last = visuals[0].call.groups[-1].start
    shown = ", ".join(f"{len(visual.kept_cells(last))} of {visual.tokens}" for visual in visuals)
    return tuple(kept_overlay(view, visual, side=SIDE) for view, visual in zip(views, visuals, strict=True)), shown
