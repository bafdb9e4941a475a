# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..ops.crops import alike_crops
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("fastervlm")
@dataclass(frozen=True, repr=False)
class FasterVLM(InputStage):
    """Keep the k patches that CLS attends to most.

    Zhang et al., "[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM Inference Faster", 2024,
    arXiv 2412.01818v1 (the ancestor of VisPruner). Cost N log N.
    As in the reference each crop (thumbnail, tile, video frame) keeps the same part of its own tokens, since its CLS looks
    at nothing else; where an earlier stage has thinned the visual out, it is one crop. Without a CLS token the score is the
    attention that a patch receives. Departs from the reference: any number of images in a batch, padding is no patch.
    """

    keep: float | int = 0.25
    paper: ClassVar[str] = "arXiv 2412.01818"
    needs: ClassVar[tuple[Need, ...]] = (("cls_attention", "received_attention"),)

    def select(self, visuals: Visuals) -> Selection:
        score = visuals["cls_attention", "received_attention"].float()
        views = visuals.layout.views if visuals.slots is None else ()
        crops = alike_crops(views, visuals.n, visuals.k, score.device)
        keep = [part.slots(Selection.top(part.take(score), part.k).keep) for part in crops]
        return Selection.of(torch.cat(keep, 1), score)
