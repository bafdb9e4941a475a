# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import check_keep
from ..kernels.merge import merge
from ..ops.groups import best_of_groups, group_sizes, group_sum
from ..ops.precision import wide
from ..ops.segments import Packed, Places, likeness, nearest_of_group, of_segment, peaks, segments
from ..ops.shares import split_budget, worth_shares
from ..ops.trees import apart, bounded, children, fewer, joins, roots
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need, Recipe, Stage
from ..visuals import Visuals
from .fastv import FastV


@register("flashvid_merge")
@dataclass(frozen=True, repr=False)
class FlashVIDMerge(InputStage):
    """Keep tokens that are attended to and far apart in every frame, join the others over time into trees, and cluster their roots.

    The part of `flashvid` before the language model: Fan et al., ICLR 2026, arXiv 2602.08024. The video is cut where
    neighbouring frames (means of their tokens) have a cosine below `cut`, and where it is lowest, into at least `segments`. The
    part `alpha` of the budget of each frame are tokens chosen by greedy max-min on cosine distance times received attention,
    times the dot product with the mean of the segment (`events=False`: without), unchanged. Each other token joins the most
    similar one of the frame before, at any place, if their cosine is above `tau`; a tree becomes the mean of its tokens, at its
    first. What is left of the budget are clusters of these roots by density peaks of 7 neighbours in each frame, plain means at
    their centres. A picture, or what stands for no video, is one frame. Cost 3 n^2 C for a frame of n, in blocks.

    Departs from the reference in that the budget is exact (there each frame rounds up), in that tokens chosen in a segment of
    one frame are not averaged into its clusters a second time, and that a token with a negative weight counts as one without.
    `compat="reference"` divides the sum of a tree by one more than the children of its root, as its code does, so that long
    trees get long vectors.
    """

    keep: float | int = 0.3125
    alpha: float = 0.7
    tau: float = 0.8
    cut: float = 0.9
    segments: int = 8
    events: bool = True
    compat: str | None = None
    paper: ClassVar[str] = "arXiv 2602.08024"
    merging: ClassVar[bool] = True
    positions: ClassVar[str] = "keep"
    needs: ClassVar[tuple[Need, ...]] = (("received_attention", "cls_attention"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}: give the part of the budget that is kept as it is, from 0 to 1")
        if type(self.segments) is not int or self.segments < 1:
            raise ValueError(f"segments={self.segments!r}: give a number of segments, an int of at least 1")
        if self.compat not in (None, "reference"):
            raise ValueError(f"compat={self.compat!r}: choose None or 'reference' (trees as its code sums them)")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        at, x, k = Places.of(visuals), visuals.features.detach(), visuals.k
        score = visuals["received_attention", "cls_attention"]
        budget = split_budget(k, [1] * at.frames)
        kept = [math.ceil(round(self.alpha * part, 6)) for part in budget]
        room = at.sizes()
        alone = torch.minimum(torch.tensor(kept).to(room.device, non_blocking=True), room)
        left, means = k - alone.sum(1, keepdim=True), self.means(x, at)
        segment = self.segment(means)
        chosen = self.chosen(x, at, means, segment, score, alone, sum(kept))
        parent, counts = torch.full_like(at.frame, -1), left
        if at.frames > 1:
            whole = torch.tensor(budget).to(room.device, non_blocking=True).expand_as(room)
            parent, cosine = joins(x, at, segment, ~chosen, self.tau)
            parent = bounded(parent, cosine, at, segment, whole)
            free = visuals.n - alone.sum(1, keepdim=True)
            parent = fewer(parent, cosine, torch.zeros_like(parent), free - left)
        root = (parent < 0).masked_fill(chosen, False)
        if at.frames > 1:
            found = group_sum(root.long(), at.frame, at.frames)
            part = of_segment(whole - alone, segment) / of_segment(found, segment).clamp_min(1)
            counts = worth_shares(found * part, found, left)
        into, weight, centre = self.clustered(x, at, parent, root, counts, k)
        into = torch.where(chosen, torch.arange(visuals.n, device=x.device), into)
        return Selection.into(chosen | centre, k, into, weight.masked_fill(chosen, 1), scores=score)

    @staticmethod
    def means(x: Tensor, at: Places) -> Tensor:
        """Means of the tokens [U, N, C] of each frame, [U, T, C]."""
        return merge(wide(x), at.frame, at.frames, mean=True)

    def segment(self, means: Tensor) -> Tensor:
        """Number of the segment of each frame, [U, T], of frames with these means [U, T, C]."""
        return segments(likeness(means), self.segments, self.cut)

    def chosen(
        self, x: Tensor, at: Places, means: Tensor, segment: Tensor, score: Tensor, counts: Tensor, most: int
    ) -> Tensor:
        """The `counts` [U, T] tokens of each frame that are kept as they are, [U, N] bool; most: no row of counts sums to more."""
        weight = wide(score)
        if self.events:
            typical = means
            if at.frames > 1:
                typical = gather(merge(means, segment, at.frames, mean=True), segment.gather(1, at.frame))
            weight = weight * (wide(x) * typical).sum(2)
        return apart(x, at, weight, counts, most)

    def clustered(
        self, x: Tensor, at: Places, parent: Tensor, root: Tensor, counts: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Clusters of the trees whose roots the mask `root` [U, N] has, `counts` [U, T] in each frame, at most `k` in all: the
        centre that each token goes into and its share there, both [U, N], and the centres, [U, N] bool."""
        top: Tensor | None = None
        weight: Tensor | float = 1.0
        values = x
        if at.frames > 1:
            top = roots(parent, at.frames)
            weight, values = self.trees(x, parent, top)
        group = at.frame.masked_fill(~root, -1)
        packed = Packed(group, at.frames, at.most)
        density = peaks(values, packed, counts.clamp(1, 7))
        centre = best_of_groups(density, group % (at.frames + 1), F.pad(counts, (0, 1)))
        nearest = nearest_of_group(values, packed, centre, k * len(x))
        number = nearest + 1
        many = group_sizes(number, at.tokens + 1).gather(1, number).float()
        if top is not None:
            nearest, many = nearest.gather(1, top), many.gather(1, top)
        return nearest, (weight / many).masked_fill(nearest < 0, 0), centre

    def trees(self, x: Tensor, parent: Tensor, root: Tensor) -> tuple[Tensor, Tensor]:
        """The weight of each token in its tree, [U, N], and what the trees are, at their roots, [U, N, C]."""
        sizes = 1 + children(parent) if self.compat else group_sizes(root, root.shape[1])
        weight = 1 / sizes.gather(1, root).float()
        return weight, merge(x, root, root.shape[1], weight)


@register("flashvid")
@dataclass(frozen=True, repr=False)
class FlashVID(Recipe):
    """Keep what is attended to and far apart, join the rest over time into trees, and prune once more in the language model.

    Fan et al., "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging", ICLR
    2026, arXiv 2602.08024. Stands for flashvid_merge(`keep` * `expansion`) >> fastv(`layer`, `inner`), where options, costs and
    deviations are described. `keep` is the mean over all layers for the paper's `layer` 20 of 28 and `inner` of 0.3.
    """

    keep: float | int = 0.25
    expansion: float = 1.25
    layer: int | float = 0.714
    inner: float | int = 0.3
    compat: str | None = None
    paper: ClassVar[str] = "arXiv 2602.08024"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        if not self.expansion >= 1:
            raise ValueError(f"expansion={self.expansion!r}: give a factor of at least 1 (the paper: 1.25)")
        self.expand()

    def expand(self) -> tuple[Stage, ...]:
        more = self.keep * self.expansion
        keep = min(1.0, more) if isinstance(self.keep, float) else round(more)
        return (FlashVIDMerge(keep, compat=self.compat), FastV(self.layer, self.inner))
