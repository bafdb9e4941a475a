# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.crops import alike_crops, joined
from ..ops.outliers import iqr_threshold
from ..ops.precision import normalized, wide
from ..ops.ties import argmax_first
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need
from ..visuals import Visuals

_ELEMENTS = 1 << 22
"""Largest number of similarities that are held at a time."""


@register("prumerge")
@dataclass(frozen=True, repr=False)
class PruMerge(InputStage):
    """Keep the patches that CLS attends to most; each takes in its nearest patches, and one token more sums up the rest.

    Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", ICCV 2025, arXiv
    2403.15388. The weight w of a patch is the attention of CLS in the last block of the encoder, its heads taken as one.
    Of k tokens k - 1 are centres: those of the largest w, or with `plus=True` (PruMerge+) those whose w is an outlier
    (above Q3 + 1.5 (Q3 - Q1)) and, for what is left of the budget, evenly spaced ones among the others. To each centre the
    w-weighted sum of its `neighbours` patches with the most similar keys is added; one patch may go to several centres.
    The last token is the w-weighted sum of all patches that are no centres (it is all there is for k = 1); it takes the
    slot of the one of them with the largest w. Centres come by falling w, then those of the grid; `order="raster"` sorts
    them by place. Each crop (thumbnail, tile, video frame) is merged alone, with a budget by its size and a last token of
    its own; where an earlier stage has thinned the visual out, it is one crop. Merging comes before the projector. Cost
    N k C for similarities and again for sums, in blocks.

    Without a CLS token w is the attention that a patch receives, scaled to sum 1 in a crop. Departs from the reference,
    whose number of tokens follows from the picture or from a ratio: that is `adaptive`, the budget is exact here.
    """

    keep: float | int = 0.125
    plus: bool = False
    neighbours: int = 32
    order: str = "attention"
    paper: ClassVar[str] = "arXiv 2403.15388"
    merging: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = (
        ("cls_joint_attention@-1", "received_attention"),
        "joint_keys@-1",
        "encoder_features",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.plus) is not bool:
            raise ValueError(f"plus={self.plus!r}: choose True (PruMerge+, with evenly spaced centres) or False")
        if type(self.neighbours) is not int or self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours!r}: give how many patches a centre takes in (the paper: 32)")
        if self.order not in ("attention", "raster"):
            raise ValueError(f"order={self.order!r}: choose 'attention' (the reference) or 'raster'")

    def select(self, visuals: Visuals) -> Selection:
        score = visuals["cls_joint_attention@-1", "received_attention"].detach().float()
        features, keys = visuals["encoder_features"], visuals["joint_keys@-1"]
        views = visuals.layout.views if visuals.slots is None else ()
        keep, rows, assign = [], [], torch.full_like(score, -1, dtype=torch.int64)
        for part in alike_crops(views, visuals.n, visuals.k, score.device):
            w = part.take(score)
            if "cls_joint_attention@-1" not in visuals.signals:
                w = w / w.sum(1, keepdim=True).clamp_min(1e-30)
            centres = self.centres(w, part.k - 1)
            merged, into = self.merge(part.take(features), w, part.take(keys), centres)
            extra = argmax_first(w.scatter(1, centres, float("-inf")))[:, None]
            keep.append(part.slots(torch.cat([centres, extra], 1)))
            rows.append(merged.view(len(score), -1, merged.shape[2]))
            assign = part.put(assign, part.numbers(into.scatter(1, extra, part.k - 1)))
        return Selection(joined(keep), assign, rows=visuals.project(joined(rows)), scores=score)

    def centres(self, w: Tensor, count: int) -> Tensor:
        """Places [B, count] of the centres of B crops of n patches, w [B, n], count < n."""
        best = w.sort(dim=1, descending=True, stable=True).indices
        chosen = best[:, :count]
        if self.plus:
            is_outlier = w > iqr_threshold(w)
            outliers = is_outlier.sum(1, keepdim=True)
            others = is_outlier.to(torch.uint8).sort(dim=1, stable=True).indices
            place = torch.arange(count, device=w.device) - outliers
            spaced = (2 * place.clamp_min(0) + 1) * (w.shape[1] - outliers) // (2 * (count - outliers).clamp_min(1))
            spaced = others.gather(1, spaced.clamp_max(w.shape[1] - 1))
            chosen = torch.where(place < 0, chosen, spaced)
        return chosen.sort(dim=1).values if self.order == "raster" else chosen

    def merge(self, features: Tensor, w: Tensor, keys: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, c + 1, C] of B crops: one per centre [B, c], and the last one; and which of them each patch went into,
        [B, n]: of several centres the one that it is most like.

        features [B, n, C] before the projector, w [B, n], keys [B, n, d] with all heads side by side.
        """
        x, w, unit = (wide(t, features, w, keys) for t in (features, w, normalized(keys.detach())))
        (batch, n), count = w.shape, centres.shape[1]
        into = best = torch.full_like(w, count, dtype=torch.int64)
        rows, step, across = [], max(1, _ELEMENTS // (batch * n)), unit.transpose(1, 2)
        for first in range(0, count, step):
            own = centres[:, first : first + step]
            cosine = torch.bmm(gather(unit, own), across).scatter(2, own[..., None], float("-inf"))
            order = cosine.sort(dim=2, descending=True, stable=True).indices
            near = torch.zeros_like(cosine).scatter(2, order[..., : min(self.neighbours, n - 1)], 1.0)
            rows.append(gather(x, own) + torch.bmm(near * w[:, None], x))
            nearest, which = cosine.masked_fill(near == 0, float("-inf")).max(1)  # the first of equals
            into = torch.where(nearest > (best if first else float("-inf")), which + first if first else which, into)
            best = torch.maximum(best, nearest) if first else nearest
        place = torch.arange(count, device=w.device).expand_as(centres)
        rows.append(torch.bmm(w.scatter(1, centres, 0.0)[:, None], x))
        return torch.cat(rows, 1).to(features.dtype), into.scatter(1, centres, place)

    @staticmethod
    def outlier_share(w: Tensor) -> float:
        """Part of the patches of one crop, w [1, n], whose w is an outlier, at least one of them."""
        return max(1, int((w > iqr_threshold(w)).sum())) / w.shape[1]

    def adaptive(self, w: Tensor, ratio: float | None = None, compat: str | None = None) -> Tensor:
        """Centres of one crop as the paper chooses them, [1, c], for `merge`; w [1, n].

        As many by w as there are outliers, at least one, or the part `ratio` of all patches. With `plus`, places 0, s, 2s
        ... are added that are none yet, s a third of one centre's share of the patches; with a ratio they are a share
        apart, from the middle of the first one, and one that is a centre already comes twice, as in the reference. No
        budget of the frame can be like this: how many tokens leave a stage is known before the forward pass, the same
        for all visuals of a batch, and no slot comes twice; here it takes a look at the values (a synchronisation).
        `compat="reference"` cuts the number of outliers, which went through a ratio, down to an integer: one less for
        some n.
        """
        n = w.shape[1]
        share = self.outlier_share(w) if ratio is None else ratio
        count = round(n * share) if ratio is None and compat is None else int(n * share)
        chosen = w.sort(dim=1, descending=True, stable=True).indices[:, :count]
        if self.plus:
            step = int(1 / share)
            if ratio is None:
                grid = torch.arange(0, n - 1, max(1, step // 3), device=w.device)
                grid = grid[~torch.isin(grid, chosen)]
            else:
                grid = torch.arange(step // 2, n - 1, step, device=w.device)
            chosen = torch.cat([chosen, grid[None]], 1)
        return chosen.sort(dim=1).values if self.order == "raster" else chosen
