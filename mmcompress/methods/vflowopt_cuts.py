# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..budget import check_keep, resolve
from ..plan import register
from ..selection import Selection
from ..stage import LayerStage, Need, check_layer, layer_at
from ..visuals import Visuals


def last_ratio(average: float, first: float, second: float, layers: tuple[int, int, int]) -> float:
    """Part of what is left that has to stay after the second cut, for the wanted `average` over all layers; at most 1.

    first, second: what there is before the first cut and after it, in the unit of `average`; layers: how many have these two,
    and how many the rest. Zero or less: the first layers have more than the average already.
    """
    rest = sum(layers) * average - layers[0] * first - layers[1] * second
    return min(1.0, rest / layers[2] / second)


@register("vflowopt_cuts")
@dataclass(frozen=True, repr=False)
class VFlowOptCuts(LayerStage):
    """Cut the visual tokens twice inside the LLM by the scores of the stage before it; no attention is read there.

    The second half of `vflowopt`: Yang et al., ICCV 2025, arXiv 2508.05211. Before the layers `layers` (numbers, or parts of the
    depth; 0.32 and 0.64 are 9 and 18 of 28 and 10 and 20 of 32 layers) the least important tokens go: the part `r2` stays
    after the first cut, and after the second as much as makes the average over all layers `keep`, as a part of the tokens that
    come to the first cut (all of them, where `r2` leaves less than that). Needs an input stage with scores before it. Cost N log N.

    Departs from the reference: any number of images and samples (it knows one image, at a fixed place), and ties go by index.
    """

    keep: float = 0.943
    r2: float = 0.9833
    layers: tuple[int | float, int | float] = (0.32, 0.64)
    positions: ClassVar[str] = "keep"
    paper: ClassVar[str] = "arXiv 2508.05211"
    needs: ClassVar[tuple[Need, ...]] = ("input_scores",)

    def __post_init__(self) -> None:
        for name in ("keep", "r2"):
            check_ratio(name, getattr(self, name))
        if not isinstance(self.layers, tuple) or len(self.layers) != 2:
            raise ValueError(f"layers={self.layers!r}: give the two places of the cuts, like (0.32, 0.64)")
        for where in self.layers:
            check_layer(where, "layers")

    def cuts(self, depth: int) -> tuple[int, ...]:
        places = tuple(layer_at(where, depth) for where in self.layers)
        spans = self._spans(depth)
        if min(spans) > 0 and last_ratio(self.keep, 1.0, self.r2, spans) <= 0:
            raise ValueError(
                f"{self!r}: in a language model of {depth} layers, cut before layers {places[0]} and {places[1]}, there are more "
                f"visual tokens than the average of keep={self.keep} before the second cut already: give a smaller r2 (in "
                f"vflowopt also r1)"
            )
        return places

    def _spans(self, depth: int) -> tuple[int, int, int]:
        """How many layers come before, between and behind the cuts."""
        first, second = (layer_at(where, depth) for where in self.layers)
        return first, second - first, depth - second

    def budgets(self, tokens: int, depth: int) -> tuple[int, ...]:
        second = resolve(float(self.r2), tokens)
        third = round(last_ratio(self.keep * tokens, tokens, second, self._spans(depth)) * second)
        return second, max(1, third)

    def budget(self, tokens: int) -> int:
        return resolve(float(self.r2), tokens)

    def select(self, visuals: Visuals) -> Selection:
        return Selection.top(visuals["input_scores"], visuals.k)


def check_ratio(name: str, value: float) -> None:
    if not isinstance(value, float):
        raise TypeError(f"{name}={value!r}: give a ratio, a float in (0, 1]")
    check_keep(value)
