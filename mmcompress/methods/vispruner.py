# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.crops import alike_crops
from ..ops.precision import normalized, wide
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("vispruner")
@dataclass(frozen=True, repr=False)
class VisPruner(InputStage):
    """Keep the patches that CLS attends to most (important), and of the rest those that are left when near-duplicates go.

    Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025,
    arXiv 2412.01818. `important` is the part of k that goes by attention, rounded down (0.5 in the reference, 0.75 in its
    example at 64 tokens; 1 is FasterVLM). The rest, listed by falling attention, is split into its even and odd places;
    the `step` tokens at even places that look most like one at an odd place are deleted, and so on until k are left.
    As in the reference each crop (thumbnail, tile, video frame) is pruned alone, with a budget by its size; where an earlier
    stage has thinned the visual out, it is one crop. Without a CLS token the score is the attention that a patch receives.
    Cost N^2 C for the similarities of the encoder features before the projector, held as one matrix, and up to N / `step`
    rounds that read a quarter of it. Departs from the reference, which crashes where the rest is an odd number of tokens:
    its even places are then one more. Any number of images in a batch.
    """

    keep: float | int = 0.25
    important: float = 0.5
    step: int = 8
    paper: ClassVar[str] = "arXiv 2412.01818"
    needs: ClassVar[tuple[Need, ...]] = (("cls_attention", "received_attention"), "encoder_features")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise ValueError(
                f"important={self.important!r}: give the part of the budget that goes by attention, in [0, 1]"
            )
        if type(self.step) is not int or self.step < 1:
            raise ValueError(
                f"step={self.step!r}: give how many tokens are deleted in a round, at least 1 (the paper: 8)"
            )

    def select(self, visuals: Visuals) -> Selection:
        score = wide(visuals["cls_attention", "received_attention"])
        features = visuals["encoder_features"].detach()
        views = visuals.layout.views if visuals.slots is None else ()
        crops = alike_crops(views, visuals.n, visuals.k, score.device)
        keep = [part.slots(self._choose(part.take(score), part.take(features), part.k)) for part in crops]
        return Selection.of(torch.cat(keep, 1), score)

    def _choose(self, score: Tensor, features: Tensor, k: int) -> Tensor:
        """Places [B, k] of the tokens that B crops keep, the important ones first; score [B, n], features [B, n, C]."""
        important = int(k * self.important)
        order = score.sort(dim=1, descending=True, stable=True).indices
        rest = self._thin_out(order[:, important:], features, k - important)
        return torch.cat([order[:, :important], rest], 1)

    def _thin_out(self, rest: Tensor, features: Tensor, left: int) -> Tensor:
        """The `left` places of `rest` [B, R] that stay when tokens with a near-duplicate are deleted step by step."""
        if left == 0 or left == rest.shape[1]:
            return rest[:, :left]
        unit = normalized(features)
        similar = (unit @ unit.transpose(1, 2)).flatten(1)
        while rest.shape[1] > left:
            even, odd = rest[:, ::2], rest[:, 1::2]
            gone = min(self.step, rest.shape[1] - left, even.shape[1])
            pairs = even[:, :, None] * unit.shape[1] + odd[:, None, :]
            closest = similar.gather(1, pairs.flatten(1)).view_as(pairs).amax(-1)
            order = closest.sort(dim=1, descending=True, stable=True).indices
            rest = torch.cat([even.gather(1, order[:, gone:]), odd], 1)
        return rest
