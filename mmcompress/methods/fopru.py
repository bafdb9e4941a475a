# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.crops import alike_crops
from ..ops.groups import group_sizes, group_sum, of_cells
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("fopru")
@dataclass(frozen=True, repr=False)
class FoPru(InputStage):
    """Keep the patches (or rows of patches) through which most of the attention between patches goes.

    Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models", arXiv 2411.14164. A patch is scored by
    the attention that it receives from the patches, or by that which it gives them: whichever varies more over the crop.
    `strategy="rank"` keeps the best patches; "row" keeps whole rows of the grid, those with the largest sums, and fills up
    with the best patches of the next row to reach k exactly. Each crop (thumbnail, tile, video frame) is scored and pruned
    alone, with a budget by its size; where an earlier stage has thinned the visual out, it is one crop, and rows go by
    their means. Cost N log N beyond the signals.

    `score="prob"` reads attention after the softmax. What patches give is then almost the same for all (1 / N, less what
    goes to CLS), so a model without the signal `given_attention` is scored by `received_attention` alone, in which the CLS
    query counts as one more patch. `score="logit"`, which the one public code does, takes the means of the logits before
    the softmax; there is no substitute for them.

    Departs from that code: grids need not be square, and rows fill up to exactly k.
    """

    keep: float | int = 0.25
    strategy: str = "rank"
    score: str = "prob"
    paper: ClassVar[str] = "arXiv 2411.14164"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strategy not in ("rank", "row"):
            raise ValueError(f"strategy={self.strategy!r}: choose 'rank' or 'row'")
        if self.score not in ("prob", "logit"):
            raise ValueError(f"score={self.score!r}: choose 'prob' (after the softmax) or 'logit' (before it)")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        if self.score == "logit":
            return ("received_logits", "given_logits")
        return ("received_attention", ("given_attention", None))

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        kind = "attention" if self.score == "prob" else "logits"
        received, given = visuals[f"received_{kind}"].float(), visuals.signals.get(f"given_{kind}")
        grids = [view.grid for view in visuals.layout.views]
        count = sum(height for height, _ in grids)
        row = torch.arange(count).repeat_interleave(
            torch.tensor([width for height, width in grids for _ in range(height)])
        )
        row = of_cells(row, visuals.slots, visuals.features)
        views = visuals.layout.views if visuals.slots is None else ()
        keep, scores = [], received.clone()
        for part in alike_crops(views, visuals.n, visuals.k, received.device):
            score = part.take(received)
            if given is not None:
                score = _more_varied(score, part.take(given.float()))
                scores[:, part.cells] = score.unflatten(0, (len(scores), -1))
            order = score.sort(dim=1, descending=True, stable=True).indices
            if self.strategy == "row":
                rank = _rank_of_row(score, part.take(row), count)
                order = order.gather(1, rank.gather(1, order).sort(dim=1, stable=True).indices)
            keep.append(part.slots(order[:, : part.k]))
        return Selection.of(torch.cat(keep, 1), scores)


def _more_varied(received: Tensor, given: Tensor) -> Tensor:
    """Of two scores [B, n] the one with the larger variance in each row, `given` if they are equal."""
    received_varies, given_varies = ((x - x.mean(1, keepdim=True)).square().sum(1) for x in (received, given))
    return torch.where((received_varies > given_varies)[:, None], received, given)


def _rank_of_row(score: Tensor, row: Tensor, count: int) -> Tensor:
    """Place of the grid row that each token is in among the `count` rows, the best first, [B, n]; ties to the upper row."""
    mean = group_sum(score, row, count) / group_sizes(row, count).clamp_min(1)
    mean = mean.masked_fill(group_sizes(row, count) == 0, float("-inf"))
    best = mean.sort(dim=1, descending=True, stable=True).indices
    return best.argsort(dim=1).gather(1, row)
