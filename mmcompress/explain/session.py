# SPDX-License-Identifier: Apache-2.0
"""A session: one prompt, one answer, and what was seen on the way."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from typing_extensions import TypedDict, Unpack

from ..adapters import adapter_for
from ..api import _found, _stock, compress, traced, uncompress
from ..runtime.adapter import Adapter
from ..runtime.cache import CACHE, cache_of
from ..runtime.engine import Engine
from ..runtime.packing import Group
from ..runtime.record import CallRecord
from ..runtime.scope import current
from ..trace import Trace, VisualTrace
from .cells import rows_in_layer, slots_of
from .measured import measured
from .prompt import Prompt, make_prompt, of_the_whole_picture, ready
from .result import Explanation, Token, Word
from .seen import Seen
from .taps import here
from .words import group_words, surface_names, token_texts, word_text

NOTHING = "uniform(keep=1.0)"
"""A plan that drops nothing: a stock model runs under it for its layouts and its trace, bit for bit as without."""
_LOCK = threading.Lock()
_WATCHED: dict[int, Watched] = {}
"""By the engine of the model."""


class Asked(TypedDict, total=False):
    """What every explanation can be told; `token_activation_map` says what it means."""

    video: bool
    inputs: Mapping[str, Any] | None
    answer: str | Sequence[int] | None
    max_new_tokens: int


class Tap(Protocol):
    """Listens while a session runs."""

    def install(self, adapter: Adapter) -> list[RemovableHandle]: ...


@dataclass(eq=False)
class Watched:
    """A model that sessions look at.

    ours      whether they have put the engine on it, which drops nothing: it is a stock model.
    training  its modules that train otherwise.  sessions: how many there are now.
    """

    engine: Engine
    ours: bool
    training: list[Any]
    sessions: int = 0


@contextmanager
def watched(stock: Any) -> Iterator[Watched]:
    """A model for a session: it evaluates, and a stock one has an engine. The last session of all threads puts it back."""
    with _LOCK:
        engine = _found(stock)
        if engine is None:
            compress(stock, NOTHING)
        ours, engine = engine is None, engine or _found(stock)
        assert isinstance(engine, Engine)
        found = _WATCHED.get(id(engine))
        if found is None:
            found = _WATCHED[id(engine)] = Watched(engine, ours, [m for m in stock.modules() if m.training])
            stock.eval()
        found.sessions += 1
    try:
        yield found
    finally:
        with _LOCK:
            found.sessions -= 1
            if not found.sessions:
                del _WATCHED[id(engine)]
                for module in found.training:
                    module.training = True
                if found.ours and _found(stock) is engine:
                    uncompress(stock)


class Session:
    """Runs one prompt on a model and lays values of its tokens on the cells of its pictures.

    answer  token ids, without those that end it; None until the model has answered.
    trace   what the last run did. It is this session's own: other threads may run the model too.
    """

    def __init__(
        self,
        model: Any,
        adapter: Adapter,
        watched: Watched | None,
        processor: Any,
        prompt: Prompt,
        answer: list[int] | None,
        new: int,
    ) -> None:
        self.model, self.adapter, self.watched, self.processor, self.prompt = model, adapter, watched, processor, prompt
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.answer, self.new = answer, new
        self.record: CallRecord | None = None
        self.trace: Trace | None = None

    # ------------------------------------------------------------------ running
    def run(self, *taps: Tap) -> None:
        """Let the model answer greedily, or read the answer if there is one, while `taps` listen."""
        assert self.watched is not None
        self.record = None
        handles = [handle for tap in taps for handle in tap.install(self.adapter)]
        handles.append(self.adapter.language_model.register_forward_hook(here(self._note)))
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
        assert self.record is not None
        self.trace = traced(self.watched.engine, self.record)

    def _note(self, *_: Any) -> None:
        """Keep what the call decided about visuals, if it had any."""
        assert self.watched is not None
        call: Any = current(self.watched.engine)
        if call is not None and call.record is not None:
            self.record = call.record

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
        seen: list[Tensor | None] = []
        hook = here(lambda module, args, kwargs: seen.append(kwargs.get("position_ids")))
        handle = self.adapter.language_model.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)
        try:
            out = self.adapter.base(**self.prompt.inputs, use_cache=True)
        finally:
            handle.remove()
        if len(self.answer) < 2:
            return
        ids = torch.tensor([self.answer[:-1]], device=self.prompt.ids.device)
        more: dict[str, Any] = {CACHE: cache_of(out)}
        if (
            seen[0] is not None and seen[0].dim() == 3
        ):  # M-RoPE: the model would count on from whatever prompt it read last
            after = seen[0].max() + 1 + torch.arange(ids.shape[1], device=ids.device)
            more["position_ids"] = after.expand(len(seen[0]), 1, -1)
        # no mask: there is no padding, and Qwen models count positions of the whole mask
        self.adapter.base(input_ids=ids, use_cache=True, **more)

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
    def engine(self) -> Engine | None:
        """That of a compressed model."""
        return None if self.watched is None or self.watched.ours else self.watched.engine

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
        pictures, times = self.prompt.pictures, [self.prompt.times]
        row = len(pictures) == 1 and 1 < len(self.visuals) == len(pictures[0])
        if row:  # a video that the model takes for a row of pictures
            pictures, times = [(frame,) for frame in pictures[0]], [(time,) for time in self.prompt.times]
        found = []
        for i, (visual, places) in enumerate(zip(self.visuals, rows, strict=True)):
            shown = pictures[i] if i < len(pictures) else ()
            layout = visual.layout
            if self.adapter.model.config.model_type == "llava":
                layout = of_the_whole_picture(layout, self.processor, shown)
            when, frame = (times[i] if i < len(times) else ()), (i if row else None)
            kept = places == visual.span.patches
            found.append(Seen(visual.modality, layout, places >= 0, kept, shown, when, frame))
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
    adapter = adapter_for(stock)
    if not isinstance(adapter, Adapter):
        raise NotImplementedError("answers are explained, and this model has no language model to answer with")
    if inputs is None:
        made, from_end, pictures, times = make_prompt(processor, visuals, question, video)
    else:
        if visuals is not None:
            raise ValueError("give pictures or inputs=, not both: inputs have the pictures in them")
        made, from_end, pictures = inputs, [], []
    tokenizer = getattr(processor, "tokenizer", processor)
    prompt = ready(adapter, tokenizer, made, from_end, pictures)
    if inputs is None:
        prompt = replace(prompt, asked=question.strip(), times=times)
    if isinstance(answer, str):
        answer = tokenizer(answer, add_special_tokens=False)["input_ids"]
    given = None if answer is None else [int(i) for i in answer]
    with watched(stock) as found:
        yield Session(model, found.engine.adapter, found, processor, prompt, given, asked.get("max_new_tokens", 64))
