# SPDX-License-Identifier: Apache-2.0
"""Signals of a whole prompt, made before the language model runs: its first attention, and the relevance of its own answer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .cache import ledger_of
from .call import Call
from .deepstack import leading, levels_of
from .layers import Heads
from .probe import Forms
from .relevance import Prompt, answer_relevance, check_relevance, greedy_answers
from .rotary import rotary_tables, shifted

PROMPT_SIGNALS = ("first_text_attention", "answer_relevance")
BLOCK = 128
"""Instruction tokens whose attention is made at a time."""


def check_prompt_signals(forms: Forms, kinds: Iterable[str], asked: object) -> None:
    """Raise NotImplementedError where a language model cannot give some of PROMPT_SIGNALS."""
    if "first_text_attention" in kinds:
        forms.of(0, asked, "norm")
    if "answer_relevance" in kinds:
        check_relevance(forms, asked)


def first_heads(forms: Forms, embeds: Tensor, positions: Tensor, valid: Tensor | None, call: Call) -> Heads:
    """Queries and keys of the first layer from what enters it, [B, S, D]; nothing else of the layer runs."""
    if positions.dim() == 3 and len(positions) == 4:  # the first are a plain count, for masks
        positions = positions[1:]
    form = forms.of(0, "the first attention on the instruction", "norm")
    hidden = form.entering(embeds)
    tables = rotary_tables(forms.language_model, hidden, positions.to(hidden.device))
    return Heads(form, hidden, tables, valid, call, 0, False, positions)


def mean_text_attention(heads: Heads, rows: Tensor, at: Tensor, text: Tensor) -> Tensor:
    """Attention of the tokens `text` [U, T] of the batch rows `rows` [U, 1] on those `at` [U, N], mean over heads and text: [U, N]
    float32, zeros where there is no text."""
    total = torch.zeros(at.shape, device=heads.hidden.device)
    columns = at.to(total.device)
    for part in text.split(BLOCK, dim=1) if text.shape[1] else ():
        weights = heads.attention_of(rows, part).mean(1)
        total = total + weights.gather(2, columns[:, None].expand(-1, part.shape[1], -1)).sum(1)
    return total / max(text.shape[1], 1)


class PromptTap:
    """The signals of one call; made when asked for."""

    def __init__(
        self, adapter: Any, forms: Forms, call: Call, given: dict[str, Any], positions: Tensor, valid: Tensor | None
    ) -> None:
        self.adapter, self.forms, self.call, self.given, self.valid = adapter, forms, call, given, valid
        self.positions = shifted(positions, ledger_of(call.cache, 0))
        self.model = adapter.language_model

    @torch.no_grad()
    def signal(self, name: str, rows: Tensor, at: Tensor, text: Tensor) -> Tensor:
        """[U, N] float32 of the tokens `at` [U, N] of the batch rows `rows` [U, 1]."""
        kind, *options = name.split(":")
        if kind == "first_text_attention":
            return mean_text_attention(self.heads, rows, at, text)
        most, mode = options
        values = self._relevance(int(most), mode)
        return values[rows.to(values.device), at.to(values.device)]

    @functools.cached_property
    def heads(self) -> Heads:
        embeds = self.given["inputs_embeds"]
        if leading(self.given) == 0:  # it enters with them
            levels = levels_of(self.given, embeds)
            assert levels is not None
            embeds = embeds + levels.of(0)
        return first_heads(self.forms, embeds, self.positions, self.valid, self.call)

    @functools.cache  # noqa: B019 - lives as long as its call
    def _relevance(self, most: int, mode: str) -> Tensor:
        """Mean over the tokens of the greedy answer, [B, S]; zeros where that is empty."""
        if self.call.past:
            raise NotImplementedError(
                "the relevance of an answer (explain_compress mode='oracle') is known for the first turn only: give the whole "
                "conversation as one prompt"
            )
        if self.call.ready is not None:
            raise NotImplementedError(
                "the relevance of an answer (explain_compress mode='oracle') is known for causal masks only; this call has "
                "a ready-made one"
            )
        prompt, head = Prompt.of(self.given, self.valid), self.adapter.model.get_output_embeddings()
        answers = greedy_answers(self.model, head, prompt, most, ending_tokens(self.adapter.model))
        length = prompt.embeds.shape[1]
        if not any(answers):
            return torch.zeros(len(answers), length, device=prompt.embeds.device)
        found = answer_relevance(self.forms, head, prompt, answers, mode)[:, :, :length]
        counts = torch.tensor([max(len(answer), 1) for answer in answers])
        return (found.sum(1) / counts[:, None]).to(prompt.embeds.device)


def ending_tokens(model: Any) -> Sequence[int]:
    """Ids that end an answer of `model`."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
