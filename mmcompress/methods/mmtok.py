# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.coverage import max_coverage, soft_coverage
from ..ops.relevance import mean_of_patches
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("mmtok")
@dataclass(frozen=True, repr=False)
class MMTok(InputStage):
    """Keep the k tokens that together cover best both the words of the instruction and all visual tokens (greedy).

    Dong et al., "MMTok: Multimodal Coverage Maximization for Efficient Inference of VLMs", ICLR 2026, arXiv 2508.18264.
    A word (visual token) spreads its weight over the visual tokens by a softmax of cosines: of LLM input embeddings at
    `text_temperature`, of features before the projector at `vision_temperature`. The weight of all words is 1, that of
    all visual tokens `alpha`. `patches`: how many patches lie side by side in one row of encoder features; their mean is
    compared. The paper's values for Qwen2.5-VL are text_temperature=0.01, patches=4; the defaults are those for LLaVA.
    Cells outside the picture (square padding) are kept last. Without instruction visual coverage alone decides.

    Cost N^2 C / 2 and k N (N + T) at most for T words, N (N + T) float32 of memory. Departs from the reference: all tokens
    of the instruction count, while there stop words and the answer-format suffix are left out; the tiles of one picture
    share its budget, where there each tile has the same; more than the tokens inside the picture can be asked for.
    """

    keep: float | int = 0.111
    alpha: float = 0.5
    text_temperature: float = 0.02
    vision_temperature: float = 0.2
    patches: int = 1
    paper: ClassVar[str] = "arXiv 2508.18264"
    needs: ClassVar[tuple[Need, ...]] = ("encoder_features", "text_embeddings")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha}: the weight of visual coverage must be a number >= 0 (paper: 0.5)")
        for name in ("text_temperature", "vision_temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: a temperature must be a number above 0")
        if isinstance(self.patches, bool) or not isinstance(self.patches, int) or self.patches < 1:
            raise ValueError(f"patches={self.patches!r}: give the number of patches that make one token, at least 1")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        table = self.coverage(visuals)
        return Selection.of(max_coverage(table, visuals.k, _padding(visuals)), table.sum(1))

    def coverage(self, visuals: Visuals) -> Tensor:
        """How well each token covers each word and each token, [U, T + N, N] float32."""
        seen = mean_of_patches(visuals["encoder_features"], self.patches)
        words = soft_coverage(visuals["text_embeddings"], visuals.features, self.text_temperature)
        return torch.cat([words, self.alpha * soft_coverage(seen, seen, self.vision_temperature)], 1)


def _padding(visuals: Visuals) -> Tensor | None:
    """Which tokens show nothing of the picture, [U, N] bool; None if all do."""
    if all(min(view.box) >= 0 and max(view.box) <= 1 for view in visuals.layout.views):
        return None
    left, top, right, bottom = visuals.layout.boxes().unbind(-1)
    outside = (right <= 0) | (bottom <= 0) | (left >= 1) | (top >= 1)
    outside = outside.to(visuals.features.device, non_blocking=True)
    return outside.expand(len(visuals.features), -1) if visuals.slots is None else outside[visuals.slots]
