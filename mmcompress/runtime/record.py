# SPDX-License-Identifier: Apache-2.0
"""What the engine writes down about a call; `mmcompress.trace` turns it into reports."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..selection import Selection
from ..visuals import Layout
from .cache import Held
from .packing import Array, Group


@dataclass(frozen=True, eq=False)
class Decision:
    """What one stage before the LLM decided for a batch of U visuals of N cells: its plan string; what stood for the cells before
    and after it; and by which scores of the tokens it saw, [U, n], if it says so."""

    stage: str
    before: Selection
    after: Selection
    scores: Tensor | None = None


@dataclass
class Span:
    """One visual in one row of the batch.

    row        row of the batch.
    index      number of the visual in encoding order (rows that `generate` repeated share it).
    places     of its patch tokens in the sequence, [N]; as a tensor on the host `patches`.
    kept       number of tokens that enter the LLM.
    apart      places of its tokens that are no patches (newlines); `structural`.
    words      places of the instruction: the text after the last visual of the row (all text if there is none); empty if no
               stage reads it; `text`.
    selection  the decision before the LLM for the batch of visuals that this one was in, and its row there.
    decisions  those of the stages that made it, in order.
    """

    row: int
    index: int
    modality: str
    layout: Layout
    places: Array
    kept: int
    apart: Array
    words: Array
    selection: Selection | None = None
    selection_row: int = 0
    decisions: list[Decision] = field(default_factory=list, repr=False)

    @functools.cached_property
    def patches(self) -> Tensor:
        return torch.from_numpy(self.places)

    @functools.cached_property
    def structural(self) -> Tensor:
        return torch.from_numpy(self.apart)

    @functools.cached_property
    def text(self) -> Tensor:
        return torch.from_numpy(self.words)

    def entering(self, group: Group) -> Tensor:
        """Which patches of this visual the layers of `group` see: their numbers, ascending, [k] on the host."""
        if group.source is None:
            return torch.arange(len(self.patches))
        source = group.source[self.row].cpu()
        if group.valid is not None:
            source = source[group.valid[self.row].cpu()]
        return torch.isin(self.patches, source).nonzero()[:, 0]


@dataclass
class CallRecord:
    """One forward pass with visuals. `groups[i]` holds from layer `groups[i].start` on; `seconds` by part; `merged`: how
    many tokens each block of the vision encoder merged away, None without an encoder stage; `before`: of each layer, how many
    tokens its cache held and how many the caller had fed, empty if none; `held`: bytes of the cache behind the call."""

    batch: int
    length: int
    counts: list[int]
    spans: list[Span] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    signals: dict[str, str] = field(default_factory=dict)
    merged: list[int] | None = None
    before: list[tuple[int, int]] = field(default_factory=list)
    held: Held = field(default_factory=Held)
