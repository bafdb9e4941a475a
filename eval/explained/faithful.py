# SPDX-License-Identifier: Apache-2.0
"""Faithfulness of explanations on the synthetic benchmark, whose objects' boxes are known."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ... import explain
from ...api import compressed
from ...assets import MODELS, model_path
from ...explain import EXPLANATIONS, Explanation
from ...explain.activation import activation_of
from ...explain.attention import last_attention_of, rollout_of
from ...explain.faithfulness import Scores, explanation_scores
from ...explain.labels import FUNCTION, FUNCTION_WORDS, NOUN, OTHER
from ...explain.session import session
from ...explain.taps import AttentionTap, StatesTap
from ...records import update, write_text
from ...weights import fingerprint
from ..machine import machine
from ..synthetic.benchmark import Item, items, load, same, takes_any_shape
from ..synthetic.scenes import COLORS, SCALE, SHAPES, Scene, draw_thing

NOUNS = frozenset({"color", "shape", "shapes", "sign", "picture"})
"""Nouns of the questions that name no object of the scene."""


def thing_box(scene: Scene, number: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of an object in pixels of the picture, as it is drawn."""
    width, height = (round(side * SCALE) for side in scene.size)
    canvas = Image.new("RGB", (width, height))
    draw_thing(ImageDraw.Draw(canvas), scene.things[number], np.random.default_rng(0))
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
    """Scores of one explanation on one model, of every question that was answered rightly. answers: those of the answer's words
    alone, as in the authors' protocol."""

    explanation: str
    plan: str
    parts: list[Scores]
    answers: list[Scores]

    @property
    def samples(self) -> int:
        return len(self.parts)

    @property
    def scores(self) -> Scores:
        return Scores.pooled(self.parts)


MEASURED = Path(explain.__file__).with_name("measured.json")
GRADIENTS = ("gradient relevance", "Grad-CAM")
"""Explanations that take several times as long as the others."""


def explanations(model: Any, processor: Any, item: Item) -> list[Explanation]:
    """Those that need no gradients, the token activation map first: all of one answer, read from one run."""
    with torch.no_grad(), session(model, processor, item.picture, item.question.text, max_new_tokens=8) as s:
        layers = range(len(s.adapter.language_model.layers))
        states, attention = StatesTap(), AttentionTap(layers)
        s.run(states, attention)
        return [activation_of(s, states), rollout_of(s, attention), last_attention_of(s, attention, layers[-1])]


def by_gradients(model: Any, processor: Any, item: Item, answer: Sequence[int] | None = None) -> list[Explanation]:
    ask: Any = (model, processor, item.picture, item.question.text)
    return [EXPLANATIONS[name](*ask, answer=answer, explain_question=True, max_new_tokens=8) for name in GRADIENTS]


def compare(model: Any, processor: Any, questions: Sequence[Item], gradients: int = 0) -> list[Faithfulness]:
    """Explanations of the same answers of `model` (stock or compressed), where they are right; those by gradients of the first
    questions only.

    Cells that some of them cannot see count for none. The words of question and answer count, for all explanations but the first
    word of the question: its token activation map is not its own, but that of what the model would say there.
    """
    found: dict[str, list[tuple[Scores, Scores]]] = {}
    plan = ""
    for number, item in enumerate(questions):
        made = explanations(model, processor, item)
        plan, answer = made[0].plan, made[0].answer_ids
        if not same(made[0].answer, item.question.answer):
            continue
        if number < gradients:
            made += by_gradients(model, processor, item, answer)
        labels, mask = truth(item, [w.text for w in made[0].words], [w.part for w in made[0].words])
        seen = ~torch.stack([one.maps[-1].isnan() for one in made]).any(0)
        for one in made:
            one = dataclasses.replace(one, maps=one.maps.masked_fill(~seen, math.nan))
            both, alone = (
                explanation_scores(one, [labels[i] for i in words], mask, words=words)
                for words in (range(1, len(labels)), one.answer_words)
            )
            found.setdefault(one.method, []).append((both, alone))
    return [Faithfulness(name, plan, [a for a, _ in parts], [b for _, b in parts]) for name, parts in found.items()]


def drawn_f1(parts: Sequence[Scores], draws: int = 2000) -> np.ndarray:
    """F1-IoU of questions drawn again and again with replacement, [draws]. As many questions are drawn alike every time, so
    differences between explanations of the same questions are paired."""
    sums = np.array([[sum(p.obj), len(p.obj), sum(p.func), len(p.func)] for p in parts])
    times = np.random.default_rng(0).multinomial(len(parts), np.full(len(parts), 1 / len(parts)), draws)
    with np.errstate(invalid="ignore"):
        total = times @ sums
        obj, func = total[:, 0] / total[:, 1], total[:, 2] / total[:, 3]
        return 2 * obj * func / (obj + func)


