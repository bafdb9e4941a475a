# SPDX-License-Identifier: Apache-2.0
"""A session: one prompt, one answer, and what was seen on the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import TypedDict, Unpack

from ..adapters import adapter_for
from ..api import _ATTRIBUTE, _stock, compressed, trace
from ..runtime.adapter import Adapter
from ..runtime.cache import CACHE, cache_of
from ..runtime.engine import Engine
from ..runtime.packing import Group
from ..trace import Trace, VisualTrace
from .cells import rows_in_layer, slots_of
from .measured import measured
from .prompt import Prompt, make_prompt, of_the_whole_picture, ready
from .result import Explanation, Seen, Token, Word
from .words import group_words, surface_names, token_texts, word_text

NOTHING = "uniform(keep=1.0)"
"""A plan that drops nothing: a stock model runs under it for its layouts and its trace, bit for bit as without."""


class Asked(TypedDict, total=False):
    """What every explanation can be told; `token_activation_map` says what it means."""

    video: bool
    inputs: Mapping[str, Any] | None
    answer: str | Sequence[int] | None
    max_new_tokens: int


class Tap(Protocol):
    """Listens while a session runs."""

    def install(self, adapter: Adapter) -> list[RemovableHandle]: ...


class Session:
    """Runs one prompt on a model and lays values of its tokens on the cells of its pictures.

    answer  token ids, without those that end it; None until the model has answered.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        engine: Engine | None,
        processor: Any,
        prompt: Prompt,
        answer: list[int] | None,
        new: int,
    ) -> None:
        self.model, self.adapter, self.engine, self.processor, self.prompt = model, adapter, engine, processor, prompt
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.answer, self.new = answer, new
        self.trace: Trace | None = None

    # ------------------------------------------------------------------ running
    def run(self, *taps: Tap) -> None:
        """Let the model answer greedily, or read the answer if there is one, while `taps` listen."""
        handles = [handle for tap in taps for handle in tap.install(self.adapter)]
        try:
            if self.answer is None:
                with torch.no_grad():
                    self._generate()
            else:
                self._read()
        finally:
            for handle in handles:
                handle.remove()
        if not self.answer:
            raise ValueError(
                "the model's answer is empty, so there is nothing to explain: ask another question, or give answer="
            )
        self.trace = trace(self.adapter.model)

    def _generate(self) -> None:
        length = len(self.prompt.ids)
        context = getattr(self.adapter.language_model.config, "max_position_embeddings", None)
        new = self.new if context is None else min(self.new, context - length)
        out = self.model.generate(
            **self.prompt.inputs, max_new_tokens=new, do_sample=False, num_beams=1, num_return_sequences=1, use_cache=True,
            return_dict_in_generate=False,
        )  # fmt: skip
        self.answer = self._unended(out[0, length:].tolist())

    def _unended(self, ids: list[int]) -> list[int]:
        ends = self.adapter.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        while ids and ids[-1] in ends:
            ids.pop()
        return ids

    def _read(self) -> None:
        """The prompt, then the answer but its last token in one call behind it, as decode steps would read it."""
        assert self.answer is not None
        self.answer = self._unended(list(self.answer))
        context = getattr(self.adapter.language_model.config, "max_position_embeddings", None)
        if context is not None and len(self.prompt.ids) + len(self.answer) > context:
            raise ValueError(
                f"the prompt has {len(self.prompt.ids)} tokens and answer= {len(self.answer)}, and the context of the model "
                f"{context}: give a shorter answer"
            )
        out = self.adapter.base(**self.prompt.inputs, use_cache=True)
        if len(self.answer) < 2:
            return
        ids = torch.tensor([self.answer[:-1]], device=self.prompt.ids.device)
        # no mask: there is no padding, and Qwen models count positions of the whole mask
        self.adapter.base(input_ids=ids, use_cache=True, **{CACHE: cache_of(out)})

    # ------------------------------------------------------------------ what is where
    @property
    def text_places(self) -> list[int]:
        """Where each of the T tokens is read: question tokens at themselves, answer tokens where they were predicted."""
        assert self.answer is not None
        length = len(self.prompt.ids)
        return [*self.prompt.question, *range(length - 1, length - 1 + len(self.answer))]

    @property
    def text_ids(self) -> list[int]:
        """Ids of the T tokens."""
        assert self.answer is not None
        return [*self.prompt.ids[self.prompt.question].tolist(), *self.answer]

    @property
    def questions(self) -> int:
        """P, how many of them are the question's."""
        return len(self.prompt.question)

    @property
    def visuals(self) -> list[VisualTrace]:
        assert self.trace is not None
        return self.trace.visuals

    def rows(self, layer: int | None = None) -> list[Tensor]:
        """For each visual the place in the prompt of the token that stands for every cell in that layer (None: the last one), [N],
        -1 for none. Raises ValueError if there are none at all."""
        found = [rows_in_layer(visual, layer) for visual in self.visuals]
        if not any(bool((rows >= 0).any()) for rows in found):
            raise ValueError(
                f"{self.plan} leaves no visual token in the layer that is read: take an explanation that goes down to the inputs "
                f"(attention_rollout, gradient_relevance, grad_cam), or last_attention of an earlier layer"
            )
        return found

    def slots(self, places: Sequence[int], group: Group) -> Tensor:
        """Where among the tokens of a layer those are that stand at `places` in prompt and answer, [n]."""
        at, length = torch.tensor(places), len(self.prompt.ids)
        return torch.where(at < length, slots_of(at.clamp_max(length - 1), group), group.physical + at - length)

    @property
    def plan(self) -> str:
        return "" if self.engine is None else repr(self.engine.plan)

    # ------------------------------------------------------------------ result
    def explanation(
        self,
        method: str,
        options: dict[str, Any],
        maps: Tensor,
        relevance: Tensor,
        rows: Sequence[Tensor],
        likely: Sequence[tuple[float | None, tuple[tuple[int, float], ...]]] | None = None,
    ) -> Explanation:
        """maps [T, cells], relevance [T, T]; rows: as `rows` gave them; likely: probability of each token, and its candidates."""
        assert self.trace is not None
        ids, questions = self.text_ids, self.questions
        texts = [*token_texts(self.tokenizer, ids[:questions]), *token_texts(self.tokenizer, ids[questions:])]
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        tokens, words = [], []
        for i, (number, text) in enumerate(zip(ids, texts, strict=True)):
            probability, candidates = likely[i] if likely is not None else (None, ())
            named = tuple((token_texts(self.tokenizer, [c])[0], p) for c, p in candidates)
            tokens.append(
                Token(number, text, "question" if i < questions else "answer", number in special, probability, named)
            )
        for part, first, last in (("question", 0, questions), ("answer", questions, len(ids))):
            for group in group_words(texts[first:last]):
                word = tuple(first + i for i in group)
                words.append(Word(word_text(texts, word), word, part))
        valid = torch.cat([r >= 0 for r in rows])
        return Explanation(
            method, options, self.plan, tuple(tokens), tuple(words), maps.float().cpu().masked_fill(~valid, float("nan")),
            relevance.float().cpu(), self._seen(rows), self.trace, self.prompt.asked,
            measured(self.adapter.model, method, options, self.plan),
        )  # fmt: skip

    def names(self) -> list[object]:
        return surface_names(self.tokenizer, self.text_ids)

    def _seen(self, rows: Sequence[Tensor]) -> tuple[Seen, ...]:
        pictures = self.prompt.pictures
        if len(pictures) == 1 and len(self.visuals) == len(
            pictures[0]
        ):  # a video that the model takes for a row of pictures
            pictures = [(frame,) for frame in pictures[0]]
        found = []
        for i, (visual, places) in enumerate(zip(self.visuals, rows, strict=True)):
            shown = pictures[i] if i < len(pictures) else ()
            layout = visual.layout
            if self.adapter.model.config.model_type == "llava":
                layout = of_the_whole_picture(layout, self.processor, shown)
            found.append(Seen(visual.modality, layout, places >= 0, places == visual.span.patches, shown))
        return tuple(found)


