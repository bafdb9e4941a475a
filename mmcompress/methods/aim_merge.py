# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.bipartite import halvings, merge_in_steps
from ..ops.crops import alike_crops, joined
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Visuals

_KEYS = ("joint_keys@-1", "encoder_features")


@register("aim_merge")
@dataclass(frozen=True, repr=False)
class AIMMerge(InputStage):
    """Merge the visual tokens that are most alike in pairs, half of them at a time (the first half of `aim`).

    Zhong et al., "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", ICCV 2025, arXiv 2412.03248. Of
    the tokens in raster order every second one is a source and looks for the target it is most like; the best of them go into
    their targets, which become plain means. This is repeated, half of what is left (rounded down) each time and at last just
    as many as are over, so that k is exact: the paper's steps for 0.25 (196 -> 98 -> 49), 0.125 and 252 of 576. Each crop
    (thumbnail, tile, frame) is merged alone, with a budget by its size, never with another; where an earlier stage has thinned
    the visual out, it is one crop. Cost n^2 D / 4 for a crop of n, in blocks.

    metric  "features": tokens are compared, and merged, as they enter the LLM (the reference's way with videos); "keys": encoder
            features are merged before the projector, by the keys of the last block of the encoder (its way with images); None:
            "keys" for pictures where the model has them and no stage came before, else "features".

    A merged token has the place of its target, and output is in raster order. In the reference sources that stay come first, by
    falling similarity; steps inside follow that order, so that the same tokens are merged.
    """

    keep: float | int = 0.25
    metric: str | None = None
    paper: ClassVar[str] = "arXiv 2412.03248"
    merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric not in (None, "keys", "features"):
            raise ValueError(f"metric={self.metric!r}: choose 'keys', 'features' or None (keys for pictures)")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        wanted: dict[str | None, tuple[Need, ...]] = {"keys": _KEYS, None: tuple((name, None) for name in _KEYS)}
        return wanted.get(self.metric, ())

    def select(self, visuals: Visuals) -> Selection:
        by_keys = self._by_keys(visuals)
        metric = visuals["joint_keys@-1"] if by_keys else visuals.features
        features = visuals["encoder_features"] if by_keys else visuals.features
        merged = self._matched(visuals, metric.detach())
        rows = merged.apply(features)
        return replace(merged, rows=visuals.project(rows) if by_keys else rows)

    def _by_keys(self, visuals: Visuals) -> bool:
        if self.metric is None:
            frames = any(view.role == "frame" for view in visuals.layout.views)
            return not frames and visuals.slots is None and all(name in visuals.signals for name in _KEYS)
        return self.metric == "keys"

    @torch.no_grad()
    def _matched(self, visuals: Visuals, metric: Tensor) -> Selection:
        """Which tokens become one and what they weigh in it, by `metric` [U, N, d]."""
        shape, device = metric.shape[:2], metric.device
        assign, weight = torch.full(shape, visuals.k, device=device), torch.zeros(shape, device=device)
        keep = []
        views = visuals.layout.views if visuals.slots is None else ()
        crops = alike_crops(views, visuals.n, visuals.k, device)
        for part in crops:
            slots, into, share = merge_in_steps(part.take(metric), halvings(part.cells.shape[1], part.k))
            keep.append(part.slots(slots))
            assign = part.put(assign, part.numbers(into))
            weight = part.put(weight, share)
        ordered, order = joined(keep).sort(dim=1)
        place = order.argsort(dim=1)
        if sum(part.cells.numel() for part in crops) < visuals.n:  # some crops keep nothing
            place = F.pad(place, (0, 1), value=-1)
        return Selection(ordered, place.gather(1, assign), weight)
