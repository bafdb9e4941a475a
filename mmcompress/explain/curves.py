# SPDX-License-Identifier: Apache-2.0
"""Insertion and deletion curves: what becomes of an answer when the cells that a map points at are taken away or given back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from .result import Explanation
from .session import session
from .taps import StatesTap, VocabularyHead

BASELINES = ("mean", "blur")


@dataclass(frozen=True)
class Curves:
    """parts: of the picture's cells that were changed, from 0 to 1. deletion, insertion: mean probability of the word's tokens when
    so many of the best cells are hidden, and when only they are shown."""

    parts: list[float]
    deletion: list[float]
    insertion: list[float]

    @property
    def deletion_area(self) -> float:
        """Area under the curve; small for a faithful map."""
        return float(np.trapezoid(self.deletion, self.parts))

    @property
    def insertion_area(self) -> float:
        """Large for a faithful map."""
        return float(np.trapezoid(self.insertion, self.parts))


def insertion_deletion(
    model: Any,
    processor: Any,
    visuals: Any,
    question: str,
    explanation: Explanation,
    word: int | None = None,
    *,
    visual: int = 0,
    steps: int = 10,
    baseline: str = "mean",
) -> Curves:
    """Hide (and show) the cells of a picture in the order of a word's map and read the probability of the word's tokens each time.

    Petsiuk et al., "RISE", BMVC 2018, arXiv 1806.07421. word: number of an answer word, None for the whole answer (mean of its
    tokens' maps and probabilities). baseline: what hidden cells show, the picture's "mean" colour or a "blur" of it. Missing cells
    come last, in raster order. The answer is read, not generated. Cost: 2 * (steps + 1) prefills. Images only.
    """
    if baseline not in BASELINES:
        raise ValueError(f"baseline={baseline!r}: choose one of {', '.join(BASELINES)}")
    if steps < 1:
        raise ValueError(f"steps={steps}: a curve has at least one step")
    seen = explanation.visuals[visual]
    if not seen.pictures or seen.modality != "image" or len(seen.pictures) != 1:
        raise NotImplementedError(
            "insertion and deletion need the picture itself: explain images, not a video or ready-made inputs"
        )
    answers = [i for i, token in enumerate(explanation.tokens) if token.part == "answer"]
    tokens = answers if word is None else list(explanation.words[word].tokens)
    if not set(tokens) <= set(answers):
        raise ValueError(f"word {word} is one of the question: choose one of {explanation.answer_words}")
    picture = seen.pictures[0]
    order = torch.argsort(_ranking(explanation, tokens, visual).flatten(), descending=True, stable=True)
    pane = explanation.fused(explanation.token_map(tokens[0], visual), visual)[0]
    rank = torch.empty(len(order)).scatter(0, order, torch.arange(len(order)).float()).view(pane.grid)
    place = pane.on_picture(rank, (picture.height, picture.width), smooth=False).nan_to_num(float("inf")).numpy()
    plain = np.asarray(picture)
    hidden = _hidden(picture, baseline)
    parts = [i / steps for i in range(steps + 1)]
    probabilities: dict[bool, list[float]] = {True: [], False: []}
    chosen = [t - answers[0] for t in tokens]
    for delete in (True, False):
        for part in parts:
            best = (place < part * len(order))[..., None]
            shown = np.where(best == delete, hidden, plain)
            pictures = [s.pictures[0] for s in explanation.visuals]
            pictures[visual] = Image.fromarray(shown.astype(np.uint8))
            found = answer_probabilities(model, processor, pictures, question, explanation.answer_ids)
            probabilities[delete].append(sum(found[t] for t in chosen) / len(chosen))
    return Curves(parts, probabilities[True], probabilities[False])


def _ranking(explanation: Explanation, tokens: Sequence[int], visual: int) -> Tensor:
    """What cells are ordered by, [rows, columns]: the mean of the tokens' maps, below 0 where cells are missing."""
    maps = torch.stack([explanation.token_map(t, visual) for t in tokens])
    return explanation.fused(maps.mean(0), visual)[1].nan_to_num(-1.0)


def _hidden(picture: Image.Image, baseline: str) -> np.ndarray:
    if baseline == "blur":
        return np.asarray(picture.filter(ImageFilter.GaussianBlur(max(picture.size) / 16)))
    plain = np.asarray(picture, dtype=np.float64)
    return np.broadcast_to(plain.mean((0, 1)).round(), plain.shape)


@torch.no_grad()
def answer_probabilities(
    model: Any, processor: Any, visuals: Any, question: str, answer: str | Sequence[int]
) -> list[float]:
    """Probability of each token of an answer that is read behind the prompt. One prefill."""
    with session(model, processor, visuals, question, answer=answer) as s:
        tap = StatesTap()
        s.run(tap)
        assert s.answer is not None
        places = s.text_places[s.questions :]
        likely = VocabularyHead(s.adapter.model).likely(tap.states()[places], s.answer, 1)
        return [p for p, _ in likely if p is not None]