def rows_of(model: str, found: Sequence[Faithfulness]) -> list[dict[str, Any]]:
    """Lines of a table, scores as they were measured. f1_error: standard error by a bootstrap over questions. lead: F1-IoU of the
    first explanation less this one's on the same questions, with its paired error: below two of these they cannot be told apart."""
    rows, first = [], found[0]
    for one in found:
        s, answers = one.scores, Scores.pooled(one.answers)
        beside = first.parts[: one.samples]
        lead = drawn_f1(beside) - drawn_f1(one.parts)
        rows.append({
            "model": model, "plan": one.plan, "explanation": one.explanation, "samples": one.samples, "obj_iou": s.obj_iou,
            "func_iou": s.func_iou, "f1_iou": s.f1_iou, "f1_error": float(np.nanstd(drawn_f1(one.parts))),
            "lead": Scores.pooled(beside).f1_iou - s.f1_iou, "lead_error": float(np.nanstd(lead)),
            "precision": s.mean("precision"), "recall": s.mean("recall"), "pointing": s.mean("pointing"),
            "coverage": s.mean("coverage"), "gone": s.gone, "object_words": len(s.obj), "function_words": len(s.func),
            "answer_obj_iou": answers.obj_iou, "answer_object_words": len(answers.obj),
        })  # fmt: skip
    return rows


def record(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put the rows of some models into a record, in the place of those that they had."""
    new = {row["model"] for row in rows}

    def add(known: dict[str, Any] | None) -> dict[str, Any]:
        left = [row for row in (known or {"rows": []})["rows"] if row["model"] not in new]
        return {"machine": machine(), "rows": sorted([*left, *rows], key=lambda row: MODELS.index(row["model"]))}

    update(path, "explanations", add, lambda value: isinstance(value, dict) and "rows" in value)


def pack(record: Path, out: Path = MEASURED) -> None:
    """Write what explanations say of themselves (`explain.measured`): the scores of a record by the fingerprints of the models,
    with the options that the explanations had."""
    rows = json.loads(record.read_text())["rows"]
    packed = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        model, processor = load(model_path(name))
        (item,) = items(1, stretched=takes_any_shape(model))
        made = [*explanations(model, processor, item), *by_gradients(model, processor, item)]
        options = {one.method: {k: v for k, v in one.options.items() if k != "explain_question"} for one in made}
        mine = [
            {
                "method": row["explanation"], "options": options[row["explanation"]], "plan": row["plan"],
                "questions": row["samples"], "f1": round(row["f1_iou"], 6), "error": round(row["f1_error"], 6),
            }
            for row in rows if row["model"] == name
        ]  # fmt: skip
        packed[fingerprint(model)] = {"model": name, "rows": mine}
    write_text(out, json.dumps(packed, indent=1) + "\n")


def main() -> None:
    """`python -m mmcompress.eval.explained.faithful`: every explanation on every embedded model, stock and compressed."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--questions", type=int, default=140)
    parser.add_argument(
        "--gradient-questions", type=int, default=14, help="how many of them for gradients, stock model only"
    )
    parser.add_argument("--plan", action="append", default=[], help="also under this compression (several allowed)")
    parser.add_argument("--plan-questions", type=int, default=70, help="how many of them for compressed models")
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all; other rows of the record stay")
    parser.add_argument("--out", type=Path, default=Path("results/explain.json"))
    parser.add_argument(
        "--pack", action="store_true", help="also put the scores into the package, for explanations to tell"
    )
    arguments = parser.parse_args()
    for name in arguments.model or MODELS:
        model, processor = load(model_path(name))
        questions = items(arguments.questions, stretched=takes_any_shape(model))
        found = rows_of(name, compare(model, processor, questions, arguments.gradient_questions))
        for plan in arguments.plan:
            with compressed(model, plan):
                found += rows_of(name, compare(model, processor, questions[: arguments.plan_questions]))
        record(arguments.out, found)
        for row in found:
            print(
                f"{name} {row['plan'] or 'stock'} {row['explanation']}: {100 * row['f1_iou']:.1f} ± {100 * row['f1_error']:.1f}",
                flush=True,
            )
    if arguments.pack:
        pack(arguments.out)


if __name__ == "__main__":
    main()
