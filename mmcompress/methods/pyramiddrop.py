# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..budget import distinct_layers, layer_mean
from ..plan import register
from ..selection import Selection
from ..stage import Need, layer_at
from ..visuals import Visuals
from .pyramid import Pyramid

EARLY = (2 / 32, 10 / 32, 20 / 32)
"""Where a third-party study cuts for 128 of 576 tokens; from its second layer on all counts are in the same proportions."""


@register("pyramiddrop")
@dataclass(frozen=True, repr=False)
class PyramidDrop(Pyramid):
    """At three depths of the LLM, keep the visual tokens that the last prompt token is about to attend to most, each time half.

    Xing et al., "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", CVPR
    2025, arXiv 2410.17247. Before 1/4, 1/2 and 3/4 of the depth the row of the last prompt token in the attention of the layer
    behind the cut is computed from its queries and keys; its mean over heads is the score. A half, a quarter and an eighth
    of the tokens are left, a mean of 270 of 576 over 32 layers; positions are numbered anew. With a `keep` below the mean
    of these ratios, or a count, it cuts before 2/32, 10/32 and 20/32 of the depth instead, as for 128 of 576 tokens in the
    literature. `keep`, `layers` and `ratios`: see `Pyramid`. Cost heads * S * d for each row.

    Departs from the reference: all images of a sample are one pool (it takes the first one only) and newline tokens stay (it
    counts them as image); prompts are not cut off at 2048 tokens; grouped queries and left padding work.
    """

    paper: ClassVar[str] = "arXiv 2410.17247"
    needs: ClassVar[tuple[Need, ...]] = ("last_attention@next",)
    positions: ClassVar[str] = "reindex"
    published_layers: ClassVar[tuple[float, ...]] = (1 / 4, 1 / 2, 3 / 4)
    published_ratios: ClassVar[tuple[float, ...]] = (0.5, 0.25, 0.125)

    def places(self, depth: int) -> tuple[int | float, ...]:
        late = super().places(depth)
        if self.layers is not None or self.keep is None or len(late) != len(EARLY):
            return late
        published = distinct_layers([layer_at(where, depth) for where in late], depth)
        enough = isinstance(self.keep, float) and self.keep >= layer_mean(1.0, self.shares(), published, depth)
        return late if enough else EARLY

    def select(self, visuals: Visuals) -> Selection:
        return Selection.top(visuals["last_attention@next"], visuals.k)
