# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

import torch

from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals


@register("random")
@dataclass(frozen=True, repr=False)
class Random(InputStage):
    """Keep k tokens by lot: the floor that every method has to beat.

    The draw depends on `seed` and on the number of tokens only, so that an image keeps the same tokens alone and in a
    batch. Cost O(N log N).
    """

    keep: float | int = 0.25
    seed: int = 0

    def select(self, visuals: Visuals) -> Selection:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randperm(visuals.n, generator=generator)[: visuals.k]
        drawn = drawn.to(visuals.features.device, non_blocking=True)
        return Selection.of(drawn.expand(len(visuals.features), -1))
