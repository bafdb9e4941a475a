# SPDX-License-Identifier: Apache-2.0
"""The way of visuals through the stages before a language model, whichever engine runs that."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..selection import Selection, gather
from ..stage import InputStage
from ..visuals import Visuals
from .cuts import choose
from .packing import sent
from .record import Decision


class Passage:
    """U visuals of one layout on their way through stages.

    visuals    what the next stage sees. levels: DeepStack levels [U, n, levels * H], merged like the tokens; None: none.
    total      what was decided so far, of the N tokens in the beginning; sizes [U, n]: how many of these each token stands for.
    decisions  stage by stage. remade: whether a stage made tokens anew. scores [U, n]: of the last stage, if they were asked for.
    """

    def __init__(self, visuals: Visuals, levels: Tensor | None = None) -> None:
        self._visuals, self._levels = visuals, levels
        many, self.tokens, device = len(visuals.features), visuals.n, visuals.features.device
        self.total = Selection(sent(np.tile(np.arange(self.tokens), (many, 1)), device))
        self.decisions: list[Decision] = []
        self.remade = False
        self.scores: Tensor | None = None
        self._chosen: list[Selection] = []
        self._shown = 0

    @property
    def visuals(self) -> Visuals:
        """Made when it is asked for: the tokens that only stay are not gathered for nobody."""
        for chosen in self._chosen[self._shown :]:
            self._visuals = self._visuals.take(chosen)
        self._shown = len(self._chosen)
        return self._visuals

    @property
    def features(self) -> Tensor:
        """The tokens alone, [U, n, D]: what else a stage would see is not gathered."""
        x, chosen = self._visuals.features, self._chosen[self._shown :]
        return functools.reduce(lambda x, one: one.rows if one.rows is not None else one.apply(x), chosen, x)

    @property
    def levels(self) -> Tensor | None:
        if self._levels is None:
            return None
        return functools.reduce(lambda x, chosen: chosen.apply(x), self._chosen, self._levels)

    @property
    def sizes(self) -> Tensor:
        one = torch.ones(len(self.total.keep), self.tokens, device=self.total.keep.device)
        return functools.reduce(lambda sizes, chosen: chosen.sizes(sizes), self._chosen, one)

    def follow(self, chosen: Selection, by: str) -> None:
        """Go on with the output tokens of `chosen`, which `by` decided."""
        before = self.total
        self.total = before.then(chosen, self.tokens) if self._chosen else Selection(chosen.keep, chosen.assign)
        scores = None if chosen.scores is None else chosen.scores.detach()
        self.decisions.append(Decision(by, before, self.total, scores))
        self._chosen.append(chosen)

    def through(self, stages: Sequence[InputStage], scored: bool = False) -> None:
        """Through `stages`, without those that would keep every token; `scored`: a later stage reads the scores of the last one."""
        for stage in stages:
            k = stage.budget(self.total.k)
            read = scored and stage is stages[-1]
            if k == self.total.k and not read:
                continue
            chosen = choose(stage, replace(self.visuals, k=k))
            if read:
                if chosen.scores is None:
                    raise NotImplementedError(f"{stage!r} gives no scores, which a later stage of the plan reads")
                self.scores = gather(chosen.scores.float(), chosen.keep)
            self.follow(chosen, repr(stage))
            self.remade = self.remade or chosen.merges
