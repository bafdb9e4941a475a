# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.cells import nearest_of
from ..ops.groups import group_sizes
from ..ops.precision import normalized
from ..plan import register
from ..selection import Selection, gather
from ..visuals import Visuals
from .absorb import Absorb


@register("restore")
@dataclass(frozen=True, repr=False)
class Restore(Absorb):
    """Complete a method that selects: it fills the part `share` of k, and all other tokens are merged into the rest of k.

    "RESTORE: Rectifying Distortions of Visual Token Reduction", ICML 2026, arXiv 2606.01711; its merging, and kept positions.
    The anchors that others go to (largest cosine) are the tokens of largest density (sum of cosines) times distance to the
    nearest less dense one. A merged token is the mean of its members, stands at the lower median of their places, and weighs in
    the language model what it stands for. `host`: see absorb.

    calibrate: False weighs merged tokens by their mass, in all layers alike and while decoding too, which departs from the
    reference. True is the reference: in the prompt alone, what merged tokens stand for (in the first layer the mean of their
    visual), and for every pair of tokens log(2 - D), where D is the mean cosine of the angles that the rotary embedding puts
    between them, 1 for none. D is taken from the tables of each layer: where positions are no count (M-RoPE) it is the mean over
    axes, which the paper does not say, and layers without rotary embedding have none. Tokens of earlier turns get nothing added.

    Cost: the host's, and N^2 D with a table of N^2; calibrated, a mask of S^2 numbers for the first layer and one for the others.

    Departs from the reference, unless `calibrate`, in that masses stand for what it adds between tokens.
    """

    share: float = 0.5
    calibrate: bool = False
    paper: ClassVar[str] = "arXiv 2606.01711"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise ValueError(
                f"share={self.share}: give the part of the budget that the host fills, in [0, 1) (the paper: 0.5)"
            )
        if not isinstance(self.calibrate, bool):
            raise ValueError(f"calibrate={self.calibrate!r}: give True (the reference's bias) or False (mass)")

    @property
    def calibrates(self) -> bool:  # type: ignore[override]
        return self.calibrate

    @property
    def mass(self) -> bool:  # type: ignore[override]
        return not self.calibrate

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        alone = self.alone(visuals)
        taken = torch.zeros(visuals.features.shape[:2], dtype=torch.int64, device=alone.device).scatter(1, alone, 1)
        pool = taken.sort(dim=1, stable=True).indices[:, : visuals.n - alone.shape[1]]
        rows = gather(visuals.features, pool)
        anchors = self.anchors(rows, visuals.k - alone.shape[1])
        groups = torch.empty_like(taken).scatter(1, pool, nearest_of(rows, anchors))
        number = torch.arange(anchors.shape[1], visuals.k, device=alone.device).expand_as(alone)
        return _at_medians(groups.scatter(1, alone, number), visuals.k)

    def alone(self, visuals: Visuals) -> Tensor:
        """The tokens that the host keeps as they are, [U, int(share k)]."""
        count = int(visuals.k * self.share)
        if not count:
            return torch.empty(len(visuals.features), 0, dtype=torch.int64, device=visuals.features.device)
        return self.stage().select(replace(visuals, k=count)).keep

    @staticmethod
    def density(features: Tensor) -> Tensor:
        """Sum of the cosines of each token of [U, P, D] to all, itself included: [U, P]."""
        return _density(normalized(features))

    @staticmethod
    def anchors(features: Tensor, count: int) -> Tensor:
        """The tokens of [U, P, D] that others are merged into, ascending, [U, count]."""
        unit = normalized(features)
        dense = _density(unit)
        near = (
            torch.bmm(unit, unit.transpose(1, 2))
            .masked_fill(dense[:, None] >= dense[:, :, None], float("-inf"))
            .amax(2)
        )
        score = dense * (1 - near.masked_fill(near == float("-inf"), 0))
        return score.sort(dim=1, descending=True, stable=True).indices[:, :count].sort(dim=1).values


def _at_medians(groups: Tensor, k: int) -> Selection:
    """Groups [U, N] in [0, k), none of them empty, as means that stand at the lower median of their members."""
    size = group_sizes(groups, k)
    median = size.cumsum(1) - size // 2 - 1  # among all tokens, group after group
    keep, order = groups.sort(dim=1, stable=True).indices.gather(1, median).sort(dim=1)
    weight = size.gather(1, groups).float().reciprocal()
    return Selection(keep, order.argsort(dim=1).gather(1, groups), weight)


def _density(unit: Tensor) -> Tensor:
    return torch.bmm(unit, unit.sum(1)[..., None])[..., 0]
