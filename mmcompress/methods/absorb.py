# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ..ops.cells import nearest_cells
from ..plan import as_pipeline, register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals
from .hosted import Hosted


@register("absorb")
@dataclass(frozen=True, repr=False)
class Absorb(Hosted):
    """Complete a method that selects: what it would drop is merged into the nearest token that it keeps.

    This library's own. `host` is the method as a plan string without `keep`, "cdpruner" or "holov(strips=8)"; its signals are
    asked for. A token that is kept becomes the mean of all that are nearest to it (cosine), stays at its place, and weighs in the
    language model what it stands for (its mass). Cost: the host's, and N k D.
    """

    positions: ClassVar[str] = "keep"
    merging: ClassVar[bool] = True
    mass: ClassVar[bool] = True

    def stage(self) -> InputStage:
        """The host."""
        stages = as_pipeline(self.host).parts
        one = stages[0] if len(stages) == 1 else None
        if isinstance(one, InputStage) and one.merging:
            raise ValueError(f"host={self.host!r} merges tokens itself: use it alone, or a host that only selects")
        if not isinstance(one, InputStage) or hasattr(one, "weights"):
            raise ValueError(
                f"host={self.host!r}: give one method that selects tokens before the language model and is not trained, with its "
                f"options but keep if need be ('divprune', 'cdpruner')"
            )
        return one

    def select(self, visuals: Visuals) -> Selection:
        chosen = self.stage().select(visuals)
        assign, weight = nearest_cells(visuals.features.detach(), chosen.keep)
        return replace(chosen, assign=assign, weight=weight)
