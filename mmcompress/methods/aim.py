# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..budget import check_keep
from ..plan import register
from ..selection import Selection
from ..stage import LayerStage, Need, Recipe, Stage
from ..visuals import Visuals
from .aim_merge import AIMMerge


@register("aim_prune")
@dataclass(frozen=True, repr=False)
class AIMPrune(LayerStage):
    """Drop visual tokens layer by layer, on a straight line down to none: those to which least importance flows along attention.

    The second half of `aim`: Zhong et al., ICCV 2025, arXiv 2412.03248. Before each of the LLM layers from `l1` + 1 to `l2` it
    keeps the part 1 - (layer - l1) / (l2 - l1), rounded down, of the visual tokens that came to the first of these cuts, so
    that none is left from layer `l2` on; a ramp that is longer than the model ends with it, as in the reference. They are
    ranked by the PageRank of the layer before the cut: five steps along
    softmax(logits / 0.1), without damping, root mean square over heads. `l1` and `l2` are numbers of layers, or parts of the
    depth: 0.5 and 0.786 are the paper's 14 and 22 of 28; for LLaVA-1.5 it takes 13 and 21 of 32. Positions stay, and so do
    newlines and other structural tokens. Cost 5 heads S^2 d for each cut, in blocks; the map is never held.

    Departs from the reference in that tokens are really gone, which it only masks: there they still give away the share with
    which PageRank begins (1 / S), here it begins with the tokens that are left. Qwen2-VL's last visual token is no text here.
    """

    l1: int | float = 0.5
    l2: int | float = 0.786
    paper: ClassVar[str] = "arXiv 2412.03248"
    needs: ClassVar[tuple[Need, ...]] = ("pagerank",)

    def __post_init__(self) -> None:
        for name, where in (("l1", self.l1), ("l2", self.l2)):
            if not (type(where) is int and where >= 0) and not (type(where) is float and 0.0 <= where <= 1.0):
                raise ValueError(
                    f"{name}={where!r}: give the number of an LLM layer, an int of at least 0, or its place as a part of the "
                    f"depth, a float from 0 to 1"
                )
        if type(self.l1) is type(self.l2) and self.l1 >= self.l2:
            raise ValueError(
                f"l1={self.l1!r}, l2={self.l2!r}: the cuts begin behind l1 and end at l2, so l2 must be larger"
            )

    def ramp(self, depth: int) -> tuple[int, int]:
        """`l1` and `l2` as numbers of layers of an LLM of `depth`."""
        first, last = (where if isinstance(where, int) else round(where * depth) for where in (self.l1, self.l2))
        last = max(last, first + 1) if isinstance(self.l2, float) else last
        if not first < last or first + 1 >= depth:
            raise ValueError(
                f"{self!r}: no cut between layers {first} and {last} of a language model of {depth} layers"
            )
        return first, last

    def rates(self, depth: int) -> list[float]:
        """The part of the visual tokens that is left before each layer but the first, and after the last, in the floating point of
        the reference."""
        first, last = self.ramp(depth)
        step = 1 / (last - first)
        return [
            min(1.0, max(0.0, 1 - (layer - first) * step)) if layer < last else 0.0 for layer in range(1, depth + 1)
        ]

    def cuts(self, depth: int) -> tuple[int, ...]:
        first, last = self.ramp(depth)
        return tuple(range(first + 1, min(last, depth - 1) + 1))  # the reference, too, ends where the layers do

    def budgets(self, tokens: int, depth: int) -> tuple[int, ...]:
        rates = self.rates(depth)
        return tuple(int(tokens * rates[layer - 1]) for layer in self.cuts(depth))

    def budget(self, tokens: int) -> int:
        return 0

    def select(self, visuals: Visuals) -> Selection:
        return Selection.top(visuals["pagerank"], visuals.k)


@register("aim")
@dataclass(frozen=True, repr=False)
class AIM(Recipe):
    """Merge tokens that are alike before the LLM, then drop what is left on a straight line through its middle layers.

    Zhong et al., "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", ICCV 2025, arXiv 2412.03248.
    Stands for aim_merge(`keep`, `metric`) >> aim_prune(`l1`, `l2`), where options, costs and deviations are described. `keep`
    is what merging leaves: 0.25 for videos in the paper; for LLaVA-1.5 0.125 (or 0.4375 in its code), with l1=13, l2=21.
    """

    keep: float | int = 0.25
    metric: str | None = None
    l1: int | float = 0.5
    l2: int | float = 0.786
    paper: ClassVar[str] = "arXiv 2412.03248"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        self.expand()

    def expand(self) -> tuple[Stage, ...]:
        return (AIMMerge(self.keep, self.metric), AIMPrune(self.l1, self.l2))
