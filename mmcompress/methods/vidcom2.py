# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import check_each
from ..ops.frames import Frames
from ..ops.precision import wide
from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals

WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Of the Gaussians by which tokens are compared with a centre."""


@register("vidcom2")
@dataclass(frozen=True, repr=False)
class VidCom2(InputStage):
    """Drop the tokens that look most like the mean of their video and of their frame; frames unlike the others get more.

    Liu et al., "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", EMNLP 2025,
    arXiv 2505.14454. The half of the channels that vary least (`channels`), of length 1, is compared with its mean over the video
    and over the frame by a sum of five Gaussians. A frame gets its share of k, times 1 + softmax of how far it is from the video on
    average, at `temperature` (0.01: nearly all of the more goes to one frame), less the mean of that. Cost N D and a sort.

    Departs from the reference: the budget is exact, as in vLLM's port; what rounding has given too much or too little is
    settled among the tokens of the whole video, by the same score. A picture is one frame. Raises ValueError for fewer tokens
    than frames. LLaVA-Video's newlines are structural here and stay where they are (in the reference behind the tokens of their
    frame).
    """

    keep: float | int = 0.25
    channels: float = 0.5
    temperature: float = 0.01
    paper: ClassVar[str] = "arXiv 2505.14454"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.channels <= 1:
            raise ValueError(f"channels={self.channels!r}: give the share of channels that are compared, in (0, 1]")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r}: give a number above 0 (the paper: 0.01)")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        frames = visuals.by_frame()
        check_each(self, visuals.k, visuals.n, frames.shape[1])
        of_video, of_frame = self.typical(frames)
        counts = self.counts(of_video, frames.full, visuals.k / visuals.n)
        return Selection.of(self.chosen(frames, of_video + of_frame, counts, visuals.k))

    def quiet(self, frames: Frames) -> Tensor:
        """The channels that vary least over each video, [U, C'] ascending; ties to the lower one."""
        x, count = wide(frames.x), frames.room.sum(1)[:, None].clamp_min(1)
        mean = x.sum((1, 2)) / count
        off = (x - mean[:, None, None]).square() * frames.full[..., None]
        order = (off.sum((1, 2)) / count).sort(dim=1, stable=True).indices
        return order[:, : max(1, int(self.channels * x.shape[3]))].sort(dim=1).values

    def typical(self, frames: Frames) -> tuple[Tensor, Tensor]:
        """How much each token looks like the mean of its video and of its frame, [U, T, P] each, in (0, 5]."""
        quiet = self.quiet(frames)[:, None, None].expand(*frames.shape, -1)
        y = torch.nn.functional.normalize(wide(frames.x).gather(3, quiet), dim=3, eps=1e-12)
        room = frames.room.clamp_min(1)
        total = y.sum(2)
        of_frame, of_video = total / room[..., None], total.sum(1, keepdim=True) / frames.room.sum(1)[:, None, None]
        return self._likeness(y, of_video), self._likeness(y, of_frame)

    @staticmethod
    def _likeness(y: Tensor, centres: Tensor) -> Tensor:
        """Of tokens [U, T, P, C] with centres [U, T or 1, C], [U, T, P]."""
        product = (y @ centres[..., None])[..., 0]
        distance = y.square().sum(3) - 2 * product + centres.square().sum(2)[..., None]
        return torch.stack([(-distance.clamp_min(0) / (2 * width)).exp() for width in WIDTHS]).sum(0)

    def scales(self, of_video: Tensor, there: Tensor, ratio: float) -> Tensor:
        """The share of its tokens that each frame keeps, [U, T], where the video keeps `ratio`."""
        unlike = -(of_video * there).sum(2) / there.sum(2).clamp_min(1)
        more = ((unlike - unlike.amax(1, keepdim=True)) / self.temperature).softmax(1)
        return (ratio * (1 + more - more.mean(1, keepdim=True))).clamp_max(1)

    def counts(self, of_video: Tensor, there: Tensor, ratio: float) -> Tensor:
        """How many tokens each frame keeps, [U, T] int64: rounded half to even, at least 1. They sum to about `ratio` of all."""
        room = there.sum(2)
        return torch.minimum((self.scales(of_video, there, ratio) * room).round().long().clamp_min(1), room)

    @staticmethod
    def chosen(frames: Frames, typical: Tensor, counts: Tensor, k: int) -> Tensor:
        """Exactly `k` tokens [U, k]: the least `typical` [U, T, P] of those that the frames keep, then of the others."""
        kept = frames.best_of_each(-typical, counts)
        top = 2.0 * len(WIDTHS)
        return frames.best((top - typical) + kept * (2 * top), k)