@contextmanager
def session(
    model: Any,
    processor: Any,
    visuals: Any,
    question: str,
    **asked: Unpack[Asked],
) -> Iterator[Session]:
    """A session of the model with this prompt; arguments as in `token_activation_map`. Raises TypeError for any other."""
    if other := set(asked) - set(Asked.__annotations__):
        raise TypeError(f"no option {', '.join(sorted(other))}: there are {', '.join(Asked.__annotations__)}")
    video, inputs, answer = asked.get("video", False), asked.get("inputs"), asked.get("answer")
    stock = _stock(model)
    engine = stock.__dict__.get(_ATTRIBUTE)
    adapter = adapter_for(stock) if engine is None else getattr(engine, "adapter", None)
    if not isinstance(adapter, Adapter):
        raise NotImplementedError("answers are explained, and this model has no language model to answer with")
    if inputs is None:
        made, from_end, pictures = make_prompt(processor, visuals, question, video)
    else:
        if visuals is not None:
            raise ValueError("give pictures or inputs=, not both: inputs have the pictures in them")
        made, from_end, pictures = inputs, [], []
    tokenizer = getattr(processor, "tokenizer", processor)
    prompt = ready(adapter, tokenizer, made, from_end, pictures)
    if inputs is None:
        prompt = replace(prompt, asked=question.strip())
    if isinstance(answer, str):
        answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
    given = None if answer is None else [int(i) for i in answer]
    training = stock.training
    with ExitStack() as stack:
        if engine is None:
            stack.enter_context(compressed(stock, NOTHING))
        if training:
            stock.eval()
            stack.callback(stock.train)
        yield Session(model, adapter, engine, processor, prompt, given, asked.get("max_new_tokens", 64))
