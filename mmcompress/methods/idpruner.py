# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.diverse import expand
from ..ops.precision import wide
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("idpruner")
@dataclass(frozen=True, repr=False)
class IDPruner(InputStage):
    """Keep k tokens by maximal marginal relevance: each is the best balance of importance and being unlike those kept so far.

    "IDPruner: Harmonizing Importance and Diversity in Visual Token Pruning for MLLMs", 2026, arXiv 2602.13315.
    A token is worth `balance` times its importance, brought to [0, 1] within the visual, less 1 - `balance` times its
    largest cosine to a token that is kept; 1 is plain top-k. `together` tokens are taken by one look (faster, lets near
    duplicates in). Importance is the attention of CLS, or without one that received by the token: the trained scorer of the
    paper is not part of this library, and most of its published gain comes from that scorer.

    Cost N^2 D and k N with a table of N^2; above 4,096 tokens k N D and O(N). Departs from the reference: each visual has its own
    budget and its own scale, not one pool for all.
    """

    keep: float | int = 0.25
    balance: float = 0.5
    together: int = 1
    paper: ClassVar[str] = "arXiv 2602.13315"
    needs: ClassVar[tuple[Need, ...]] = (("cls_attention", "received_attention"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise ValueError(f"balance={self.balance}: give the weight of importance, in [0, 1] (the paper: 0.5)")
        if type(self.together) is not int or self.together < 1:
            raise ValueError(f"together={self.together!r}: give how many tokens are picked at a time, at least 1")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        importance = self.importance(visuals["cls_attention", "received_attention"])
        return Selection.of(self.picks(visuals.features, importance, visuals.k), importance)

    @staticmethod
    def importance(scores: Tensor) -> Tensor:
        """Scores [U, N] brought to [0, 1] within each visual."""
        scores = wide(scores)
        low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        return (scores - low) / (high - low + 1e-6)

    def picks(self, features: Tensor, importance: Tensor, k: int) -> Tensor:
        """The tokens of `features` [U, N, D] in the order they are picked, [U, k]."""
        far = torch.full_like(importance, 1 - self.balance)
        return expand(features, k, far, self.balance * importance, together=self.together)
