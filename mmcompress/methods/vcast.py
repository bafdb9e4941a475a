# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import check_each
from ..ops.frames import Frames, largest_remainder
from ..ops.precision import wide
from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals


@register("vcast")
@dataclass(frozen=True, repr=False)
class VCAST(InputStage):
    """Frames at which the path of frame means turns sharply get more tokens; in a frame those unlike its mean, or long, stay.

    "V-CAST: Video Curvature-Aware Spatio-Temporal Pruning", arXiv 2603.27650. The curvature of a frame is one minus the cosine of
    the steps from the frame before and to the frame behind (means of unit length; 1 at both ends); one token goes to each frame,
    the others by softmax of curvature / `temperature`. A token counts by one minus its cosine with the frame's mean, plus its
    length, brought to [0, 1] within the frame. Cost N D and a sort.

    Departs from the reference in what rounding leaves over: it goes to the frames one by one, by the parts that were cut off;
    with `compat="reference"` all of it goes to one frame until that is full, then to the next, as in the reference, which was
    hardly meant. A picture is one frame (the reference keeps pictures whole: `on="video"`). Raises ValueError for fewer tokens
    than frames.
    """

    keep: float | int = 0.25
    temperature: float = 0.7
    compat: str | None = None
    paper: ClassVar[str] = "arXiv 2603.27650"
    positions: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature!r}: give a number above 0 (the paper: 0.7)")
        if self.compat not in (None, "reference"):
            raise ValueError(f"compat={self.compat!r}: choose 'reference' or None (one token more each)")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        frames = visuals.by_frame()
        check_each(self, visuals.k, visuals.n, frames.shape[1])
        weights = (self.curvature(frames) / self.temperature).softmax(1)
        counts = self.allocate(weights, frames.room, visuals.k)
        return Selection.of(frames.chosen(frames.best_of_each(self.scores(frames), counts), visuals.k))

    @staticmethod
    def curvature(frames: Frames) -> Tensor:
        """How sharply the path of frame means turns at each frame, [U, T], in [0, 2]."""
        means = F.normalize(frames.mean(), dim=2, eps=1e-6)
        steps = means.diff(dim=1)
        turns = 1 - F.cosine_similarity(steps[:, :-1], steps[:, 1:], dim=2, eps=1e-6)
        ends = means.new_ones(len(means), 1)
        return torch.cat([ends, turns, ends], 1)[:, : means.shape[1]]

    def allocate(self, weights: Tensor, room: Tensor, k: int, least: int = 1) -> Tensor:
        """`k` tokens over the frames, [U, T] int64: `least` each (none where k is less), the others by `weights` [U, T], and not
        more than `room` [U, T]."""
        weights = wide(weights)
        total = weights.sum(1, keepdim=True)
        weights = torch.where(
            total > 0, weights / total.clamp_min(1e-30), torch.full_like(weights, 1 / weights.shape[1])
        )
        least = least if k >= least * weights.shape[1] else 0
        base = room.clamp_max(least)
        raw = weights * (k - base.sum(1, keepdim=True))
        if self.compat is None:
            return base + largest_remainder(raw, room - base, k - base.sum(1, keepdim=True))
        whole = torch.minimum(base + raw.floor().long(), room)
        order = (raw - raw.floor()).sort(dim=1, descending=True, stable=True).indices
        filled = (room - whole).gather(1, order).cumsum(1).clamp_max(k - whole.sum(1, keepdim=True))
        return whole + torch.zeros_like(whole).scatter(
            1, order, filled.diff(dim=1, prepend=torch.zeros_like(base[:, :1]))
        )

    @staticmethod
    def scores(frames: Frames) -> Tensor:
        """What tokens count by within their frame, [U, T, P]."""
        x, there = wide(frames.x), frames.full
        means = F.normalize(frames.mean(), dim=2, eps=1e-6)
        length = x.square().sum(3).sqrt()
        cosine = (x @ means[..., None])[..., 0] / (length * means.square().sum(2).sqrt()[..., None]).clamp_min(1e-6)
        low = length.masked_fill(~there, float("inf")).amin(2, keepdim=True)
        high = length.masked_fill(~there, 0).amax(2, keepdim=True)
        low = torch.minimum(low, high)
        return (1 - cosine) + (length - low) / (high - low + 1e-6)
