# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.frames import evenly, similarity_before
from ..ops.shares import worth_shares
from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals
from .evs import changed_most


@register("timechat_dtd")
@dataclass(frozen=True, repr=False)
class TimeChatDTD(InputStage):
    """In every frame of a video drop the tokens that have changed least since the frame before (differential token drop).

    Yao et al., "TimeChat-Online: 80% Visual Tokens are Naturally Redundant in Streaming Videos", ACM Multimedia 2025, arXiv
    2504.17343. A token is compared (cosine) with that at the same place of the frame before, kept or not; the first frame stays
    whole. `share="frame"`: every frame behind it keeps the same share (the reference's `relative`); "video": the least changed
    tokens of the whole video go, as a threshold would have it (`absolute`) that is set for each video by its budget, which is what
    `evs` does. Cost N D and a sort.

    Departs from the reference in that the budget is exact. Its thresholds, by which the number of tokens follows the content,
    are in `dropped`, for streams: no stage of the frame can be like this, since budgets are known before the model runs. Where
    k has no room for the first frame it is thinned out evenly, and so is a picture, which is one frame. The mode that
    compares pixels is no option here, since a model is given pixels that are normalised, in the patches of its family;
    `pixel_difference` is its arithmetic, for those who have the pixels.
    """

    keep: float | int = 0.25
    share: str = "frame"
    paper: ClassVar[str] = "arXiv 2504.17343"
    positions: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share not in ("frame", "video"):
            raise ValueError(
                f"share={self.share!r}: choose 'frame' (the same share of each) or 'video' (of all together)"
            )

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        frames, k = visuals.by_frame(), visuals.k
        cosine, known = similarity_before(frames)
        if self.share == "video":
            return Selection.of(changed_most(frames, 1 - cosine, known, k))
        first = frames.full & (torch.arange(frames.shape[1], device=cosine.device) == 0)[:, None]
        kept = evenly(first.flatten(1), k).view_as(first)
        room = (frames.full & ~first).sum(2)
        counts = worth_shares(room.float(), room, k - kept.sum((1, 2))[:, None])
        change = (-cosine).masked_fill(~known, 3.0)
        return Selection.of(frames.chosen(kept | frames.best_of_each(change, counts) & ~first, k))

    @staticmethod
    def dropped(change: Tensor, threshold: float | None = None, share: float | None = None) -> Tensor:
        """Which tokens of each frame but the first of a video are dropped, [T - 1, P] bool, by how much they have changed
        (`change` [T - 1, P]: minus the cosine, or the difference of pixels): those that changed less than `threshold`, or the
        `share` of each frame that changed least (a whole number, rounded down; the earlier place of equals)."""
        if (threshold is None) == (share is None):
            raise ValueError(f"threshold={threshold}, share={share}: give one of them")
        if threshold is not None:
            return change < threshold
        assert share is not None
        order = change.sort(dim=1, stable=True).indices[:, : int(change.shape[1] * share)]
        return torch.zeros_like(change, dtype=torch.bool).scatter(1, order, True)

    @staticmethod
    def moments(dropped: Tensor, share: float = 0.1) -> Tensor:
        """The frames (numbers, ascending) in which something new is to be seen: the `share` of the frames behind the first of which
        the least was `dropped` [T - 1, P]; the demo speaks there."""
        count = math.ceil(share * len(dropped))
        order = dropped.float().mean(1).sort(stable=True).indices
        return 1 + order[:count].sort().values


def pixel_difference(pixels: Tensor, compat: str | None = None) -> Tensor:
    """How much the pixels of each place differ from those of the frame before, [T - 1, P], in their own unit.

    pixels [T, S, P, ...]: S pictures that make a frame (two in Qwen-VL). Their mean is compared; with `compat="reference"` the
    first picture of the frame before with the last of this one, which leaves out the two between them.
    """
    if compat not in (None, "reference"):
        raise ValueError(f"compat={compat!r}: choose 'reference' or None (the mean of a frame's pictures)")
    pixels = pixels.float()
    before, now = (pixels[:-1, 0], pixels[1:, -1]) if compat else (pixels[:-1].mean(1), pixels[1:].mean(1))
    return (before - now).abs().flatten(2).mean(2)
