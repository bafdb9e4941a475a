# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import register
from ..selection import Selection
from ..stage import LayerStage, Need
from ..visuals import Visuals


@register("fastv")
@dataclass(frozen=True, repr=False)
class FastV(LayerStage):
    """Before LLM layer `layer`, keep the k visual tokens that the last prompt token attended to most one layer earlier.

    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024, arXiv 2403.06764. The one attention row is recomputed
    from queries and keys, so sdpa and flash attention stay on. `keep` counts tokens after the cut. `query="all"` scores by the
    mean over all prompt rows instead (the variant of EffiVLM-Bench), computed in blocks. Cost heads * S * d for the row.

    Departs from the reference: all images of a sample share one budget (it knows one image, at a fixed place), each sample of a
    batch is ranked by its own last token (there the first sample decides for all), and structural tokens stay.
    """

    layer: int | float = 2
    keep: float | int = 0.5
    query: str = "last"
    paper: ClassVar[str] = "arXiv 2403.06764"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query not in ("last", "all"):
            raise ValueError(f"query={self.query!r}: choose 'last' (the paper) or 'all'")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return ("last_attention",) if self.query == "last" else ("mean_attention",)

    def select(self, visuals: Visuals) -> Selection:
        return Selection.top(visuals["last_attention" if self.query == "last" else "mean_attention"], visuals.k)
