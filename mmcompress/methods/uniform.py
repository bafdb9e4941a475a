# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals


@register("uniform")
@dataclass(frozen=True, repr=False)
class Uniform(InputStage):
    """Keep k tokens at even distances in raster order: sees nothing, often hard to beat. Cost O(k)."""

    keep: float | int = 0.25

    def select(self, visuals: Visuals) -> Selection:
        steps = torch.arange(visuals.k, device=visuals.features.device)
        middle = ((2 * steps + 1) * visuals.n) // (2 * visuals.k)
        return Selection.of(middle.expand(len(visuals.features), -1))
