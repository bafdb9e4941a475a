# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.match import match
from ..kernels.merge import merge
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("visionzip")
@dataclass(frozen=True, repr=False)
class VisionZip(InputStage):
    """Keep the patches that CLS attends to most (dominant) and squeeze the rest into a few contextual tokens.

    Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467.
    Output: [CLS | dominant in raster order | contextual in the order of their targets], k tokens together; CLS counts.
    `contextual` is their number, or as a ratio their part of k (5/32 in the paper: 162 + 30, 108 + 20, 54 + 10).
    `merge="sum"` adds the mean of the merged patches to their target as the reference does; "mean" averages all of them.
    Without a CLS token the score is the attention that a patch receives, and no CLS is kept. Cost N^2 d at most.

    Departs from the reference: pictures of different sizes in a batch are compressed too (there they pass whole).
    """

    keep: float | int = 0.25
    contextual: float | int = 5 / 32
    merge: str = "sum"
    paper: ClassVar[str] = "arXiv 2412.04467"
    merging: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = (
        ("cls_attention", "received_attention"),
        "keys",
        "encoder_features",
        ("cls_feature", None),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.merge not in ("sum", "mean"):
            raise ValueError(f"merge={self.merge!r}: choose 'sum' (the reference) or 'mean'")
        if not (0 <= self.contextual < 1 if isinstance(self.contextual, float) else self.contextual >= 0):
            raise ValueError(f"contextual={self.contextual}: give a ratio in [0, 1) or a count >= 0")

    def select(self, visuals: Visuals) -> Selection:
        k, n = visuals.k, visuals.n
        score = visuals["cls_attention", "received_attention"].float()
        features, cls = visuals["encoder_features"], visuals.signals.get("cls_feature")
        extra = 0 if cls is None else 1
        context = round(self.contextual * k) if isinstance(self.contextual, float) else self.contextual
        context = min(context, k - 1)
        dominant = k - extra - context
        batch, device = score.shape[0], score.device

        chosen = Selection.top(score, dominant).keep
        is_rest = torch.ones_like(score, dtype=torch.bool).scatter(1, chosen, False)
        rest = is_rest.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : n - dominant]
        step = max(1, rest.shape[1] // context) if context else 1
        is_target = torch.zeros(rest.shape[1], dtype=torch.bool)
        is_target[: step * context : step] = True
        order = is_target.to(torch.uint8).sort(descending=True, stable=True).indices.to(device, non_blocking=True)
        targets, others = rest[:, order[:context]], rest[:, order[context:]]

        place = torch.arange(k, device=device).expand(batch, -1)
        assign = torch.full((batch, n), -1, device=device)
        assign = assign.scatter(1, chosen, place[:, extra : extra + dominant])
        assign = assign.scatter(1, targets, place[:, extra + dominant :])
        parts = [gather(features, chosen)]
        if context:
            nearest = match(*(gather(visuals["keys"], slots) for slots in (others, targets)))[1]
            assign = assign.scatter(1, others, extra + dominant + nearest)
            parts.append(self._contextual(features, targets, others, nearest))
        keep = torch.cat([chosen, targets], 1)
        if cls is not None:
            # CLS stands for no patch; it takes the place of the lowest patch that has no output token of its own.
            keep = torch.cat([others.amin(1, keepdim=True), keep], 1)
            parts.insert(0, cls[:, None].to(features.dtype))
        return Selection(keep, assign, rows=visuals.project(torch.cat(parts, 1)), scores=score)

    def _contextual(self, features: Tensor, targets: Tensor, others: Tensor, nearest: Tensor) -> Tensor:
        """Contextual tokens [U, context, C] before the projector."""
        context = targets.shape[1]
        if self.merge == "mean":
            place = torch.arange(context, device=targets.device).expand_as(targets)
            members = gather(features, torch.cat([targets, others], 1))
            return merge(members, torch.cat([place, nearest], 1), context, mean=True)
        added = merge(gather(features, others).float(), nearest, context, mean=True)
        return (gather(features, targets) + added).to(features.dtype)
