# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..kernels.diverse import max_min
from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals


@register("divprune")
@dataclass(frozen=True, repr=False)
class DivPrune(InputStage):
    """Keep the k tokens that are farthest apart (greedy max-min cosine distance of the projected tokens).

    Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", CVPR 2025, arXiv
    2503.02175. Cost N^2 D / 2 and N k D at most, memory O(N), on a GPU a table of N^2 up to 4,096 tokens. Departs from the
    reference: a token is never picked twice where tokens are equal, and each image has its own budget instead of one pool
    per prompt.
    """

    keep: float | int = 0.098
    paper: ClassVar[str] = "arXiv 2503.02175"

    def select(self, visuals: Visuals) -> Selection:
        return Selection.of(max_min(visuals.features, visuals.k))
