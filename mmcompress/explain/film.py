# SPDX-License-Identifier: Apache-2.0
"""Videos over time: what became of the tokens of each frame, and what a map says of it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fates import DROPPED, KEPT, MERGED, Step
from .seen import Seen


@dataclass(frozen=True, eq=False)
class Film:
    """A video, frame by frame as the model reads it: where an encoder takes several pictures at a time, these are one frame.

    name    what it is called among the visuals of the prompt, such as "video 1".
    places  of each frame: number of its visual, and of the frame in it.
    cells   of each frame: numbers of its cells among those of all visuals, [n] int64.
    times   when the (first) picture of each is shown, in seconds from the start of the video; None if nothing says so.
    steps   what the stages of the plan decided, in order; the first is before any.
    """

    name: str
    places: tuple[tuple[int, int], ...]
    cells: tuple[Tensor, ...]
    times: tuple[float, ...] | None
    steps: tuple[Step, ...]

    def __len__(self) -> int:
        return len(self.cells)

    @functools.cached_property
    def fates(self) -> Tensor:
        """How many cells of each frame are kept, merged and dropped behind each stage, [stages, frames, 3] int64."""
        kinds = (KEPT, MERGED, DROPPED)
        found = [[[int((s.fate[c] == k).sum()) for k in kinds] for c in self.cells] for s in self.steps]
        return torch.tensor(found)

    @property
    def tokens(self) -> Tensor:
        """How many tokens of each frame are left behind each stage, [stages, frames] int64. Merged ones count where they stand."""
        return self.fates[..., KEPT]

    def most(self, values: Tensor) -> Tensor:
        """The largest of the values [cells of all visuals] in each frame, [frames]; NaN where there is none."""
        found = torch.stack([values[cells].nan_to_num(float("-inf")).max() for cells in self.cells])
        return found.masked_fill(found == float("-inf"), float("nan"))

    def label(self, frame: int) -> str:
        """What a frame is called: its time, or its number."""
        return f"{self.times[frame]:.2f} s" if self.times else f"frame {frame}"

    def milliseconds(self, alike: int = 500) -> list[int]:
        """How long each frame is shown in an animation: as in the video, within what an eye can follow; all alike without times."""
        if self.times is None or len(self) < 2:
            return [alike] * len(self)
        steps = [b - a for a, b in itertools.pairwise(self.times)]
        return [round(1000 * min(max(step, 0.12), 2.0)) for step in [*steps, steps[-1]]]


def films(visuals: Sequence[Seen], decided: Sequence[Step]) -> tuple[Film, ...]:
    """The videos of a prompt: visuals with frames, and rows of pictures that are one video."""
    found, first = [], 0
    row: list[tuple[int, int, Tensor, float | None]] = []  # of a video as a row of pictures

    def add(name: str, frames: Sequence[tuple[int, int, Tensor, float | None]]) -> None:
        visual, number, cells, times = zip(*frames, strict=True)
        known = None if None in times else times
        found.append(Film(name, tuple(zip(visual, number, strict=True)), cells, known, tuple(decided)))

    for i, seen in enumerate(visuals):
        if row and not seen.frame:
            add("video", row)
            row = []
        own = [pane for pane in seen.panes if pane.role == "frame"]
        if seen.frame is not None:
            cells = first + torch.arange(len(seen.valid))
            row.append((i, 0, cells, seen.times[0] if seen.times else None))
        elif own:
            add(f"{seen.modality} {i + 1}", [(i, p.frame, (first + p.cells).flatten(), seen.seconds(p)) for p in own])
        first += len(seen.valid)
    if row:
        add("video", row)
    return tuple(found)
