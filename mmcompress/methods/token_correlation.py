# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ..ops.correlation import absorb, first_of, similar_count
from ..ops.crops import alike_crops, joined
from ..ops.outliers import iqr_threshold
from ..ops.shares import worth_shares
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import View, Visuals


@register("token_correlation")
@dataclass(frozen=True, repr=False)
class TokenCorrelation(InputStage):
    """Share the budget out over crops by how little they repeat themselves, keep what CLS attends to, fold in the rest.

    Zhang et al., "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding", arXiv
    2407.14439, built from what is published about it: there is no code, and values marked * are this library's own.
    A patch is redundant if more than `alpha` (*) of its crop have keys with a cosine above `tau` (*) to its key in the low
    block; a crop is worth as many tokens as it has patches that are not. First come those whose CLS attention in the deep
    block is an outlier, above Q3 + `outlier` (*) (Q3 - Q1), then by CLS attention in the low block; `sampling="gumbel"`
    draws these with it as probability, by `seed`. Each patch that goes is averaged into the kept one of its crop with the
    most similar key, weighted by that cosine if positive, the kept one by 1 (*), unless `aggregate=False`. Merging comes
    before the projector, output is in raster order. Cost N n d twice for crops of n, in blocks.
    `low` (*), `deep`: index of a block, or its part of the depth; deep None is the one whose output the LLM gets. Without a
    CLS token attention means what a patch receives. Crops are thumbnail, tiles, frames; a grid with a side over twice
    `window` is cut into parts of about `window` (*) a side (None: never); what an earlier stage has left is one crop.
    `whole_thumbnail=True` gives to tiles only what the thumbnail leaves over.

    Departs from the paper, where the number of kept tokens follows from the picture (`adaptive`): here the numbers of the
    crops are scaled to k together, rounded down, what is left going to those worth most.
    """

    keep: float | int = 0.67
    tau: float = 0.8
    alpha: float = 0.1
    outlier: float = 1.5
    low: float | int = 0.21
    deep: float | int | None = None
    aggregate: bool = True
    sampling: str = "top"
    seed: int = 0
    window: int | None = 16
    whole_thumbnail: bool = False
    paper: ClassVar[str] = "arXiv 2407.14439"
    merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (-1 <= self.tau <= 1 and 0 <= self.alpha <= 1 and self.outlier >= 0):
            given = f"tau={self.tau!r}, alpha={self.alpha!r}, outlier={self.outlier!r}"
            raise ValueError(f"{given}: give a cosine in [-1, 1], a part of the crop in [0, 1], a factor >= 0")
        for block in (self.low, self.low if self.deep is None else self.deep):
            if not (type(block) is int or (type(block) is float and 0.001 <= block <= 1)):
                raise ValueError(f"low or deep={block!r}: give the index of a block, or a part of the depth up to 1.0")
        if self.sampling not in ("top", "gumbel"):
            raise ValueError(f"sampling={self.sampling!r}: choose 'top' or 'gumbel' (by lot)")
        if self.window is not None and (type(self.window) is not int or self.window < 1):
            raise ValueError(f"window={self.window!r}: give a number of tokens, at least 1, or None")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        needs = (_attention(self.low), _attention(self.deep), f"joint_keys@{self.low}")
        return (*needs, "encoder_features") if self.aggregate else needs

    def select(self, visuals: Visuals) -> Selection:
        score, deep = (visuals[_attention(block)].detach().float() for block in (self.low, self.deep))
        low, keys = self._drawn(score), visuals[f"joint_keys@{self.low}"].detach()
        views = [self._cut(view) for view in visuals.layout.views] if visuals.slots is None else []
        parts = alike_crops(views, visuals.n, visuals.n, score.device)
        taken = [part.take(keys) for part in parts]
        worth = joined([self.local_count(x).view(len(score), -1) for x in taken]).float()
        if self.whole_thumbnail and views:
            whole = torch.cat([torch.full((v.cells,), v.role == "thumbnail", device=worth.device) for v in views])
            worth = worth * (1 + 1e6 * torch.cat([whole[part.cells[:, 0]] for part in parts]))
        room = torch.from_numpy(np.repeat([part.k for part in parts], [len(part.cells) for part in parts]))
        room = room.to(worth.device, non_blocking=True)
        quotas = worth_shares(worth, room, visuals.k).split([len(part.cells) for part in parts], 1)
        kept = torch.zeros_like(score, dtype=torch.bool)
        target, weight = torch.zeros_like(kept, dtype=torch.int64), torch.zeros_like(score)
        for part, x, quota in zip(parts, taken, quotas, strict=True):
            chosen = first_of(self.order(part.take(low), part.take(deep)), quota.reshape(-1, 1))
            kept = part.put(kept, chosen)
            if self.aggregate:
                into, share = absorb(x, chosen)
                target, weight = part.put(target, part.slots(into)), part.put(weight, share)
        keep = kept.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : visuals.k]
        if not self.aggregate:
            return Selection(keep, scores=score)
        assign = (kept.cumsum(1) - 1).gather(1, target).masked_fill(weight == 0, -1)
        merged, features = Selection(keep, assign, weight, scores=score), visuals["encoder_features"]
        return replace(merged, rows=visuals.project(merged.apply(features)))

    def adaptive(self, features: Tensor, keys: Tensor, low: Tensor, deep: Tensor) -> tuple[Tensor, Tensor]:
        """What B crops keep as in the paper: outliers, and as many of the best as are not redundant. A mask [B, n], and
        tokens [B, n, C] of which those it marks are the output.

        features [B, n, C]; keys [B, n, d] of the low block; CLS attention [B, n] of both. No budget of the frame can be
        like this: how many tokens leave a stage is known before the forward pass and the same for all visuals of a batch.
        """
        low, is_outlier = self._drawn(low.float().reshape(1, -1)).view_as(low), self.outliers(deep)
        local = first_of(low.sort(dim=1, descending=True, stable=True).indices, self.local_count(keys)[:, None])
        kept = first_of(self.order(low, deep), (local | is_outlier).sum(1, keepdim=True))
        if not self.aggregate:
            return kept, features
        slots = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
        return kept, Selection(slots, *absorb(keys, kept)).apply(features)

    def redundant(self, keys: Tensor) -> Tensor:
        """Patches that say what many others of their crop say, [B, n] bool, from keys [B, n, d]."""
        return similar_count(keys, self.tau) > self.alpha * keys.shape[1]

    def local_count(self, keys: Tensor) -> Tensor:
        """How many patches of each crop are not redundant, at least 1, [B]."""
        return (~self.redundant(keys)).sum(1).clamp_min(1)

    def outliers(self, deep: Tensor) -> Tensor:
        """Patches that stand out in the CLS attention [B, n] of the deep block, [B, n] bool."""
        return deep > iqr_threshold(deep, self.outlier)

    def order(self, low: Tensor, deep: Tensor) -> Tensor:
        """Places in each crop in the order in which they are kept, [B, n]: outliers by `deep`, then all others by `low`."""
        order = low.sort(dim=1, descending=True, stable=True).indices
        outlier = deep.float().masked_fill(~self.outliers(deep), float("-inf"))
        return order.gather(1, outlier.gather(1, order).sort(dim=1, descending=True, stable=True).indices)

    def _drawn(self, low: Tensor) -> Tensor:
        """What the local part goes by, [U, N]; by lot it is the same lot for all visuals, alone and in a batch."""
        if self.sampling == "top":
            return low
        lot = torch.rand(low.shape[1], generator=torch.Generator().manual_seed(self.seed)).clamp(1e-30, 1 - 1e-7)
        return low.clamp_min(1e-30).log() - (-lot.log()).log().to(low.device)

    def _cut(self, view: View) -> View:
        if self.window is None or any(view.seams) or max(view.grid) <= 2 * self.window:
            return view
        parts = [max(1, round(side / self.window)) for side in view.grid]
        rows, columns = ([side * i / n for i in range(1, n)] for side, n in zip(view.grid, parts, strict=True))
        return replace(view, seams=(tuple(rows), tuple(columns)))


def _attention(block: float | int | None) -> tuple[str, str]:
    where = "" if block is None else f"@{block}"
    return f"cls_attention{where}", f"received_attention{where}"
