# SPDX-License-Identifier: Apache-2.0
"""Several questions about one picture or video in one sequence, and attention that can be watched while it is taught.

All questions share the visual tokens. A mask keeps them apart and each one begins at the position behind the visual tokens, so that
every answer is computed as if its question were alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..synthetic.questions import Question


def half_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention with its softmax in the precision of the values: on a CPU twice as fast as the others in bfloat16, backward too.
    A module with an attribute `looked` keeps its weights there."""
    logits = (query * scaling) @ key.transpose(-1, -2)
    if attention_mask is not None:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    weights = logits.softmax(-1)
    if hasattr(module, "looked"):
        module.looked = weights
    return (weights @ value).transpose(1, 2), None


@dataclass
class Packed:
    """Conversations about a batch, padded on the right. input_ids, labels (-100: none), turn (-1: none) [batch, length];
    position_ids [3, batch, length]; mask: who sees whom [batch, 1, length, length]."""

    input_ids: Tensor
    labels: Tensor
    turn: Tensor
    position_ids: Tensor
    mask: Tensor


def pack(vocabulary: dict[str, int], made: dict[str, Any], places: Tensor, asked: list[list[Question]]) -> Packed:
    """All questions behind the prompts that the processor made, whose tokens have the positions `places` [3, batch, length]."""
    begin = made["attention_mask"].sum(1).tolist()
    rows = []
    for questions in asked:
        turns = []
        for question in questions:
            prompt, answer = [*question.text.split(), "ASSISTANT:"], [*question.answer.split(), "</s>"]
            turns.append([(vocabulary[w], i >= len(prompt)) for i, w in enumerate([*prompt, *answer])])
        rows.append(turns)
    lengths = [first + sum(map(len, turns)) for first, turns in zip(begin, rows, strict=True)]
    shape = (len(asked), max(lengths))
    ids, labels, turn = torch.full(shape, vocabulary["<pad>"]), torch.full(shape, -100), torch.full(shape, -1)
    position = torch.zeros(3, *shape, dtype=torch.long)
    number = torch.full(shape, -2)  # -2: padding, -1: the prompt, then the turns
    for b, (first, turns) in enumerate(zip(begin, rows, strict=True)):
        ids[b, :first] = made["input_ids"][b, :first].cpu()
        position[:, b, :first] = places[:, b, :first].cpu()
        number[b, :first] = -1
        at, after = first, int(places[:, b, :first].max()) + 1
        for i, words in enumerate(turns):
            span = slice(at, at + len(words))
            ids[b, span] = torch.tensor([word for word, _ in words])
            said = torch.tensor([answer for _, answer in words])
            labels[b, span] = ids[b, span].masked_fill(~said, -100)
            turn[b, span] = torch.full((len(words),), i).masked_fill(~said, -1)
            position[:, b, span] = after + torch.arange(len(words))
            number[b, span] = i
            at += len(words)
    same = (number[:, :, None] == number[:, None]) | (number[:, None] == -1)
    causal = torch.ones(shape[1], shape[1], dtype=torch.bool).tril()
    mask = (same & causal)[:, None]
    return Packed(*(t.to(places.device) for t in (ids, labels, turn, position, mask)))


def right_answers(logits: Tensor, packed: Packed, asked: list[list[Question]]) -> list[tuple[str, bool]]:
    """(kind, whether the whole answer is right) of every question; logits: at the tokens before an answer's, in a row."""
    there = packed.labels >= 0
    wrong = logits.argmax(-1) != packed.labels[:, 1:][there[:, 1:]]
    row = torch.arange(len(asked), device=there.device)[:, None].expand_as(there)[there]
    bad = {(b, i) for b, i, w in zip(row.tolist(), packed.turn[there].tolist(), wrong.tolist(), strict=True) if w}
    return [(q.kind, (b, i) not in bad) for b, questions in enumerate(asked) for i, q in enumerate(questions)]
