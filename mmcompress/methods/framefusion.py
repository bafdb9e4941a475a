# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..budget import check_keep, check_mean
from ..ops.groups import of_cells
from ..ops.links import as_one, linked
from ..ops.ties import largest
from ..ops.trees import roots
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, LayerStage, Need, Recipe, Stage
from ..visuals import Visuals


@register("framefusion_merge")
@dataclass(frozen=True, repr=False)
class FrameFusionMerge(InputStage):
    """Merge each token of a video into the one at the same place of the frame before, the most alike first.

    The first step of `framefusion`: Fu et al., ICCV 2025, arXiv 2501.01986. Runs of tokens that are merged become the plain mean of
    all, at the earliest. A token with nothing before it, as all of a picture, comes last: it goes to its neighbour in raster order.
    Cost N D and a sort. Departs from the reference in that the number is given, not a threshold of the cosine.
    """

    keep: float | int = 0.5
    paper: ClassVar[str] = "arXiv 2501.01986"
    merging: ClassVar[bool] = True
    positions: ClassVar[str] = "keep"

    def select(self, visuals: Visuals) -> Selection:
        return merged(visuals)


@torch.no_grad()
def merged(visuals: Visuals) -> Selection:
    """The k tokens that are left when the others have gone into those before them."""
    before = visuals.layout.before()
    places = roots(before[None], len(visuals.layout.views))[0]
    parent, cosine = linked(visuals.features.detach(), of_cells(places, visuals.slots, visuals.features))
    gone = largest(cosine, torch.full_like(parent[:, :1], visuals.n - visuals.k))
    return Selection.into(~gone, visuals.k, *as_one(parent, gone))


def needed(merged: Sequence[float], keep: float, layers: int) -> float:
    """What part of the tokens that are left must go now, for a mean of `keep` over `layers`, behind steps that merged these
    parts, one before each layer so far."""
    left, used = 1.0, 0.0
    for part in merged:
        left *= 1 - part
        used += left
    return max(0.0, 1 - (layers * keep - used) / ((layers - len(merged)) * left))


@register("framefusion_layers")
@dataclass(frozen=True, repr=False)
class FrameFusionLayers(LayerStage):
    """Merge once more before the first LLM layers, then prune by attention to what the budget leaves.

    The steps of `framefusion` in the language model: Fu et al., ICCV 2025, arXiv 2501.01986. Before layer 1, 2, ... the parts
    `merged` go into the tokens at the same place before them; before the next layer the visual tokens stay that the last prompt
    token attended to most, as many as make `keep` the mean over all layers of those that enter the language model. Nothing is
    merged beyond what that needs. Cost N D for each step.

    Departs from the reference in that parts are given, where its thresholds decide how often and how much is merged; and in that a
    step comes behind the MLP of a layer, not before it.
    """

    keep: float | int = 0.6
    merged: tuple[float, ...] = (0.1,)
    paper: ClassVar[str] = "arXiv 2501.01986"
    merging: ClassVar[bool] = True
    lays: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("last_attention",)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_parts(self.merged)

    def cuts(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, len(self.merged) + 2))

    def budgets(self, tokens: int, depth: int) -> tuple[int, ...]:
        keep = self.keep if isinstance(self.keep, float) else min(1.0, self.keep / max(1, tokens))
        check_mean(self.keep, (1,), depth, tokens)
        parts, left, counts = [0.0], 1.0, list[int]()
        for part in (*self.merged, 1.0):
            parts.append(min(part, needed(parts, keep, depth)))
            left *= 1 - parts[-1]
            counts.append(min(tokens, max(1, round(left * tokens))))
        return tuple(counts)

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        if visuals.cut < len(self.merged):
            return merged(visuals)
        return Selection.top(visuals["last_attention"], visuals.k)


def check_parts(parts: tuple[float, ...]) -> None:
    """Raise unless these are parts of tokens that can be merged, one after the other."""
    if not isinstance(parts, tuple) or not all(type(part) is float and 0 <= part < 1 for part in parts):
        raise ValueError(
            f"merged={parts!r}: give the part that each step merges, floats from 0 to below 1 as a tuple, (0.5, 0.1)"
        )


@register("framefusion")
@dataclass(frozen=True, repr=False)
class FrameFusion(Recipe):
    """Merge tokens into those at the same place before them, in steps from the input on, then prune by attention to a budget.

    Fu et al., "FrameFusion: Combining Similarity and Importance for Video Token Reduction on Large Vision Language Models",
    ICCV 2025, arXiv 2501.01986. Stands for framefusion_merge >> framefusion_layers, where costs and deviations are described.
    `keep` is the mean over all layers, the "cost" of the paper; the first of the parts `merged` goes before the language model,
    each other one before its next layer; where the first alone reaches `keep`, nothing more is dropped.
    """

    keep: float = 0.3
    merged: tuple[float, ...] = (0.5, 0.1)
    paper: ClassVar[str] = "arXiv 2501.01986"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_parts(self.merged)
        if not isinstance(self.keep, float) or not self.merged:
            raise ValueError(
                f"{self!r}: give keep as a ratio, the mean over all layers, and one part to merge at least"
            )

    def expand(self) -> tuple[Stage, ...]:
        first = 1 - min(self.merged[0], 1 - self.keep)
        return (FrameFusionMerge(first), FrameFusionLayers(min(1.0, self.keep / first), self.merged[1:]))
