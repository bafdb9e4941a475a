# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.crops import Crops, alike_crops
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Layout, View, Visuals


@register("hiprune")
@dataclass(frozen=True, repr=False)
class HiPrune(InputStage):
    """Keep the objects that a middle block of the encoder looks at, with their neighbours, and what a deep block looks at.

    Liu et al., "HiPrune: Training-Free Visual Token Pruning via Hierarchical Attention in Vision-Language Models", Findings of
    ACL 2026, arXiv 2508.00553. Both scores are the attention that a patch receives, mean over heads and all queries: in the
    block `object_layer` and in the one that the LLM reads. The round(`alpha` k / 5) best of the first are anchors; they stay
    with the patches above, below, left and right, and the best of the second fill up. `object_layer` is an index from 0, or the
    part of the depth: 0.35 is the 9th of 24 blocks, as in the paper; for Qwen2.5-VL it takes the 16th (15). Each crop
    (thumbnail, tile, video frame) is pruned alone, with a budget by its size; where an earlier stage has thinned the visual
    out, it is one crop, with the neighbours that are left. If anchors and neighbours are more than k, neighbours of the least
    deep attention go. Cost N log N beyond the signals.

    `clamp="drop"`: an anchor at the edge of its crop has fewer neighbours. `clamp="reference"`: as in the reference its
    neighbour beyond the left or right edge is the end of the row above or the start of the one below, and beyond the top or
    bottom it is the first or last patch.

    Departs from the reference: the budgets of crops add up to k (it rounds the same quota for all down), neighbours stay within
    their crop unless told otherwise, and prompts may have several images.
    """

    keep: float | int = 0.25
    alpha: float = 0.1
    object_layer: float | int = 0.35
    clamp: str = "drop"
    paper: ClassVar[str] = "arXiv 2508.00553"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}: give the part of k for anchors and neighbours, in [0, 1]")
        layer = self.object_layer
        if isinstance(layer, bool) or not isinstance(layer, (int, float)) or not (type(layer) is int or 0 <= layer < 1):
            raise ValueError(
                f"object_layer={layer!r}: give the index of a block of the vision encoder (an int, counted from 0, negative "
                "from the end), or its part of the depth (a float in [0, 1))"
            )
        if self.clamp not in ("drop", "reference"):
            raise ValueError(f"clamp={self.clamp!r}: choose 'drop' or 'reference' (neighbours across the edges)")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        layer = self.object_layer
        # never in the form 1e-05
        return (f"received_attention@{layer if isinstance(layer, int) else round(layer, 4)}", "received_attention")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        score = visuals["received_attention"].float()
        crops, keep = self._crops(visuals), []
        tier = self._tiers(visuals, self._anchors(visuals, crops))
        for part in crops:
            order = part.take(score).sort(dim=1, descending=True, stable=True).indices
            by_tier = part.take(tier).gather(1, order).sort(dim=1, descending=True, stable=True).indices
            keep.append(part.slots(order.gather(1, by_tier[:, : part.k])))
        return Selection.of(torch.cat(keep, 1), score)

    @torch.no_grad()
    def anchors(self, visuals: Visuals) -> Tensor:
        """Tokens of the anchors, [U, A], crop by crop, the best of each first."""
        return self._anchors(visuals, self._crops(visuals))

    def _anchors(self, visuals: Visuals, crops: list[Crops]) -> Tensor:
        score = visuals[str(self.needs[0])].float()
        found = [torch.empty_like(score[:, :0], dtype=torch.int64)]
        for part in crops:
            best = part.take(score).sort(dim=1, descending=True, stable=True).indices
            found.append(part.slots(best[:, : round(part.k * self.alpha / 5)]))
        return torch.cat(found, 1)

    def _crops(self, visuals: Visuals) -> list[Crops]:
        views = visuals.layout.views if visuals.slots is None else ()
        return alike_crops(views, visuals.n, visuals.k, visuals.features.device)

    def _tiers(self, visuals: Visuals, tokens: Tensor) -> Tensor:
        """2 for the anchors `tokens` [U, A], 1 for their neighbours, 0 for the rest, [U, N] uint8."""
        slots = visuals.slots
        cells = tokens if slots is None else slots.to(tokens.device).gather(1, tokens)
        near = _neighbours(visuals.layout, self.clamp == "reference")
        near = near.to(cells.device, non_blocking=True)[cells].flatten(1)  # a copy that the host need not wait for
        tier = torch.zeros(len(cells), visuals.layout.cells, dtype=torch.uint8, device=cells.device)
        tier = tier.scatter(1, near, 1).scatter(1, cells, 2)
        return tier if slots is None else tier.gather(1, slots.to(tier.device))


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _neighbours(layout: Layout, across: bool) -> Tensor:
    """The cells left, right, above and below of every cell of a layout, [cells, 4] on the CPU: beyond an edge of its crop the cell
    itself, or what `clamp="reference"` takes (`across`)."""
    parts, start = [], 0
    for view in layout.views:
        parts.append(_places_in(view, start))
        start += view.cells
    first, columns, width, size = torch.cat(parts, 1)
    place = torch.arange(start) - first
    inside = place // columns * width + place % columns
    x, found = inside % width, []
    for step, there in ((-1, x > 0), (1, x < width - 1), (-width, inside >= width), (width, inside < size - width)):
        near = (inside + step).clamp_min(0).minimum(size - 1)
        near = near if across else torch.where(there, near, inside)
        found.append(first + near // width * columns + near % width)
    return torch.stack(found, 1)


def _places_in(view: View, start: int) -> Tensor:
    """For every cell of a view: the first cell of its crop, the columns of the view, and the width and number of cells of its
    crop, [4, cells]."""
    begins, lengths = [], []
    for cells, seams in zip(view.grid, view.seams, strict=True):
        band = torch.bucketize(torch.arange(cells) + 0.5, torch.tensor(seams))
        length = torch.bincount(band, minlength=len(seams) + 1)
        begins.append((length.cumsum(0) - length)[band])
        lengths.append(length[band])
    (top, left), (height, width), columns = begins, lengths, view.grid[1]
    first = start + top[:, None] * columns + left
    per_cell = (first, torch.tensor(columns), width, height[:, None] * width)
    return torch.stack([values.expand(view.grid).flatten() for values in per_cell])
