# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.merge import merge
from ..ops.anchors import into_anchors
from ..ops.groups import best_of_groups
from ..ops.known import known_zero
from ..ops.precision import wide
from ..ops.segments import Packed, Places, first_of_segment, likeness, of_segment, peaks, segments
from ..ops.shares import split_budget
from ..ops.ties import largest
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("fastvid")
@dataclass(frozen=True, repr=False)
class FastVID(InputStage):
    """In every frame keep the attended tokens; average the rest of a segment into the density peaks of a few of its frames.

    Shen et al., "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025, arXiv 2503.11187. The video
    is cut where neighbouring frames (means of their tokens) have a cosine below `tau`, and where it is lowest, into at least
    `segments`. A segment has the budget of its frames, of which the part `context` goes to anchors. All other tokens are the most
    attended of each frame, unchanged. Anchors stand in every `step`-th frame of the segment, counted back from its last: the peaks
    of what is not salient there, by 4 neighbours. Each token of the segment that is not salient goes to its most similar anchor in
    each of these frames; an anchor of n tokens becomes w times itself plus 1 - w times their mean, w = max(`beta`, 1 / (n + 1)).
    `loop=True` is the rule of the reference's versions for LLaVA-Video and Qwen2.5-VL: anchors of a frame are not in its own pool,
    and with `ignore` (0.95 there, with tau=0.84) of consecutive frames that alike only the last keeps tokens. A picture, or what
    stands for no video, is one frame. Cost N n C / 2 for the peaks of frames of n, 2 N (context k) C for anchors, in blocks.

    Departs from the reference in that the budget is exact: shares of frames go to the earliest first where they do not come out
    even, anchors are at most half of a frame, and what then is left goes to the most attended of all others. Attention is what CLS
    gives or a patch receives; the pooling head of SigLIP, which the reference takes it from, is not part of these models.
    """

    keep: float | int = 0.25
    segments: int = 8
    tau: float = 0.9
    context: float = 0.4
    step: int = 4
    beta: float = 0.6
    loop: bool = False
    ignore: float | None = None
    paper: ClassVar[str] = "arXiv 2503.11187"
    merging: ClassVar[bool] = True
    positions: ClassVar[str] = "keep"
    needs: ClassVar[tuple[Need, ...]] = (("cls_attention", "received_attention"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("segments", self.segments), ("step", self.step)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: give a number of segments or frames, an int of at least 1")
        for name, part in (("context", self.context), ("beta", self.beta)):
            if not 0 <= part <= 1:
                raise ValueError(f"{name}={part!r}: give a part, from 0 to 1 (the paper: context=0.4, beta=0.6)")
        if self.ignore is not None and not self.loop:
            raise ValueError(f"ignore={self.ignore!r} leaves out frames of the rule that loop=True asks for: give both")

    def select(self, visuals: Visuals) -> Selection:
        at = Places.of(visuals)
        with torch.no_grad():
            similar = likeness(merge(wide(visuals.features), at.frame, at.frames, mean=True))
            segment = segments(similar, self.segments, self.tau)
            score = visuals["cls_attention", "received_attention"].float()
            salient, context = self.counts(similar, segment, at.sizes(), visuals.k)
            salient, anchor = self.chosen(visuals.features, score, at, salient, context)
            more = visuals.k - (salient | anchor).sum(1, keepdim=True)
            if not known_zero(more):
                salient = salient | largest(score, more, ~(salient | anchor))
        return self.merged(
            visuals.features, at, segment, salient, anchor, visuals.k, int(visuals.k * self.context) + at.frames
        )

    def leaders(self, similar: Tensor, segment: Tensor) -> Tensor:
        """Frames that keep tokens, [U, T] bool; similar [U, T - 1], segment [U, T]."""
        if self.ignore is None:
            return torch.ones_like(segment, dtype=torch.bool)
        return ~F.pad((similar >= self.ignore) & (segment.diff(dim=1) == 0), (0, 1))

    def anchor_frames(self, lead: Tensor, segment: Tensor) -> Tensor:
        """Every `step`-th frame of those that keep tokens, from the last of each segment on, [U, T] bool."""
        place = lead.long().cumsum(1) - first_of_segment(lead.long().cumsum(1) - lead.long(), segment) - 1
        return lead & ((of_segment(lead.long(), segment) - 1 - place) % self.step == 0)

    def shared(self, total: Tensor, frames: Tensor, segment: Tensor) -> Tensor:
        """`total` [U, T], the tokens of the segment of each frame, over those of its `frames` [U, T] bool, the earliest take
        more."""
        before = frames.long().cumsum(1) - frames.long()
        number = of_segment(frames.long(), segment).clamp_min(1)
        return (total // number + (before - first_of_segment(before, segment) < total % number)) * frames

    def counts(self, similar: Tensor, segment: Tensor, sizes: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """How many salient tokens and how many anchors each frame has, both [U, T], of `sizes` [U, T]."""
        even = torch.tensor(split_budget(k, [1] * segment.shape[1])).to(segment.device, non_blocking=True)
        return self.counts_of(even.expand_as(segment), similar, segment, sizes)

    def counts_of(self, budget: Tensor, similar: Tensor, segment: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a `budget` [U, T] of each frame."""
        lead, total = self.leaders(similar, segment), of_segment(budget, segment)
        anchors = (total * self.context).long()
        context = self.shared(anchors, self.anchor_frames(lead, segment), segment)
        context = torch.minimum(context, sizes // 2)
        return torch.minimum(self.shared(total - anchors, lead, segment), sizes - context), context

    def chosen(
        self, features: Tensor, score: Tensor, at: Places, salient: Tensor, context: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Which tokens are salient and which anchors, both [U, N] bool, by how many there are in each frame, [U, T] both."""
        first = best_of_groups(score, at.frame, salient)
        density = self.density(features, first, at)
        return first, best_of_groups(density, at.frame, context) & ~first

    @staticmethod
    def density(features: Tensor, salient: Tensor, at: Places) -> Tensor:
        """Logarithm of density times gap of the tokens that are not salient, [U, N]; -inf for those."""
        return peaks(features.detach(), Packed(at.frame.masked_fill(salient, -1), at.frames, at.most), 4)

    def merged(
        self, features: Tensor, at: Places, segment: Tensor, salient: Tensor, anchor: Tensor, k: int, most: int
    ) -> Selection:
        """The k salient tokens and anchors, of these at most `most`."""
        own = segment.gather(1, at.frame)
        anchors = anchor.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : min(most, at.tokens)]
        real = anchor.gather(1, anchors)
        made, into = into_anchors(features, ~salient, own, at.frame, anchors, real, self.beta, not self.loop, at.frames)
        keep = (salient | anchor).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :k]
        index = anchors[..., None].expand_as(made)
        rows = features.scatter(1, index, torch.where(real[..., None], made, gather(features, anchors)))
        place = torch.arange(k, device=keep.device).expand_as(keep)
        number = torch.full_like(own, -1).scatter(1, keep, place)
        slot = torch.where(into < 0, -1, anchors.gather(1, into.clamp_min(0)))
        goes = torch.where(salient | anchor, number, torch.where(slot < 0, -1, number.gather(1, slot.clamp_min(0))))
        return Selection(keep, goes, rows=gather(rows, keep))
