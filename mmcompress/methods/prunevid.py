# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import check_keep
from ..kernels.merge import merge
from ..ops.density import density_peaks
from ..ops.groups import best_of_groups, group_sizes
from ..ops.precision import wide
from ..ops.runs import longest_runs, windows_of
from ..ops.segments import Places, peaks
from ..ops.still import Still, window_lengths
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Recipe, Stage
from ..visuals import Visuals
from .prunevid_prune import PruneVidPrune

_NEIGHBOURS = 7


@register("prunevid_merge")
@dataclass(frozen=True, repr=False)
class PruneVidMerge(InputStage):
    """Cluster frames into windows, average the places that stay the same in one, and cluster what is left inside each frame.

    The part of `prunevid` before the language model: Huang, Zhou, Han, arXiv 2412.16117. Frames are clustered by density peaks
    of their means, into `windows` of their number; of each cluster only the longest run stays, other frames join the longer
    neighbour. A place whose tokens have a mean cosine above `tau` within the window becomes their mean, in the window's first
    frame. These, and the other tokens of every frame, are clustered by density peaks of 7 neighbours; a cluster is the plain
    mean, at its centre. A picture, or what stands for no video, is one frame. Cost N C and n^2 C for groups of n, in blocks.

    Departs from the reference in that the budget is exact: groups share it by their size, also those of 14 tokens or fewer, which
    are not clustered there (its part of each is 0.5); if it is more than all that is not the same, copies come back. Output is in
    raster order, in the reference a group is in the order of its peaks.
    """

    keep: float | int = 0.4
    tau: float = 0.8
    windows: float = 0.25
    paper: ClassVar[str] = "arXiv 2412.16117"
    merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.windows <= 1:
            raise ValueError(
                f"windows={self.windows!r}: give the number of windows as a part of that of the frames, up to 1.0"
            )

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        at, features = Places.of(visuals), visuals.features.detach()
        if at.frames == 1:
            still = Still.of_picture(features, at)
        else:
            still = self.still(features, at, self.window(self.labels(features, at)))
        counts = still.shares(visuals.k)
        copies, still = still.copies(
            lambda: (features - gather(still.means, still.head)).float().square().sum(2), counts[:, -1:]
        )
        return self.merged(still, at, self.density(still, at), counts, visuals.k, copies)

    def labels(self, features: Tensor, at: Places) -> Tensor:
        """The cluster of each frame, [U, T]."""
        means = merge(wide(features), at.frame, at.frames, mean=True)
        return density_peaks(means, max(1, int(at.frames * self.windows)), min(_NEIGHBOURS, at.frames))[1]

    @staticmethod
    def window(labels: Tensor) -> Tensor:
        """The first frame of the window of each frame, [U, T], by their clusters."""
        return windows_of(longest_runs(labels))

    def still(self, features: Tensor, at: Places, window: Tensor) -> Still:
        """What stays the same in these windows."""
        unit, place = F.normalize(wide(features), dim=-1), window.gather(1, at.frame) * at.most + at.cell
        total = merge(unit, place, at.frames * at.most).square().sum(2).gather(1, place)
        there = group_sizes(place, at.frames * at.most).gather(1, place)
        own = merge(unit.square().sum(2), place, at.frames * at.most).gather(1, place)
        frames = window_lengths(window).gather(1, at.frame)
        alike = torch.where(frames > 1, (total - own) / (frames * (frames - 1)).clamp_min(1), 1.0)
        return Still.of(features, at, window, (alike > self.tau) & (there == frames))

    @staticmethod
    def density(still: Still, at: Places) -> Tensor:
        """How much each token is a peak of its group, [U, N]."""
        return peaks(still.means, still.packed(at), _NEIGHBOURS)

    @staticmethod
    def merged(
        still: Still, at: Places, density: Tensor, counts: Tensor, k: int, copies: Tensor | None = None
    ) -> Selection:
        """The k tokens where each group of `still` keeps `counts` [U, 2 T + 1], and those of the mask `copies` [U, N] stay too."""
        kept = best_of_groups(density, still.number, counts) & (still.group >= 0)
        kept = kept if copies is None else kept | copies
        return Selection.into(kept, k, *still.gathered(still.packed(at), kept, k))


@register("prunevid")
@dataclass(frozen=True, repr=False)
class PruneVid(Recipe):
    """Merge what stays the same in windows of a video and what is alike in a frame, then keep what the question attends to.

    Huang, Zhou, Han, "PruneVid: Visual Token Pruning for Efficient Video Large Language Models", ACL 2025, arXiv 2412.16117.
    Stands for prunevid_merge(`keep`, `tau`) >> prunevid_prune(`layer`, `inner`), where options, costs and deviations are
    described. `keep` counts the tokens that enter the language model; with the paper's `inner` of 0.4 about 16 % of all are
    left behind the cut.
    """

    keep: float | int = 0.4
    tau: float = 0.8
    layer: int | float = 0.344
    inner: float | int = 0.4
    paper: ClassVar[str] = "arXiv 2412.16117"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        self.expand()

    def expand(self) -> tuple[Stage, ...]:
        return (PruneVidMerge(self.keep, self.tau), PruneVidPrune(self.layer, self.inner))
