# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.frames import spend
from ..ops.groups import best_of_groups, group_sizes, group_sum, of_cells
from ..plan import register
from ..selection import Selection
from ..stage import LayerStage, Need, check_layer, layer_at
from ..visuals import Layout, Visuals
from .seats import keep_ratios


@register("seats_layers")
@dataclass(frozen=True, repr=False)
class SeatsLayers(LayerStage):
    """Three drops between layers by what the last token of the prompt attends to, spread over time; late, all visual tokens go.

    "SEATS: Stage-adaptive Token Selection for Omni-modal LLMs", arXiv 2605.20035, its stages in the language model, behind `seats`:
    `seats(keep=0.28) >> seats_layers` leaves about 20 % in the mean of all layers. The drops grow by e each and leave 93, 79 and
    30 % of what came to them (for 28 layers), so that the mean over layers is 1 / `scale` of what enters, in the reference's count.
    They come before the layers `drops`, and the end before the layer `gone` (None: nothing leaves for good): numbers, or parts of
    the depth; of several that fall on one layer of a shallow model the last one counts.

    A window is `frames` frames of a video, `tokens` tokens of a sound, or a picture. One token goes to each (if there are enough),
    the others by softmax of their mean attention at `temperature` (nearly even, as attention is small); the most attended stay.
    Nothing but text is left in the cache of late layers. Cost heads S d for the row of each drop.

    Departs from the reference in that earlier layers keep what they had; there they lose it, too.
    """

    drops: tuple[int | float, ...] = (17 / 28, 19 / 28, 21 / 28)
    gone: int | float | None = 24 / 28
    scale: float = 1.4
    frames: int = 2
    tokens: int = 50
    temperature: float = 0.1
    paper: ClassVar[str] = "arXiv 2605.20035"
    needs: ClassVar[tuple[Need, ...]] = ("last_attention",)
    lays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.drops, tuple) or not self.drops:
            raise ValueError(f"drops={self.drops!r}: give before which layers tokens are dropped, as a tuple")
        for layer in self.drops:
            check_layer(layer, "drops")
        if self.gone is not None:
            check_layer(self.gone, "gone")
        for name, value in (("frames", self.frames), ("tokens", self.tokens)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: give how many make a window, an int of at least 1")
        for name in ("scale", "temperature"):
            least = 1 if name == "scale" else 0
            if not getattr(self, name) > least:
                raise ValueError(f"{name}={getattr(self, name)!r}: give a number above {least}")

    def _plan(self, depth: int) -> dict[int, float]:
        """What part of what came to it each cut leaves, by the layer that it comes before."""
        at = [min(depth - 1, layer_at(where, depth)) for where in self.drops]
        end = depth if self.gone is None else min(depth - 1, layer_at(self.gone, depth))
        if sorted(at) != at or end < at[-1]:
            raise ValueError(f"{self!r}: of {depth} layers it cuts before {(*at, end)}: give layers that do not fall")
        ratios = keep_ratios(
            depth, [layer - 1 for layer in at], end - 1 if self.gone is not None else depth, self.scale
        )
        found: dict[int, float] = {}
        for layer, ratio in zip(at, ratios, strict=True):
            found[layer] = found.get(layer, 1.0) * ratio
        return found if self.gone is None else {**found, end: -1.0}

    def cuts(self, depth: int) -> tuple[int, ...]:
        return tuple(self._plan(depth))

    def budgets(self, tokens: int, depth: int) -> tuple[int, ...]:
        counts: list[int] = []
        for ratio in self._plan(depth).values():
            before = counts[-1] if counts else tokens
            counts.append(min(before, max(1, round(ratio * before))) if ratio >= 0 else 0)
        return tuple(counts)

    def windows(self, layout: Layout) -> list[int]:
        """Number of the window of each cell, ascending."""
        found: list[int] = []
        first = 0
        parts: Sequence[int] = layout.parts or (len(layout.views),)
        for count in parts:
            views, begin = layout.views[first : first + count], 1 + max(found, default=-1)
            first += count
            timed = {view.role for view in views} == {"frame"}
            for number, view in enumerate(views):
                heard = view.role == "audio"
                inside = number // self.frames if timed else 0
                found += [begin + (cell // self.tokens if heard else inside) for cell in range(view.cells)]
        return found

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        score, cells = visuals["last_attention"].float(), self.windows(visuals.layout)
        window, count = of_cells(torch.tensor(cells), visuals.slots, visuals.features), cells[-1] + 1
        window = window.expand(score.shape)
        room = group_sizes(window, count)
        mean = group_sum(score, window, count) / room.clamp_min(1)
        worth = (mean / self.temperature).masked_fill(room == 0, float("-inf")).softmax(1)
        share = spend(worth, room, visuals.k, least=int(visuals.k >= count))
        mask = best_of_groups(score, window, share)
        order = mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
        return Selection.of(order[:, : visuals.k], score)
