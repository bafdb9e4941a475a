# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.crops import alike_crops
from ..ops.groups import group_sizes, of_cells
from ..ops.kmeans import cluster_means, cosine_kmeans
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("vmtc")
@dataclass(frozen=True, repr=False)
class VMTC(InputStage):
    """Keep the patches that CLS attends to most and condense the others into a few clusters, weighted by that attention.

    The token half of Yang et al., "Enhancing Instruction-Following Capability of Visual-Language Models by Reducing Image
    Redundancy", arXiv 2411.15453 (no code was published; the other half masks attention inside the LLM). Of k tokens
    `clusters` (a number, or a ratio of k; 1/9 is 16 of 144) are made by k-means with cosine similarity from the encoder
    features of the patches that are not kept: 10 rounds from seeds spread evenly over their order by attention. A cluster
    becomes the mean of its patches weighted by attention, before the projector, and stands for the one that is attended to
    most. Output: [kept in raster order | clusters by their first patch], view by view. Each crop (thumbnail, tile, video
    frame) is treated alone, with a budget by its size; where an earlier stage has thinned the visual out, it is one crop. Without
    a CLS token the attention that a patch receives counts. Cost 20 N (k / 9) C.

    The paper loses a token for each cluster that ends up empty. The budget is exact here: for each of them the best patch that
    is not yet kept is kept too, as long as its cluster is more than it alone.
    """

    keep: float | int = 0.25
    clusters: float | int = 1 / 9
    paper: ClassVar[str] = "arXiv 2411.15453"
    merging: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = (("cls_attention", "received_attention"), "encoder_features")

    def __post_init__(self) -> None:
        super().__post_init__()
        known = isinstance(self.clusters, (int, float)) and not isinstance(self.clusters, bool)
        if not known or not (0 <= self.clusters < 1 if isinstance(self.clusters, float) else self.clusters >= 0):
            raise ValueError(f"clusters={self.clusters!r}: give a ratio of k in [0, 1) or a count >= 0")

    def select(self, visuals: Visuals) -> Selection:
        score = visuals["cls_attention", "received_attention"].detach().float()
        features = visuals["encoder_features"]
        views = visuals.layout.views if visuals.slots is None else ()
        share = self.clusters if isinstance(self.clusters, float) else self.clusters / visuals.k
        label, means, total = torch.full_like(score, _GONE, dtype=torch.int64), [], 0
        for part in alike_crops(views, visuals.n, visuals.k, score.device):
            count = min(max(1, round(share * part.k)) if share else 0, part.k - 1)
            w, x = part.take(score), part.take(features)
            own = self.filled(w, self.partition(w, x, part.k - count, count), count)
            means.append(cluster_means(x, w, own, count).unflatten(0, (len(score), -1)).flatten(1, 2))
            first = total + count * torch.arange(len(part.cells), device=score.device)[:, None]
            own = own.unflatten(0, (len(score), -1))
            label[:, part.cells] = torch.where(own < 0, own, own + first)
            total += count * len(part.cells)
        view = of_cells(visuals.layout.view_of(), None, score) if views else torch.zeros_like(label)
        keep, assign = self._ordered(score, label, view, visuals.k, total)
        rows = gather(visuals.features, keep)
        if total:
            made = visuals.project(torch.cat(means, 1).to(features.dtype)).to(rows.dtype)
            cluster = label.gather(1, keep)
            rows = torch.where((cluster < 0)[..., None], rows, gather(made, cluster.clamp_min(0)))
        return Selection(keep, assign, rows=rows, scores=score)

    @staticmethod
    @torch.no_grad()
    def partition(score: Tensor, features: Tensor, kept: int, clusters: int) -> Tensor:
        """Cluster of every patch of B crops, [B, n], or KEPT for the `kept` ones of the largest score [B, n].

        features [B, n, C]. Without clusters the others are GONE.
        """
        order = score.sort(dim=1, descending=True, stable=True).indices
        label, rest = torch.full_like(order, _KEPT), order[:, kept:]
        if not clusters:
            return label.scatter(1, rest, _GONE)
        seeds = (2 * torch.arange(clusters, device=rest.device) + 1) * rest.shape[1] // (2 * clusters)
        return label.scatter(1, rest, cosine_kmeans(gather(features, rest), seeds.expand(len(rest), -1)))

    @staticmethod
    def filled(score: Tensor, label: Tensor, clusters: int) -> Tensor:
        """The partition `label` [B, n] with one more patch kept for each empty cluster: the best by score [B, n], but never the
        last of its own cluster."""
        order = score.sort(dim=1, descending=True, stable=True).indices
        ranked = label.gather(1, order)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        group = (ranked + 1).clamp_min(0)
        last = torch.zeros_like(group).scatter_reduce(1, group, place, "amax", include_self=False)
        free = (ranked >= 0) & (place != last.gather(1, group))
        missing = (group_sizes(group, clusters + 1)[:, 1:] == 0).sum(1, keepdim=True)
        ranked = torch.where(free & (free.long().cumsum(1) <= missing), _KEPT, ranked)
        return label.scatter(1, order, ranked)

    @staticmethod
    def _ordered(score: Tensor, label: Tensor, view: Tensor, k: int, clusters: int) -> tuple[Tensor, Tensor]:
        """Slots of the output tokens [U, k] and the output token of each slot [U, N]: kept patches of a view, then its
        clusters."""
        n = score.shape[1]
        place = torch.arange(n, device=score.device).expand_as(label)
        rank = torch.empty_like(label).scatter(1, score.sort(dim=1, descending=True, stable=True).indices, place)
        group = (label + 1).clamp_min(0)
        none = torch.full((len(label), clusters + 1), n, dtype=torch.int64, device=label.device)
        best, first = (none.scatter_reduce(1, group, x, "amin").gather(1, group) for x in (rank, place))
        speaks = (label >= 0) & (rank == best)
        key = view * 2 * n + torch.where(label >= 0, n + first, place)
        key = key.masked_fill(~speaks & (label != _KEPT), torch.iinfo(torch.int64).max)
        keep = key.sort(dim=1, stable=True).indices[:, :k]
        output = torch.full_like(label, -1).scatter(1, keep, place[:, :k])
        of_cluster = torch.zeros_like(none).scatter(1, torch.where(speaks, group, 0), output)
        return keep, torch.where(label >= 0, of_cluster.gather(1, group), output)


_KEPT, _GONE = -1, -2
