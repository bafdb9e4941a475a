# SPDX-License-Identifier: Apache-2.0
"""What the answers of a batch owe to their visual tokens: explanations, and labels for a compressor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters import adapter_for
from ..api import _ATTRIBUTE, _stock, compressed, trace
from ..methods.explain_compress import ExplainCompress
from ..runtime.adapter import Adapter
from ..runtime.call import Call
from ..runtime.probe import Forms
from ..runtime.prompt import ending_tokens, first_heads, mean_text_attention
from ..runtime.record import Span
from ..runtime.relevance import MODES, Prompt, answer_relevance, check_relevance
from ..trace import Trace, VisualTrace
from . import prompt as prompts
from .result import Explanation
from .session import Session


@dataclass(frozen=True, eq=False)
class Owed:
    """One sample. answer: token ids, without those that end it. relevance [T, S + T - 1] float32 of every token of prompt and
    answer for each answer token ("fast": [1, ...]). spans: its visuals. attention: what a compressor reads of each visual, [N].
    """

    answer: tuple[int, ...]
    relevance: Tensor
    spans: tuple[Span, ...]
    attention: tuple[Tensor, ...]

    def of_visual(self, number: int) -> Tensor:
        """Mean over the answer's tokens, on the patch tokens of a visual: [N]."""
        return self.relevance[:, self.spans[number].patches].mean(0)


def owed(
    model: Any,
    inputs: Mapping[str, Any],
    answers: Sequence[Sequence[int]] | None = None,
    *,
    mode: str = "exact",
    max_new_tokens: int = 64,
) -> tuple[list[Owed | None], Trace]:
    """For each prompt of a batch, padded on the left or not at all, the relevance of its answer; None for an empty answer.

    answers: token ids; default: what the uncompressed model answers greedily. mode as in `runtime.relevance.answer_relevance`. A
    plan that the model has is left out meanwhile. Cost per batch: one generate, one forward pass, one backward pass per token
    of the longest answer. Raises NotImplementedError for attention that cannot be followed, ValueError for prompts without
    visuals or with padding on the right.
    """
    stock = _stock(model)
    adapter = adapter_for(stock)
    if not isinstance(adapter, Adapter):
        raise NotImplementedError("answers are explained, and this model has no language model to answer with")
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: choose one of {', '.join(MODES)}")
    forms = Forms(adapter.language_model, stock)
    check_relevance(forms)
    given: list[dict[str, Any]] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not given:
            given.append(dict(kwargs))

    inputs = _on_device(inputs, stock)
    length, mask = inputs["input_ids"].shape[1], inputs.get("attention_mask")
    valid = None if mask is None or bool(mask.bool().all()) else mask.bool()
    was_training = stock.training
    stock.eval()
    try:
        with compressed(stock, ExplainCompress(keep=1.0)):
            handle = adapter.language_model.register_forward_pre_hook(note, with_kwargs=True)
            try:
                with torch.no_grad():
                    if answers is None:
                        out = stock.generate(
                            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, num_return_sequences=1,
                            return_dict_in_generate=False,
                        )  # fmt: skip
                        answers = [row.tolist() for row in out[:, length:]]
                    else:
                        adapter.base(**inputs, use_cache=False)
            finally:
                handle.remove()
            if stock.__dict__[_ATTRIBUTE].last is None:
                raise ValueError(
                    "no image in the prompts: there are no visual tokens that an answer could owe anything to"
                )
            seen = trace(stock)
        ends = set(ending_tokens(stock))
        cut = [_until(answer, ends) for answer in answers]
        prompt = Prompt.of(given[0], valid)
        none: list[Owed | None] = [None] * len(cut)
        if not any(cut):
            return none, seen
        found = answer_relevance(forms, stock.get_output_embeddings(), prompt, cut, mode)
        attention = _first_attention(forms, prompt, seen)
    finally:
        stock.train(was_training)
    samples = none
    for row, answer in enumerate(cut):
        mine = [i for i, span in enumerate(seen.call.spans) if span.row == row]
        if answer and mine:
            values = found[row, : 1 if mode == "fast" else len(answer), : length + len(answer) - 1]
            spans, read = zip(*((seen.call.spans[i], attention[i]) for i in mine), strict=True)
            samples[row] = Owed(tuple(answer), values, spans, read)
    return samples, seen


def answer_relevances(
    model: Any,
    processor: Any,
    inputs: Mapping[str, Any],
    answers: Sequence[Sequence[int]] | None = None,
    *,
    mode: str = "exact",
    max_new_tokens: int = 64,
) -> list[Explanation | None]:
    """The explanations of a batch of prompts by the relevance that `explain_compress` learns from, None for an empty answer.

    The same relevance as `gradient_relevance`, for many samples at a time. Maps of all answer tokens of a sample share one scale,
    the option "scale": maps * scale is the relevance itself, and the mean of the maps what the compressor's label is made of;
    question tokens have none. mode="fast" is an approximation: one backward pass, and one map for all answer tokens. Arguments,
    cost and errors as in `owed`.
    """
    samples, seen = owed(model, inputs, answers, mode=mode, max_new_tokens=max_new_tokens)
    stock = _stock(model)
    adapter = adapter_for(stock)
    assert isinstance(adapter, Adapter)
    ids = inputs["input_ids"]
    found: list[Explanation | None] = []
    for row, sample in enumerate(samples):
        if sample is None:
            found.append(None)
            continue
        question = sample.spans[0].text.tolist()
        prompt = prompts.Prompt({"input_ids": ids[row : row + 1]}, question, [])
        s = _RowSession(stock, adapter, None, processor, prompt, list(sample.answer), max_new_tokens)
        s.trace, s.row = seen, row
        rows = s.rows(0)
        cells, values = torch.cat(list(rows)), sample.relevance.expand(len(sample.answer), -1)
        scale = float(values[:, cells].amax().clamp_min(torch.finfo(torch.float32).tiny))
        blank = torch.full((s.questions, values.shape[1]), float("nan"))
        values = torch.cat([blank, values / scale])
        order = torch.arange(len(values))
        before = order < order[:, None].clamp_min(s.questions)
        relevance = values[:, s.text_places].masked_fill(~before, float("nan"))
        options = {"mode": mode, "scale": scale}
        found.append(s.explanation("answer relevance", options, values[:, cells], relevance, rows))
    return found


class _RowSession(Session):
    """One row of a batch that has run."""

    row: int = 0

    @property
    def visuals(self) -> list[VisualTrace]:
        return [visual for visual in super().visuals if visual.row == self.row]


def _until(answer: Sequence[int], ends: set[int]) -> list[int]:
    """An answer up to what ends it."""
    last = next((i for i, token in enumerate(answer) if token in ends), len(answer))
    return list(answer[:last])


def _on_device(inputs: Mapping[str, Any], model: Any) -> dict[str, Any]:
    return {
        name: x.to(model.device, model.dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
        for name, x in dict(inputs).items()
    }


@torch.no_grad()
def _first_attention(forms: Forms, prompt: Prompt, seen: Trace) -> list[Tensor]:
    """What a compressor reads of each visual, [N]."""
    positions, device = prompt.positions, prompt.embeds.device
    if positions is None:
        positions = torch.arange(prompt.embeds.shape[1], device=device)[None]
    heads = first_heads(forms, prompt.embeds, positions, prompt.valid, Call(None, None, []))
    found = []
    for span in seen.call.spans:
        row = torch.tensor([[span.row]], device=device)
        at, text = span.patches[None].to(device), span.text[None].to(device)
        found.append(mean_text_attention(heads, row, at, text)[0].cpu())
    return found
