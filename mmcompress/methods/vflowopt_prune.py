# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.groups import of_cells
from ..ops.kmeans import cluster_means
from ..ops.recycle import grid_cells, recycle
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need
from ..visuals import Visuals


def importance(given: Tensor, entropy: Tensor, alpha: float) -> Tensor:
    """Importance of the patches of a tile, [n, N]: the attention `given` to them [n, N] and, weighted by `alpha`, the softmax of
    their `entropy` [n, N] (`ops.entropy.patch_entropy`) over the tile."""
    return given.float() + alpha * entropy.float().softmax(1)


@register("vflowopt_prune")
@dataclass(frozen=True, repr=False)
class VFlowOptPrune(InputStage):
    """Keep the patches that the most attended patches look at, and fold the others into one token per cell of a grid.

    The first half of `vflowopt`: Yang et al., ICCV 2025, arXiv 2508.05211. Importance is the attention that a patch is given by
    the hubs of its tile: the patches that receive more than `t` times the mean, or all patches where there are none. The least
    important tokens of a square of `cell` by `cell` tokens (a number that need not be whole) become their mean weighted by
    importance, which stands for the most important one of them, with its importance. Thumbnail and tiles laid together have a
    grid of their own each. A video keeps the best tokens of all its frames and folds nothing. Cost: the map between patches
    of one block, twice, in blocks of rows; N log N; N D (cells).

    The reference takes round(N (1 - keep)) + N / cell^2 tokens away and gives back one for each cell that was hit, which is
    about keep N. Here tokens are taken in the same order until exactly k are left. It folds nothing in prompts of several
    pictures; here each picture is treated alone, so it does. Newlines, which have importance 1 there, are not counted.
    """

    keep: float | int = 0.2651
    t: float = 34.76
    cell: float = 15.58
    paper: ClassVar[str] = "arXiv 2508.05211"
    merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_number("t", self.t, 0.0, "how many times the mean a hub receives, at least 0 (the paper: 28 to 39)")
        _check_number("cell", self.cell, 1.0, "the side of a cell in tokens, at least 1 (the paper: 11 to 18)")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (f"hub_attention:{float(self.t)}",)

    def select(self, visuals: Visuals) -> Selection:
        score = visuals[str(self.needs[0])].detach().float()
        views = visuals.layout.views
        if all(view.role == "frame" for view in views):
            return Selection.top(score, visuals.k)
        cell, cells = grid_cells([view.grid for view in views if view.cells], self.cell)
        cell = of_cells(cell, visuals.slots, score)
        keep, assign, folded = recycle(score, cell, cells, visuals.k)
        means = cluster_means(visuals.features, score, cell.masked_fill(~folded, -1), cells)
        means = gather(means, cell.gather(1, keep)).to(visuals.features.dtype)
        rows = torch.where(folded.gather(1, keep)[..., None], means, gather(visuals.features, keep))
        return Selection(keep, assign, rows=rows, scores=score)


def _check_number(name: str, value: float, least: float, text: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < float("inf"):
        raise ValueError(f"{name}={value!r}: give {text}")
