# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..kernels.diverse import max_min
from ..ops.cells import numbered, outermost, placed
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
    it stands for (its mass: `plan(..., mass=...)`). No question, no signal. Parts of it are known from DivPrune (farthest points),
    ToMe (attention in proportion to size) and RESTORE (both for LLaVA-1.5).

    place   how much it counts where tokens lie in the picture, beside what they are; 0.5 for pages of text, where the same letters
            stand in many places. A part of the spread of the tokens (the mean of 1 - cosine over all pairs): with 1 both are spread
            alike. Frames of a video lie on each other.

    Cost N k D for picks and cells together, on a GPU N^2 D / 2 and a table of N^2 up to 4,096 tokens; else memory O(N), and with
    `place` a copy of the tokens in float32.
    """

    keep: float | int = 0.25
    place: float = 0.0
    positions: ClassVar[str] = "keep"
    merging: ClassVar[bool] = True
    mass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.place, bool) or not isinstance(self.place, (int, float)) or not 0 <= self.place <= 10:
            raise ValueError(
                f"place={self.place!r}: give how much it counts where tokens lie, from 0 (not at all) to 10; 0.5 for pages of text"
            )

    def select(self, visuals: Visuals) -> Selection:
        features = visuals.features.detach()
        if self.place:
            features = placed(features, visuals.layout.boxes(), visuals.slots, self.place)
        picks, nearest = max_min(features, visuals.k, first=outermost(features), nearest=True)
        anchors = picks.sort(dim=1).values
        return Selection(anchors, *numbered(nearest, anchors))
