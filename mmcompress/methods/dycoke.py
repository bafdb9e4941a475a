# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.frames import evenly, similarity_before
from ..ops.precision import wide
from ..ops.shares import worth_shares
from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals


@register("dycoke")
@dataclass(frozen=True, repr=False)
class DyCoke(InputStage):
    """Of every four frames keep the first whole, and of the others the tokens that are least like those of an earlier frame.

    Tao et al., "DyCoke: Dynamic Compression of Tokens for Fast Video Large Language Models", CVPR 2025, arXiv 2411.15024, its part
    before the language model ("token temporal merging", which drops and does not merge). The second and the third frame of a block
    are compared with the first, the fourth with the third, token by token at the same place (cosine); they share evenly what the
    first ones leave of the budget. 0.475 is the paper's share of 0.7 to be dropped of them. The part while decoding is
    `dycoke_decode`. Cost N D and a sort.

    Departs from the reference: the budget is exact; where it has no room for all first frames (0.25, for whole blocks) these
    are thinned out evenly and nothing of the others is kept. A picture is one frame. Kept tokens are in raster order. The
    reference, `reference_order`, keeps the third frame of the last block whole, loses the last of an odd number of frames, and
    orders what it keeps by likeness.
    """

    keep: float | int = 0.475
    paper: ClassVar[str] = "arXiv 2411.15024"

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        frames, k = visuals.by_frame(), visuals.k
        (near, near_known), (far, far_known) = (similarity_before(frames, step) for step in (1, 2))
        place = (torch.arange(frames.shape[1], device=near.device) % 4)[:, None]
        alike = torch.where(place == 2, far, near)
        alike = alike.masked_fill(~torch.where(place == 2, far_known, near_known), -2.0)
        first = frames.full & (place == 0)
        kept = evenly(first.flatten(1), k).view_as(first)
        room = (frames.full & ~first).sum(2)
        counts = worth_shares(room.float(), room, k - kept.sum((1, 2))[:, None])
        return Selection.of(frames.chosen(kept | (frames.best_of_each(-alike, counts) & ~first), k))

    @staticmethod
    def reference_order(x: Tensor, dropped: float) -> list[Tensor]:
        """What the reference keeps of each frame of a video x [T, P, C], where the share `dropped` of later frames goes: numbers
        among all tokens, in its order. Raises ValueError for four frames or fewer, at which it fails."""
        frames, places = x.shape[:2]
        if frames <= 4:
            raise ValueError(f"{frames} frames: the reference needs at least 5")
        unit, keep = F.normalize(wide(x), dim=2), int((1 - dropped) * places)
        found = []
        for frame in range(frames - frames % 2):
            before = {1: frame - 1, 2: frame - 2, 3: frame - 1}.get(frame % 4)
            if before is None or (frame % 4 == 2 and frame - 2 >= frames - 4):
                chosen = torch.arange(places, device=x.device)
            else:
                chosen = (unit[frame] * unit[before]).sum(1).sort(stable=True).indices[:keep]
            found.append(frame * places + chosen)
        return found
