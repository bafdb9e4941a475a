# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.coverage import max_coverage
from ..ops.crops import alike_crops
from ..ops.precision import normalized, wide
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("scope")
@dataclass(frozen=True, repr=False)
class SCOPE(InputStage):
    """Keep the k tokens that together cover the picture best, each gain in coverage times the attention of the token (greedy).

    "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", NeurIPS 2025, arXiv
    2510.24214. A token covers another by their cosine, if that is above 0. With a CLS token the encoder features before the
    projector are compared and its attention is the saliency; without one the projected tokens, and the attention that they
    receive. `alpha` is the exponent of the saliency, 0 is coverage alone; `combine="add"` adds it to the gain instead. As in
    the reference each crop (thumbnail, tile, video frame) is pruned alone, with a budget by its size; where an earlier stage has
    thinned the visual out, it is one crop.

    Cost N^2 C and k N^2 at most, a table of N^2 for each crop. Departs from the reference: all in
    float32, and the budget of the crops is exact.
    """

    keep: float | int = 0.111
    alpha: float = 1.0
    combine: str = "multiply"
    paper: ClassVar[str] = "arXiv 2510.24214"
    needs: ClassVar[tuple[Need, ...]] = (("cls_attention", "received_attention"), ("encoder_features", None))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha}: give the exponent of the attention, a number >= 0 (the paper: 1)")
        if self.combine not in ("multiply", "add"):
            raise ValueError(f"combine={self.combine!r}: choose 'multiply' (the paper) or 'add'")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        saliency = wide(visuals["cls_attention", "received_attention"])
        early = "cls_attention" in visuals.signals and "encoder_features" in visuals.signals
        features = visuals["encoder_features"] if early else visuals.features
        views = visuals.layout.views if visuals.slots is None else ()
        crops = alike_crops(views, visuals.n, visuals.k, features.device)
        keep = [part.slots(self.picks(part.take(features), part.take(saliency), part.k)) for part in crops]
        return Selection.of(torch.cat(keep, 1), saliency)

    def picks(self, features: Tensor, saliency: Tensor, k: int) -> Tensor:
        """The tokens of `features` [U, N, C] with `saliency` [U, N], in the order they are picked, [U, k]."""
        unit = normalized(features)
        table = (unit @ unit.transpose(1, 2)).relu_()
        factor = wide(saliency) ** self.alpha
        if self.combine == "multiply":
            return max_coverage(table, k, weight=factor)
        return max_coverage(torch.cat([table, factor.diag_embed()], 1), k)  # one more target for each token, its own
