# SPDX-License-Identifier: Apache-2.0
"""The evaluator's data for `mmcompress.tune`: answers instead of states as what a plan should keep."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tune import Objective
from .data import Question
from .evaluator import bucketed, padded_left
from .inputs import AskError, inputs_of, texts_of
from .metrics import Protocol
from .prompts import new_tokens
from .synthetic.benchmark import takes_any_shape
from .tasks import task_of

METRICS = ("state", "agreement", "score")
"""What plans can be judged by: the final state, the same answers as the stock model, right answers."""


@dataclass(frozen=True)
class Batch:
    """Inputs of a batch, and its questions."""

    inputs: Any
    questions: Sequence[Question]


def batches(
    model: Any, processor: Any, task: str, questions: Sequence[Question], protocol: Protocol = "official", size: int = 8
) -> list[Batch]:
    """Questions with pictures as model inputs on its device, like ones together; asked as the evaluator asks them. What cannot be
    asked is left out with a warning; AskError if that is all."""
    shown = [question for question in questions if question.images]
    if not shown:
        raise ValueError("none of the questions has a picture: there is nothing to compress")
    kind = task_of(task)
    texts, wrong = texts_of(processor, kind, shown, protocol, None, "chat")
    found = []
    with padded_left(processor):
        for batch in bucketed(shown, texts, size, takes_any_shape(model)):
            asked, inputs, refused = inputs_of(model, processor, shown, texts, [i for i in batch if texts[i]])
            wrong |= refused
            if asked:
                found.append(Batch(inputs.to(model.device, model.dtype), [shown[i] for i in asked]))
    if wrong:
        name, reason = next(iter(wrong.items()))
        said = f"{len(wrong)} of {len(shown)} questions are left out; {name!r}: {reason}"
        if not found:
            raise AskError(said)
        warnings.warn(said, stacklevel=2)
    return found


def answers(
    processor: Any,
    task: str,
    asked: Sequence[Batch],
    metric: str,
    protocol: Protocol = "official",
    most: int | None = None,
) -> Objective:
    """Judge plans by greedy answers to `asked`.

    agreement: part of the questions to which the benchmark's parser reads what it reads of the stock model; no gold answers are
    needed. score: mean value of the answers by the benchmark's metric.
    """
    if metric not in METRICS[1:]:
        raise ValueError(f"metric={metric!r}: choose agreement or score")
    if metric == "score" and (blank := [q.id for batch in asked for q in batch.questions if not q.answers]):
        raise ValueError(f"question {blank[0]} has no gold answer: use --metric agreement")
    kind, limit = task_of(task), most or new_tokens(task_of(task), protocol)
    questions = {id(batch.inputs): batch.questions for batch in asked}
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}

    def observe(model: Any, inputs: Mapping[str, Any]) -> list[tuple[str, float]]:
        out = model.generate(**inputs, **greedy, max_new_tokens=limit)[:, inputs["input_ids"].shape[1] :]
        replies = processor.batch_decode(out, skip_special_tokens=True)
        rows = [kind.row(q, reply, protocol) for q, reply in zip(questions[id(inputs)], replies, strict=True)]
        return [(row.parsed, row.value or 0.0) for row in rows]

    def compare(stock: list[tuple[str, float]], found: list[tuple[str, float]]) -> Tensor:
        if metric == "score":
            return torch.tensor([value for _, value in found], dtype=torch.float64)
        return torch.tensor([a[0] == b[0] for a, b in zip(stock, found, strict=True)], dtype=torch.float64)

    return Objective(f"{metric} of answers to {task}, {protocol}", observe, compare)
