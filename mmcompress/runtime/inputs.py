# SPDX-License-Identifier: Apache-2.0
"""Stages before the language model: which slots of the prompt stay, and what is in them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..selection import Selection, gather
from ..stage import InputStage, Pipeline
from ..visuals import Visuals
from .adapter import Adapter
from .call import Call
from .clip import CLIP_TEXT, Clip
from .deepstack import Levels
from .needs import TEXT_SIGNALS
from .packing import sent
from .passage import Passage
from .prompt import PROMPT_SIGNALS, PromptTap
from .record import Span
from .signals import kind_of


@dataclass
class Prompt:
    """What the stages change, over all rows of the call.

    places  [B, S] the slot whose place in the sequence a slot's token takes, -1 where none does.
    embeds  [B, S, H] what enters the LLM.
    levels  DeepStack levels, merged like the embeddings; where a method makes its tokens anew, those of the slots that they
            stand for. None: there are none.
    scores  [B, S] of the last stage, where a later one reads them.
    mass    [B, S] float32: how many tokens a slot's token stands for; None where the plan does not weigh them. mean: the mean of
            its visual.
    lead    the level that methods are shown on top of the embeddings, and which takes what they make of both; None: none.
    """

    places: Tensor
    embeds: Tensor
    levels: Levels | None
    scores: Tensor | None
    lead: int | None = None
    mass: Tensor | None = None
    mean: Tensor | None = None

    def shown(self, rows: Tensor, at: Tensor) -> Tensor:
        """What methods see of the tokens `at` [U, N] of the batch rows `rows` [U, 1]: [U, N, H]."""
        embeds = self.embeds[rows, at]
        if self.lead is None:
            return embeds
        assert self.levels is not None
        return embeds + self.levels.of(self.lead)[rows, at]


class InputStages:
    """Runs the clusters of encoder stages and the input stages of a plan on the visuals of a prompt."""

    def __init__(self, adapter: Adapter, plan: Pipeline, clip: Clip | None, signals: Collection[str]) -> None:
        """signals: the names of all that the stages read, substitutes in the place of what the family lacks."""
        self.adapter, self.plan, self.clip = adapter, plan, clip
        self.of_prompt = [name for name in signals if kind_of(name) in PROMPT_SIGNALS]
        self.of_clip = {*CLIP_TEXT}.intersection(signals)
        self.reads_text = bool(self.of_prompt or {*TEXT_SIGNALS, *CLIP_TEXT}.intersection(signals))

    def stages(self, modality: str) -> list[InputStage]:
        """The input stages that act on a modality."""
        return [stage for stage in self.plan.input_stages if modality in stage.modalities]

    def budget(self, call: Call, span: Span) -> int:
        """How many tokens of a visual enter the LLM: known before anything is computed."""
        tokens = span.layout.cells
        encoded, index = call.origin(span)
        if encoded.clusters is not None or encoded.chosen is not None:
            tokens = encoded.left[index]
        for stage in self.stages(span.modality):
            tokens = stage.budget(tokens)
        return tokens

    def select(self, call: Call, spans: list[Span], prompt: Prompt, tap: PromptTap | None) -> None:
        """Run everything on visuals of one layout, write it into `prompt`, and what was decided into the spans."""
        device = prompt.embeds.device
        rows = sent(np.array([[span.row] for span in spans]), device)
        at = sent(np.stack([span.places for span in spans]), device)
        origin = [call.origin(span) for span in spans]
        first, number = origin[0]
        signals = {
            name: torch.stack([encoded.signals[name][i] for encoded, i in origin]).to(device) for name in first.signals
        }
        signals |= self._of_text(call, spans, rows, at, prompt.embeds, tap)
        features, layout = prompt.shown(rows, at), spans[0].layout
        visuals = Visuals(features, layout, spans[0].kept, signals, road=self.adapter.project)
        passage = Passage(visuals, None if prompt.levels is None else prompt.levels.rows[rows, at])
        if first.clusters is not None:
            clusters = sent(torch.stack([e.clusters[i] for e, i in origin if e.clusters is not None]), device)
            early = (*self.plan.pixel_stages, *self.plan.encoder_stages)
            passage.follow(Selection.of_clusters(clusters, first.left[number]), " >> ".join(map(repr, early)))
        if first.chosen is not None:
            kept = torch.stack([e.chosen[i] for e, i in origin if e.chosen is not None])
            passage.follow(Selection(sent(kept, device)), repr(self.plan.pixel_stages[0]))
        passage.through(self.stages(spans[0].modality), prompt.scores is not None)
        total = passage.total
        for i, span in enumerate(spans):
            span.selection, span.selection_row, span.decisions = total, i, passage.decisions
        slots = gather(at, total.keep)
        at_slots = (rows, slots)
        prompt.places = prompt.places.index_put(at_slots, slots.sort(dim=1).values)
        if prompt.mass is not None:
            prompt.mass = prompt.mass.index_put(at_slots, passage.sizes)
        if prompt.mean is not None:
            prompt.mean = prompt.mean.index_put(at_slots, passage.sizes.mean(1, keepdim=True).expand_as(passage.sizes))
        if prompt.scores is not None and passage.scores is not None:
            prompt.scores = prompt.scores.index_put(at_slots, passage.scores)
        if passage.remade:
            rows_made, made = passage.levels, passage.features.to(prompt.embeds.dtype)
            if prompt.lead is None:
                prompt.embeds = prompt.embeds.index_put(at_slots, made)
            if prompt.levels is not None:
                assert rows_made is not None
                prompt.levels = prompt.levels.put(at_slots, rows_made)
                if prompt.lead is not None:
                    prompt.levels = prompt.levels.put(at_slots, made - prompt.embeds[at_slots], prompt.lead)

    def _of_text(
        self, call: Call, spans: list[Span], rows: Tensor, at: Tensor, embeds: Tensor, tap: PromptTap | None
    ) -> dict[str, Tensor]:
        """Signals of visuals at the slots `at` [V, N] of `rows` [V, 1] that depend on the text beside them."""
        signals: dict[str, Tensor] = {}
        if self.reads_text:
            text = sent(np.stack([span.words for span in spans]), embeds.device)
            signals["text_embeddings"] = embeds[rows, text]
            if tap is not None:
                signals |= {name: tap.signal(name, rows, at, text).to(embeds.device) for name in self.of_prompt}
        if self.clip is not None:
            signals |= self.clip.text(self.of_clip, call, spans, embeds.device)
        return signals
