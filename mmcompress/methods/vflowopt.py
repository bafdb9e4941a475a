# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

from ..plan import register
from ..stage import Recipe, Stage
from .vflowopt_cuts import VFlowOptCuts, check_ratio
from .vflowopt_prune import VFlowOptPrune

PUBLISHED = (
    (0.10, 0.1166, 1.0, 39.26, 17.39),
    (0.25, 0.2651, 0.9833, 34.76, 15.58),
    (0.50, 0.7233, 0.7487, 28.68, 11.76),
    (1.00, 1.0, 1.0, 28.68, 11.76),
)
"""keep, r1, r2, t and cell that the authors' search found for LLaVA-OneVision-7B; the last row is no search's."""


@register("vflowopt")
@dataclass(frozen=True, repr=False)
class VFlowOpt(Recipe):
    """Prune before the LLM by the attention of the encoder's hubs, recycle what goes, and prune twice more inside by the same map.

    Yang et al., "VFlowOpt: A Token Pruning Framework for LMMs with Visual Information Flow-Guided Optimization", ICCV 2025, arXiv
    2508.05211. Stands for vflowopt_prune >> vflowopt_cuts, where the steps and the deviations are described. `keep` is the
    average over the layers of the LLM of the part of the visual tokens that is left. Of these `r1` enter the LLM, the part `r2`
    of them stays after the first cut, and the second cut leaves what makes the average `keep`. `t` and `cell`: see
    vflowopt_prune; `layers`: see vflowopt_cuts.

    What is None comes from `keep`: the authors' values for LLaVA-OneVision-7B at 0.1, 0.25 and 0.5; between these (and 1, where
    nothing is dropped) r1 / keep, r2, t and cell are on straight lines, below 0.1 as at 0.1. Their third ratio is 0.601, 0.877
    and 0.487; the one that gives their own average exactly is 0.601, 0.870 and 0.483, and is what is used. They search all
    of them for each model and budget: `mmcompress tune MODEL --plan vflowopt --budget 0.25`, in the bounds of `search_space`.

    `alpha` weighs the entropy of a patch's 8-bit pixels. A model is given normalised pixels only, so it has to be 0 here, as in
    all that the authors found; `importance` in vflowopt_prune has the formula for those who have the pixels.
    """

    keep: float = 0.25
    r1: float | None = None
    r2: float | None = None
    t: float | None = None
    cell: float | None = None
    alpha: float = 0.0
    layers: tuple[int | float, int | float] = (0.32, 0.64)
    paper: ClassVar[str] = "arXiv 2508.05211"

    def __post_init__(self) -> None:
        check_ratio("keep", self.keep)
        for name in ("r1", "r2"):
            if getattr(self, name) is not None:
                check_ratio(name, getattr(self, name))
        if self.r1 is not None and self.r1 < self.keep:
            raise ValueError(f"r1={self.r1}: fewer tokens than their average keep={self.keep} cannot enter the LLM")
        if self.alpha != 0:
            raise ValueError(
                f"alpha={self.alpha!r}: the entropy of patches needs pictures of 8 bits, and a model is given normalised pixels: "
                f"leave alpha at 0, which is also what the authors' search found for every budget"
            )
        self.expand()

    def settings(self) -> dict[str, float]:
        """r1, r2, t and cell: as given, else those that belong to `keep`."""
        x = max(self.keep, PUBLISHED[0][0])
        low, high = next(pair for pair in itertools.pairwise(PUBLISHED) if x <= pair[1][0])
        part = (x - low[0]) / (high[0] - low[0])
        values = [a + part * (b - a) for a, b in zip(_relative(low), _relative(high), strict=True)]
        found = dict(zip(("r1", "r2", "t", "cell"), values, strict=True))
        found["r1"] = min(1.0, found["r1"] * self.keep)
        given = {name: getattr(self, name) for name in found}
        return {name: round(found[name], 6) if value is None else value for name, value in given.items()}

    def expand(self) -> tuple[Stage, ...]:
        own = self.settings()
        average = min(1.0, round(self.keep / own["r1"], 6))
        return (
            VFlowOptPrune(own["r1"], own["t"], own["cell"]),
            VFlowOptCuts(average, own["r2"], self.layers),
        )

    def search_space(self) -> dict[str, tuple[float, float]]:
        """Options that are searched for a model, with the authors' bounds (theirs for keep=0.25, r1 in proportion)."""
        return {
            "r1": (self.keep, min(1.0, 1.5 * self.keep)),
            "r2": (8 / 15, 1.0),
            "t": (0.0, 50.0),
            "cell": (3.0, 24.0),
        }


def _relative(row: tuple[float, ...]) -> tuple[float, ...]:
    return (row[1] / row[0], *row[2:])
