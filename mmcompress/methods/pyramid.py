# SPDX-License-Identifier: Apache-2.0
"""What methods that cut several times inside the LLM have in common."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from ..budget import check_keep, check_mean, distinct_layers, floored, scaled_to_mean
from ..stage import LayerStage, check_layer, layer_at


@dataclass(frozen=True, repr=False)
class Pyramid(LayerStage):
    """A method that cuts before several LLM layers, each time to a part of the visual tokens that came to the first cut.

    keep    None: the published ratios. Else the mean number of visual tokens over all LLM layers, the layers before the first
            cut included: an int is a count, a float a part of what comes to the first cut. The ratios are then scaled by one
            factor to that mean (`scaled_to_mean` tells how it is rounded).
    layers  before which layers it cuts: numbers, or parts of the depth. Where parts fall on the same layer of a shallow
            model, the later cut moves up by one.
    ratios  what each cut leaves, as parts of what came to the first one; counts are rounded down, and at least 1.
    """

    keep: float | int | None = None  # type: ignore[assignment]
    layers: tuple[int | float, ...] | None = None
    ratios: tuple[float, ...] | None = None
    published_layers: ClassVar[tuple[float, ...]] = ()
    published_ratios: ClassVar[tuple[float, ...]] = ()

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        for name, values in (("layers", self.layers), ("ratios", self.ratios)):
            if values is not None and (not isinstance(values, tuple) or not values):
                raise ValueError(f"{name}={values!r}: give a tuple with a number for each cut, or None (as published)")
        for layer in self.layers or ():
            check_layer(layer, "layers")
        for one, other in pairwise(self.layers or ()):
            if type(one) is type(other) and one >= other:
                raise ValueError(f"layers={self.layers!r}: give them in ascending order")
        ratios = self.shares()
        if not all(isinstance(r, float) and 0.0 < r <= 1.0 for r in ratios) or any(a < b for a, b in pairwise(ratios)):
            raise ValueError(
                f"ratios={self.ratios!r}: give floats in (0, 1] that do not rise, parts of what came to the first cut"
            )
        if len(ratios) != len(self.layers or self.published_layers):
            raise ValueError(
                f"layers={self.layers!r}, ratios={self.ratios!r}: give as many ratios as layers (published are "
                f"{len(self.published_layers)})"
            )

    def shares(self) -> tuple[float, ...]:
        """What each cut leaves, as parts of what came to the first one, before `keep` scales it."""
        return self.ratios or self.published_ratios

    def places(self, depth: int) -> tuple[int | float, ...]:
        """Before which layers it cuts, as numbers or parts of the depth."""
        return self.layers or self.published_layers

    def cuts(self, depth: int) -> tuple[int, ...]:
        found = distinct_layers([layer_at(where, depth) for where in self.places(depth)], depth)
        check_mean(self.keep, found, depth)
        return found

    def budgets(self, tokens: int, depth: int) -> tuple[int, ...]:
        if self.keep is None:
            return floored(self.shares(), tokens)
        return scaled_to_mean(self.shares(), tokens, self.cuts(depth), depth, self.keep)
