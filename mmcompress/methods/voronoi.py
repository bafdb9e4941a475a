# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

from ..kernels.diverse import max_min
from ..ops.cells import nearest_cells
from ..ops.precision import wide
from ..ops.ties import argmax_first
from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals


@register("voronoi")
@dataclass(frozen=True, repr=False)
class Voronoi(InputStage):
    """Keep k tokens that are far apart and merge every other one into the nearest: nothing is thrown away.

    This library's own. The first anchor is the token least like the mean of all, each next one the farthest from those so far
    (cosine); a token that is kept is the mean of its cell, stands at the place of its anchor and weighs in the language model what
    it stands for (its mass: `plan(..., mass=...)`). No question, no signal, no option but `keep`. Parts of it are known from
    DivPrune (farthest points), ToMe (attention in proportion to size) and RESTORE (both for LLaVA-1.5).

    Cost N k D for the picks and as much for the cells, on a GPU a table of N^2 up to 4,096 tokens; else memory O(N).
    """

    keep: float | int = 0.25
    positions: ClassVar[str] = "keep"
    merging: ClassVar[bool] = True
    mass: ClassVar[bool] = True

    def select(self, visuals: Visuals) -> Selection:
        unit = F.normalize(wide(visuals.features.detach()), dim=-1)
        first = argmax_first((unit - unit.mean(1, keepdim=True)).square().sum(-1))
        anchors = max_min(visuals.features, visuals.k, first=first).sort(dim=1).values
        return Selection(anchors, *nearest_cells(visuals.features.detach(), anchors))
