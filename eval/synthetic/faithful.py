# SPDX-License-Identifier: Apache-2.0
"""Faithfulness of explanations on the synthetic benchmark, whose objects' boxes are known."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from ...api import compressed
from ...assets import MODELS, model_path
from ...explain import EXPLANATIONS, Explanation
from ...explain.faithfulness import Scores, explanation_scores
from ...explain.labels import FUNCTION, FUNCTION_WORDS, NOUN, OTHER
from .benchmark import Item, items, same
from .scenes import COLORS, SCALE, SHAPES, Scene, _draw_thing

NOUNS = frozenset({"color", "shape", "shapes", "sign", "picture"})
"""Nouns of the questions that name no object of the scene."""


def thing_box(scene: Scene, number: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of an object in pixels of the picture, as it is drawn."""
    width, height = (round(side * SCALE) for side in scene.size)
    canvas = Image.new("RGB", (width, height))
    _draw_thing(ImageDraw.Draw(canvas), scene.things[number], np.random.default_rng(0))
    box = canvas.getbbox()
    assert box is not None
    return box


def truth(item: Item, words: Sequence[str], parts: Sequence[str]) -> tuple[list[int], Tensor]:
    """Labels of the words of question and answer (`parts` says which), and the mask [height, width] of the objects they name.

    Words for colour and shape name the object that the question is about, in the answer to a relation the other one; all objects
    that are counted; characters of the answer name their own box on the sign. Words about an object that is not there are nouns
    without one; places, numbers and marks are neither.
    """
    scene, question = item.scene, item.question
    width, height = (round(side * SCALE) for side in scene.size)
    mask = torch.zeros(height, width, dtype=torch.int64)
    named = question.targets if question.kind == "count" else question.targets[:1]
    boxes = [(1, thing_box(scene, i)) for i in named]
    if question.kind == "relation":
        boxes.append((2, thing_box(scene, question.targets[1])))
    if question.kind == "reading":
        boxes += [(3 + i, tuple(round(v * SCALE) for v in box)) for i, box in enumerate(scene.sign.boxes)]  # type: ignore[misc]
    for label, (left, top, right, bottom) in boxes:
        mask[top:bottom, left:right] = label
    labels, characters = [], 0
    for word, part in zip(words, parts, strict=True):
        word = word.lower()
        if question.kind == "reading" and part == "answer":
            labels.append(3 + characters)
            characters += 1
        elif word in COLORS or word in SHAPES:
            labels.append(2 if part == "answer" and question.kind == "relation" else 1 if named else NOUN)
        else:
            labels.append(NOUN if word in NOUNS else FUNCTION if word in FUNCTION_WORDS else OTHER)
    return labels, mask


@dataclass(frozen=True)
class Faithfulness:
    """Scores of one explanation on one model. samples: questions that it was measured on; wrong: those that were answered wrongly
    and left out."""

    explanation: str
    plan: str
    scores: Scores
    samples: int
    wrong: int


def faithfulness(
    model: Any, processor: Any, questions: Sequence[Item], explain: Callable[..., Explanation], **options: Any
) -> Faithfulness:
    """Scores of an explanation of `model` (stock or compressed) on the questions that it answers rightly."""
    found, wrong, name, plan = [], 0, "", ""
    for item in questions:
        made = explain(model, processor, item.picture, item.question.text, max_new_tokens=8, **options)
        name, plan = made.method, made.plan
        if not same(made.answer, item.question.answer):
            wrong += 1
            continue
        labels, mask = truth(item, [w.text for w in made.words], [w.part for w in made.words])
        found.append(explanation_scores(made, labels, mask))
    return Faithfulness(name, plan, Scores.pooled(found), len(found), wrong)


WITH_QUESTION: dict[str, dict[str, Any]] = {
    "gradient relevance": {"explain_question": True},
    "Grad-CAM": {"explain_question": True},
}
"""Options under which every explanation has maps of the question's words: the function words are there."""


def compare(
    model: Any, processor: Any, questions: Sequence[Item], names: Sequence[str] = tuple(EXPLANATIONS)
) -> Iterator[Faithfulness]:
    """Every explanation on the same questions."""
    for name in names:
        yield faithfulness(model, processor, questions, EXPLANATIONS[name], **WITH_QUESTION.get(name, {}))


def rank_agreement(first: Explanation, second: Explanation) -> float:
    """Spearman correlation of two explanations of the same answer, over the cells that both know, mean over answer tokens (those
    whose values are all equal left out; nan if all are)."""
    found = []
    for token in (i for i, t in enumerate(first.tokens) if t.part == "answer"):
        there = ~(first.maps[token].isnan() | second.maps[token].isnan())
        ranks = torch.stack([_ranks(e.maps[token][there]) for e in (first, second)])
        if bool((ranks.std(1) > 0).all()):
            found.append(torch.corrcoef(ranks)[0, 1].item())
    return sum(found) / len(found) if found else math.nan


def _ranks(values: Tensor) -> Tensor:
    """Place of each value in ascending order, [n]; equal values share the mean of theirs."""
    _, group, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last.double() - (counts.double() - 1) / 2)[group]


def row(model: str, found: Faithfulness) -> dict[str, Any]:
    """One line of a table: scores as they were measured."""
    s = found.scores
    return {
        "model": model, "plan": found.plan, "explanation": found.explanation, "samples": found.samples, "wrong": found.wrong,
        "obj_iou": s.obj_iou, "func_iou": s.func_iou, "f1_iou": s.f1_iou, "precision": s.mean("precision"),
        "recall": s.mean("recall"), "pointing": s.mean("pointing"), "coverage": s.mean("coverage"), "gone": s.gone,
        "object_words": len(s.obj), "function_words": len(s.func),
    }  # fmt: skip


def main() -> None:
    """`python -m mmcompress.eval.synthetic.faithful`: every explanation on every embedded model, stock and compressed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--questions", type=int, default=70)
    parser.add_argument("--plan", action="append", help="also under this compression (may be given several times)")
    parser.add_argument("--out", type=Path, default=Path("results/explain.json"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        model = AutoModelForImageTextToText.from_pretrained(model_path(name), dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(model_path(name))
        questions = items(arguments.questions)
        for plan in ("", *(arguments.plan or ())):
            with compressed(model, plan) if plan else nullcontext():
                for found in compare(model, processor, questions):
                    rows.append(row(name, found))
                    print(json.dumps(rows[-1]), flush=True)
                    arguments.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
