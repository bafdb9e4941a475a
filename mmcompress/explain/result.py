# SPDX-License-Identifier: Apache-2.0
"""What every explanation returns."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..trace import Trace
from .fates import steps
from .film import Film, films
from .measured import Measured
from .panes import Pane
from .seen import Seen


@dataclass(frozen=True)
class Token:
    """One token of question or answer. text: with the space before it. special: a marker, not text. probability: that the model
    gave it where it was predicted (None for question tokens). candidates: the likeliest next tokens where it is read, and the
    softmax over just these."""

    id: int
    text: str
    part: str
    special: bool = False
    probability: float | None = None
    candidates: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Word:
    """A word of question or answer (`part`) and the numbers of its tokens."""

    text: str
    tokens: tuple[int, ...]
    part: str


@dataclass(frozen=True, eq=False)
class Explanation:
    """Maps of what in the pictures each token of question and answer has to do with. All tensors on the CPU.

    method, options  what made it.  plan: the compression of the model, "" for a stock one.
    tokens     those of the question, then those of the answer; words: of both, with the numbers of their tokens.
    maps       [tokens, cells] float32 from 0 to 1: the cells of all visuals one after the other. NaN at cells that are missing
               (their tokens were dropped), and in whole rows where a token was not explained.
    relevance  [tokens, tokens]: of the text read so far for each token, in the unit of its map; NaN where there is none.
    visuals    in the order of the maps.
    trace      what the call did: decisions, and tokens of every layer.
    asked      the question as it was given, "" where inputs came ready-made.
    measured   how faithful this explanation was measured to be on this model; None if it was not.
    """

    method: str
    options: dict[str, Any]
    plan: str
    tokens: tuple[Token, ...]
    words: tuple[Word, ...]
    maps: Tensor
    relevance: Tensor
    visuals: tuple[Seen, ...]
    trace: Trace
    asked: str = ""
    measured: Measured | None = None

    @property
    def question(self) -> str:
        """As it was asked; of ready-made inputs what their tokens say."""
        return self.asked or "".join(t.text for t in self.tokens if t.part == "question").strip()

    @property
    def answer(self) -> str:
        return "".join(t.text for t in self.tokens if t.part == "answer" and not t.special).strip()

    @property
    def answer_ids(self) -> list[int]:
        """For `answer=` of another explanation: the same words, to lay side by side."""
        return [t.id for t in self.tokens if t.part == "answer"]

    @property
    def row(self) -> int:
        """Row of the batch that this is about: explanations have one, a trace that is shown may have more."""
        return int(self.options.get("row", 0))

    @property
    def answer_words(self) -> list[int]:
        """Numbers of the answer's words."""
        return [i for i, word in enumerate(self.words) if word.part == "answer"]

    def find(self, text: str) -> list[int]:
        """Numbers of the words that are written so, those of the answer first; large and small letters are alike. Raises ValueError
        with the words that there are."""
        if found := self._numbers(text):
            return found
        there = {
            part: [w.text for w in self.words if w.part == part and w.text.strip()] for part in ("answer", "question")
        }
        known = "; ".join(
            f"words of the {part}: {', '.join(map(repr, words))}" for part, words in there.items() if words
        )
        raise ValueError(f"word={text!r} is not there ({known or 'there are no words'}): choose one of them")

    def has(self, text: str) -> bool:
        """Whether there is such a word."""
        return bool(self._numbers(text))

    def _numbers(self, text: str) -> list[int]:
        wanted = text.strip().casefold()
        order = sorted(range(len(self.words)), key=lambda i: self.words[i].part != "answer")
        return [i for i in order if self.words[i].text.strip().casefold() == wanted]

    @functools.cached_property
    def films(self) -> tuple[Film, ...]:
        """The videos, frame by frame: times, and what became of the tokens of each frame; () for pictures."""
        return films(self.visuals, steps(self.trace, self.row))

    def over_time(self, word: int | str, film: int = 0) -> Tensor:
        """The largest value of a word's map in each frame of a video, [frames] float32; NaN where nothing is known.

        word: its number, or as it is written. Raises ValueError for a word that is not there, and where there is no such video.
        """
        if not 0 <= film < len(self.films):
            there = (
                f"there are {len(self.films)}"
                if self.films
                else "nothing here has frames; give a video with video=True"
            )
            raise ValueError(f"film={film}: {there}")
        number = self.find(word)[0] if isinstance(word, str) else word
        values = self.maps[list(self.words[number].tokens)]
        return self.films[film].most(values.nan_to_num(-1.0).amax(0).where(~values.isnan().all(0), float("nan")))

    @property
    def layers(self) -> list[int]:
        """How many tokens entered each layer of the language model, text included."""
        return self.trace.tokens_per_layer(0)

    @property
    def coverage(self) -> float:
        """Part of all cells that something is known about: name it beside every score."""
        return torch.cat([seen.valid for seen in self.visuals]).float().mean().item()

    def explained(self, token: int) -> bool:
        return not bool(self.maps[token].isnan().all())

    def token_map(self, token: int | Sequence[int], visual: int = 0) -> Tensor:
        """Map of one token, or the largest value of several, on the cells of a visual: [N] float32, NaN where missing."""
        first = sum(len(seen.valid) for seen in self.visuals[:visual])
        values = self.maps[token, first : first + len(self.visuals[visual].valid)]
        return (
            values
            if values.dim() == 1
            else values.nan_to_num(float("-inf")).amax(0).where(~values.isnan().all(0), float("nan"))
        )

    def word_map(self, word: int, visual: int = 0) -> Tensor:
        """Map of a word: the largest value of its tokens in every cell of a visual, [N]."""
        return self.token_map(list(self.words[word].tokens), visual)

    def grids(self, values: Tensor, visual: int = 0) -> list[tuple[Pane, Tensor]]:
        """Values [N] of a visual's cells as they lie: each pane with its grid [rows, columns]. For pictures."""
        return [(pane, values[pane.cells]) for pane in self.visuals[visual].panes]

    def fused(self, values: Tensor, visual: int = 0, frame: int = 0) -> tuple[Pane, Tensor]:
        """Values [N] as one grid on the picture: a thumbnail is brought to the grid of the tiles, and the two are averaged where
        both are there. For a video the grid of one frame."""
        found = [(p, v) for p, v in self.grids(values, visual) if p.role != "frame" or p.frame == frame]
        thumbnails = [(p, v) for p, v in found if p.role == "thumbnail"]
        others = [(p, v) for p, v in found if p.role != "thumbnail"]
        if not others or not thumbnails:
            return (others or thumbnails)[0]
        (pane, grid), (small, view) = others[0], thumbnails[0]
        (rows, columns), (left, top, right, bottom) = pane.grid, pane.box
        inside = Pane(
            small.cells,
            (
                (-left) / (right - left),
                (-top) / (bottom - top),
                (1 - left) / (right - left),
                (1 - top) / (bottom - top),
            ),
        )
        both = torch.stack([grid.float(), inside.on_picture(view, (rows, columns))])
        return pane, both.nanmean(0)

    def on_picture(self, values: Tensor, size: tuple[int, int], visual: int = 0, frame: int = 0) -> Tensor:
        """Values [N] of a visual at the pixels of its picture, [height, width]; NaN where nothing is known."""
        pane, grid = self.fused(values, visual, frame)
        return pane.on_picture(grid, size)
