# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import check_keep
from ..kernels.match import match
from ..ops.groups import best_of_groups, group_sizes, rank_within
from ..ops.segments import Places, peaks
from ..ops.still import Still, best_windows, same_throughout, unchanged
from ..ops.ties import largest
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, LayerStage, Need, Recipe, Stage
from ..visuals import Visuals


@register("holitom_merge")
@dataclass(frozen=True, repr=False)
class HoliTomMerge(InputStage):
    """Split the video into windows in which most stays the same, make one token of what does, and keep the attended of the rest.

    The part of `holitom` before the language model: Shao et al., NeurIPS 2025, arXiv 2505.21334. A token is still if its cosine
    with the one at its place in the next frame is above `tau`; dynamic programming finds the windows (of at most `longest`
    frames) that save most tokens. A place that is still throughout its window becomes the mean of its tokens, in the window's
    first frame; of these the density peaks are kept, by 7 neighbours or as many as are kept, each as `beta` of itself and the
    rest of the mean of those that are nearest to it. Of all other tokens each frame keeps those that receive most attention,
    unchanged. A picture, or what stands for no video, is one frame. Cost N C, n^2 C for the still places of a window of n, T^2
    for the windows.

    Departs from the reference in that the budget is exact: windows and frames share it by their size, where each is rounded by
    itself there; if it is more than all that is not the same, copies come back, the attended first. Output is in raster order,
    as the reference has it where a model has newlines in its grid; there the merged tokens of a window come first elsewhere.
    Its density clusters among the dynamic tokens, off in all published runs and broken, are not here.
    """

    keep: float | int = 0.25
    tau: float = 0.8
    beta: float = 0.6
    longest: int = 1024
    paper: ClassVar[str] = "arXiv 2505.21334"
    merging: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = (("received_attention", "cls_attention"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta!r}: give the part of the centre in a merged token, from 0 to 1")
        if type(self.longest) is not int or self.longest < 1:
            raise ValueError(f"longest={self.longest!r}: give a number of frames, an int of at least 1")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        at, score = Places.of(visuals), visuals["received_attention", "cls_attention"].float()
        if at.frames == 1:  # nothing that could stay the same
            return Selection.top(score, visuals.k)
        still = self.windows(visuals.features.detach(), at)[2]
        counts = still.shares(visuals.k)
        copies, still = still.copies(lambda: score, counts[:, -1:])
        return self.merged(still, at, score, counts, visuals.k, copies)

    def windows(self, features: Tensor, at: Places) -> tuple[Tensor, Tensor, Still]:
        """The first frame of the window of each frame, [U, T]; how many tokens are copies, [U]; and which."""
        same = unchanged(features, at, self.tau)[1]
        window, saved = best_windows(same, self.longest)
        return window, saved, Still.of(features, at, window, same_throughout(same, window, at))

    def merged(
        self, still: Still, at: Places, score: Tensor, counts: Tensor, k: int, copies: Tensor | None = None
    ) -> Selection:
        """The k tokens where each group of `still` keeps `counts` [U, 2 T + 1], and those of the mask `copies` [U, N] stay too."""
        moving = (still.group < 0) | (still.group >= at.frames)
        packed = still.packed(at, still.group.masked_fill(moving, -1))
        density = peaks(still.means, packed, counts[:, :-1].clamp(1, 7))
        kept = best_of_groups(torch.where(moving, score, density), still.number, counts) & (still.group >= 0)
        kept = kept if copies is None else kept | copies
        return Selection.into(kept, k, *still.gathered(packed, kept, k, self.beta), scores=score)


@register("holitom_inner")
@dataclass(frozen=True, repr=False)
class HoliTomInner(LayerStage):
    """Before LLM layer `layer`, keep the visual tokens that the last prompt token attended to most, and average the others into
    them.

    The part of `holitom` in the language model: Shao et al., NeurIPS 2025, arXiv 2505.21334. Each token that goes is averaged, half
    and half and one after the other, into the kept one with the most similar state, so that later ones weigh more. `layer` is a
    number, or a part of the depth: the paper's 18 of 28 is 0.643. Cost heads S d for the row and (N - k) k D for the match.
    """

    layer: int | float = 0.643
    keep: float | int = 0.5
    paper: ClassVar[str] = "arXiv 2505.21334"
    merging: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("last_attention",)

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        score, states = visuals["last_attention"].float(), visuals.features.detach()
        kept = largest(score, torch.full_like(score[:, :1], visuals.k, dtype=torch.int64))
        number = torch.arange(visuals.n, device=score.device).expand(kept.shape)
        nearest = match(states, states, query_mask=~kept, key_mask=kept)[1]
        into = torch.where(kept, number, nearest)
        late = group_sizes(into, visuals.n).gather(1, into) - 1  # how many are averaged into its target, from it on
        late = late - rank_within(-number.float(), into.masked_fill(kept, visuals.n)).masked_fill(kept, 0)
        return Selection.into(kept, visuals.k, into, 0.5**late, scores=score)


@register("holitom")
@dataclass(frozen=True, repr=False)
class HoliTom(Recipe):
    """Merge what stays the same in windows of a video, keep the attended of the rest, and merge once more in the language model.

    Shao et al., "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025, arXiv 2505.21334. Stands
    for holitom_merge(`keep`, `tau`) >> holitom_inner(`layer`, `inner`), where options, costs and deviations are described; the
    first alone is what the paper calls "w/o M". `keep` counts the tokens that enter the language model (tau=0.65 for 0.1, else
    0.8).
    """

    keep: float | int = 0.25
    tau: float = 0.8
    layer: int | float = 0.643
    inner: float | int = 0.5
    paper: ClassVar[str] = "arXiv 2505.21334"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        self.expand()

    def expand(self) -> tuple[Stage, ...]:
        return (HoliTomMerge(self.keep, self.tau), HoliTomInner(self.layer, self.inner))
