# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.groups import best_of_groups, group_sizes, of_cells
from ..ops.shares import worth_shares
from ..plan import register
from ..selection import Selection
from ..stage import LayerStage, Need
from ..visuals import Visuals


@register("prunevid_prune")
@dataclass(frozen=True, repr=False)
class PruneVidPrune(LayerStage):
    """Before LLM layer `layer`, keep in every frame the tokens that the question attended to most one layer earlier.

    The part of `prunevid` in the language model: Huang, Zhou, Han, arXiv 2412.16117. The score is the largest attention that
    any head and any token of the instruction gives. `layer` is a number, or a part of the depth: the paper cuts behind layer 10
    of 32. Cost heads T S d.

    Departs from the reference in that the budget is exact and shared by frames (and pictures), where still and moving tokens of a
    window are told apart there, and groups of one or two lose all; and that the cache of the layers before the cut stays whole.
    """

    layer: int | float = 0.344
    keep: float | int = 0.4
    paper: ClassVar[str] = "arXiv 2412.16117"
    lays: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("text_attention_heads",)

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        score = self.asked(visuals["text_attention_heads"])
        frames = len(visuals.layout.views)
        group = of_cells(visuals.layout.view_of(), visuals.slots, visuals.features)
        sizes = group_sizes(group, frames)
        counts = worth_shares(sizes, sizes, visuals.k)
        kept = best_of_groups(score, group, counts)
        return Selection(
            kept.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, : visuals.k], scores=score
        )

    @staticmethod
    def asked(attention: Tensor) -> Tensor:
        """The largest attention of any head and word, [U, N], of [U, heads, T, N]; 0 without words."""
        return F.pad(attention.float(), (0, 0, 0, 1)).amax((1, 2))
