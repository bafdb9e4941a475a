# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.crops import alike_crops
from ..ops.groups import group_sizes, group_sum, places_of
from ..ops.precision import normalized, wide
from ..ops.shares import fill_up
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("prunesid")
@dataclass(frozen=True, repr=False)
class PruneSID(InputStage):
    """Group the tokens by the principal component that they load on most, thin each group out, and share k over the groups.

    Fang et al., "Prune Redundancy, Preserve Essence" (PruneSID), ICLR 2026, arXiv 2603.09480. There are k / 4 components, of the
    tokens as columns of sigmoid(features). In a group the most important token suppresses those whose cosine to it is above a
    threshold, then the next one that is left, and so on; a group gets a share of k by how many survive, survivors first, each part
    by falling importance. With a CLS token, encoder features are grouped, its attention is the importance and the threshold k / 32
    times the mean cosine. Without, it is the rule for Qwen2-VL: the projected tokens, and their loading.
    As in the reference each crop is pruned alone; where an earlier stage has thinned the visual out, it is one crop.

    Cost N^2 C, the eigenvectors of a table of N^2, and N rounds over the tokens. Departs from the reference: its components come
    from a randomised method, so that two runs share about three quarters of their tokens, here they are exact; CLS itself is
    not kept; output is in raster order.
    """

    keep: float | int = 0.111
    paper: ClassVar[str] = "arXiv 2603.09480"
    needs: ClassVar[tuple[Need, ...]] = (("cls_attention", None), ("encoder_features", None))

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        early = "cls_attention" in visuals.signals and "encoder_features" in visuals.signals
        features = visuals["encoder_features"] if early else visuals.features
        attention = wide(visuals["cls_attention"]) if early else None
        keep = []
        views = visuals.layout.views if visuals.slots is None else ()
        for part in alike_crops(views, visuals.n, visuals.k, features.device):
            tokens = part.take(features)
            loadings = self.loadings(tokens, max(part.k // 4, 1 if early else 4))
            own = loadings.amax(2) if attention is None else part.take(attention)
            bound = self.threshold(tokens, part.k, early)
            groups = loadings.argmax(2)
            ranking, taken = self.shares(tokens, groups, own, bound, part.k, loadings.shape[2])
            keep.append(part.slots(self.picks(groups, ranking, taken, part.k)))
        return Selection.of(torch.cat(keep, 1), attention)

    @staticmethod
    def loadings(features: Tensor, components: int) -> Tensor:
        """How much each token of [U, N, C] loads on each principal component, [U, N, components], the largest component first."""
        channels = wide(features).sigmoid()
        channels = channels - channels.mean(2, keepdim=True)
        components = min(components, features.shape[1])
        return (
            torch.linalg.eigh(torch.bmm(channels, channels.transpose(1, 2)))
            .eigenvectors[..., -components:]
            .flip(2)
            .abs()
        )

    @staticmethod
    def threshold(features: Tensor, k: int, early: bool) -> Tensor:
        """Cosine above which a token is suppressed, [U]."""
        tokens = features.shape[1]
        unit = normalized(features)
        total, own = unit.sum(1).square().sum(1), unit.square().sum((1, 2))
        if early:
            return k / 32 * (total - own) / max(1, tokens * (tokens - 1))
        return max(18 * k / tokens, 1) * (total + own) / (2 * tokens**2)  # of the upper triangle as a whole matrix

    @staticmethod
    def survivors(features: Tensor, groups: Tensor, importance: Tensor, bound: Tensor) -> Tensor:
        """Which tokens no more important one of their group suppresses, [U, N] bool."""
        unit = normalized(features)
        close = (torch.bmm(unit, unit.transpose(1, 2)) > bound[:, None, None]) & (groups[:, :, None] == groups[:, None])
        order = importance.sort(dim=1, descending=True, stable=True).indices
        alive = importance > 0
        if close.device.type == "cpu":
            return _survivors(close, order, alive)
        for place in range(features.shape[1]):
            at = order[:, place : place + 1]
            gone = gather(close, at)[:, 0] & alive.gather(1, at)
            alive = alive & ~gone.scatter(1, order[:, : place + 1], False)  # no earlier one
        return alive

    def shares(
        self, features: Tensor, groups: Tensor, importance: Tensor, bound: Tensor, k: int, count: int, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Place of each token in the ranking of its group, [U, N], and how many each group gives, [U, count]. `first`: how many of
        the k go elsewhere."""
        alive = self.survivors(features, groups, importance, bound)
        sizes, left = group_sizes(groups, count), group_sum(alive.long(), groups, count)
        low = sizes.clamp_max(1)
        most = torch.minimum(sizes, left).clamp_max(5 * -(-k // 64))
        steps = torch.arange(k + 1, device=sizes.device)[:, None]
        grown = torch.minimum(most[:, None] + steps, sizes[:, None])
        enough = (grown.sum(2) >= k).long().argmax(1)
        most = gather(grown, enough[:, None])[:, 0]
        other = (k - first - low.sum(1, keepdim=True)).clamp_min(0)
        ends = (left.cumsum(1) / left.sum(1, keepdim=True).clamp_min(1) * other).round().long()
        taken = torch.minimum(ends - F.pad(ends, (1, -1)) + low, most)
        by_left = left.sort(dim=1, descending=True, stable=True).indices
        room = (most - taken).gather(1, by_left)
        missing = (k - first - taken.sum(1, keepdim=True)).clamp_min(0)
        taken = taken.scatter_add(1, by_left, fill_up(room, missing))
        return self.ranking(groups, alive, importance), taken

    @staticmethod
    def ranking(groups: Tensor, alive: Tensor, importance: Tensor) -> Tensor:
        """Place of each token among those of its group, [U, N]: survivors first, each part by falling importance."""
        order = importance.sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, (2 * groups + ~alive).gather(1, order).sort(dim=1, stable=True).indices)
        return places_of(order, groups)

    @staticmethod
    def picks(groups: Tensor, ranking: Tensor, taken: Tensor, k: int) -> Tensor:
        """The first `taken` [U, count] of each group's ranking, group after group, cut to k: [U, k]."""
        tokens = groups.shape[1]
        left_out = (ranking >= taken.gather(1, groups)).long()
        return ((left_out * tokens + groups) * tokens + ranking).sort(dim=1).indices[:, :k]


def _survivors(close: Tensor, order: Tensor, alive: Tensor) -> Tensor:
    """The rounds on the CPU, of which each takes longer to call than to do there. close [U, N, N], order and alive [U, N]."""
    found = np.zeros(alive.shape, bool)
    for table, places, here, out in zip(close.numpy(), order.numpy(), alive.numpy(), found, strict=True):
        table, here = table[places][:, places], here[places]
        for place, row in enumerate(table):
            if here[place]:
                here[place + 1 :] &= ~row[place + 1 :]
        out[places] = here
    return torch.from_numpy(found)
