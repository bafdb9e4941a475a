# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.frames import Frames, evenly, similarity_before
from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals


@register("evs")
@dataclass(frozen=True, repr=False)
class EVS(InputStage):
    """Keep the first frame of a video, then the tokens that have changed most since the frame before.

    Bagrov et al., "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624, as
    vLLM does it: change is one minus the cosine with the token at the same place of the frame before, kept or not; one budget for
    the whole video, so that a cut to another scene takes nearly a frame and a frame in which nothing moves may get nothing.
    Cost N D and a sort.

    Departs from vLLM in that the budget is exact (there it is never less than a frame): where it has no room for all tokens
    with nothing before them, of which the first frame is made, these are thinned out evenly, and no later frame is seen. So a
    picture, which is one frame, is thinned out evenly (in vLLM pictures stay whole: `on="video"`). Behind another stage, a
    token whose place was empty in the frame before counts as new. The paper measures the change of pixels (L1), as no
    option here: a model is given pixels that are normalised, in the patches of its family.
    """

    keep: float | int = 0.25
    paper: ClassVar[str] = "arXiv 2510.14624"
    positions: ClassVar[str] = "keep"

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        frames = visuals.by_frame()
        cosine, known = similarity_before(frames)
        return Selection.of(changed_most(frames, 1 - cosine, known, visuals.k))

    @staticmethod
    def reference_budget(frames: int, places: int, pruned: float) -> int:
        """How many tokens vLLM keeps where the share `pruned` is to go: never less than the first frame."""
        return max(places, int(frames * places * (1 - pruned)))


def changed_most(frames: Frames, change: Tensor, known: Tensor, k: int) -> Tensor:
    """The `k` tokens [U, k] with the largest `change` [U, T, P], at most 2; before all others those of which no change is `known`
    [U, T, P], and where these are too many, so many of them at even distances."""
    new = frames.full & ~known
    first = evenly(new.flatten(1), k).view_as(new)
    return frames.best(change.masked_fill(new, 3.0).masked_fill(first, 4.0), k)
