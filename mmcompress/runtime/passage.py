# SPDX-License-Identifier: Apache-2.0
"""The way of visuals through the stages before a language model, whichever engine runs that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..selection import Selection, gather
from ..stage import InputStage
from ..visuals import Visuals
from .cuts import choose
from .record import Decision


class Passage:
    """U visuals of one layout on their way through stages.

    visuals    what the next stage sees. levels: DeepStack levels [U, n, H] by layer, merged like the tokens.
    total      what was decided so far, of the N tokens in the beginning; sizes [U, n]: how many of these each token stands for.
    decisions  stage by stage. remade: whether a stage made tokens anew. scores [U, n]: of the last stage, if they were asked for.
    """

    def __init__(self, visuals: Visuals, levels: dict[int, Tensor]) -> None:
        self.visuals, self.levels = visuals, levels
        many, self.tokens, device = len(visuals.features), visuals.n, visuals.features.device
        self.total = Selection(torch.arange(self.tokens, device=device).expand(many, -1))
        self.sizes = torch.ones(many, self.tokens, device=device)
        self.decisions: list[Decision] = []
        self.remade = False
        self.scores: Tensor | None = None

    def follow(self, chosen: Selection, by: str) -> None:
        """Go on with the output tokens of `chosen`, which `by` decided."""
        before, self.total = self.total, self.total.then(chosen, self.tokens)
        self.sizes = chosen.sizes(self.sizes)
        scores = None if chosen.scores is None else chosen.scores.detach()
        self.decisions.append(Decision(by, before, self.total, scores))
        self.visuals = self.visuals.take(chosen)
        self.levels = {i: chosen.apply(level) for i, level in self.levels.items()}

    def through(self, stages: Sequence[InputStage], scored: bool = False) -> None:
        """Through `stages`, without those that would keep every token; `scored`: a later stage reads the scores of the last one."""
        for stage in stages:
            k = stage.budget(self.visuals.n)
            read = scored and stage is stages[-1]
            if k == self.visuals.n and not read:
                continue
            chosen = choose(stage, replace(self.visuals, k=k))
            if read:
                if chosen.scores is None:
                    raise NotImplementedError(f"{stage!r} gives no scores, which a later stage of the plan reads")
                self.scores = gather(chosen.scores.float(), chosen.keep)
            self.follow(chosen, repr(stage))
            self.remade = self.remade or chosen.merges
