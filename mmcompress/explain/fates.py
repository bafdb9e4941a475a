# SPDX-License-Identifier: Apache-2.0
"""What became of every cell, stage by stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.packing import Group
from ..trace import Trace, VisualTrace
from .cells import rows_in_layer

GONE = -1
KEPT, MERGED, DROPPED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Step:
    """The cells of all visuals of a prompt, numbered through, behind one stage of a plan.

    stage   its plan string, "" before any stage.  layer: the LLM layer that it cuts before; None: before the LLM.
    stands  [N] int64: the cell whose token stands for each cell; itself if it is kept, another one if it was merged, GONE.
    scores  [N] float32: by what the stage chose, NaN at cells that it did not see; None if it does not say.
    """

    stage: str
    layer: int | None
    stands: Tensor
    scores: Tensor | None = None

    @property
    def fate(self) -> Tensor:
        """KEPT, MERGED or DROPPED of each cell, [N]."""
        own = self.stands == torch.arange(len(self.stands))
        return torch.where(own, KEPT, torch.where(self.stands < 0, DROPPED, MERGED))

    @property
    def share(self) -> Tensor:
        """How many cells the token that stands for a cell stands for, [N]; 0 where it is gone."""
        sizes = torch.zeros(len(self.stands) + 1, dtype=torch.int64)
        sizes.index_add_(0, self.stands % len(sizes), torch.ones_like(self.stands))
        sizes[-1] = 0  # where GONE was counted
        return sizes[self.stands]

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return len(self.stands[self.stands >= 0].unique())


def steps(trace: Trace, row: int = 0) -> list[Step]:
    """All cells first, then every decision of the plan about the visuals in a batch row, in order."""
    return steps_of([v for v in trace.visuals if v.row == row])


def steps_of(visuals: Sequence[VisualTrace]) -> list[Step]:
    """The same for some visuals of one row, at least one."""
    call, row = visuals[0].call, visuals[0].row
    first = [0, *itertools.accumulate(v.tokens for v in visuals)]
    found = [Step("", None, torch.arange(first[-1]))]
    for stage in dict.fromkeys(d.stage for v in visuals for d in v.span.decisions):
        stands, scores = found[-1].stands.clone(), torch.full((first[-1],), float("nan"))
        for visual, begin in zip(visuals, first, strict=False):
            for decision in visual.span.decisions:
                if decision.stage == stage:
                    one = slice(visual.span.selection_row, visual.span.selection_row + 1)
                    before, after = decision.before.assignment(visual.tokens), decision.after.assignment(visual.tokens)
                    to = after[one][0].cpu()
                    at = decision.after.keep[one][0].cpu()[to.clamp_min(0)]
                    stands[begin : begin + visual.tokens] = torch.where(to < 0, GONE, begin + at)
                    if decision.scores is not None:
                        seen = before[one][0].cpu()
                        values = decision.scores[one][0].float().cpu()[seen.clamp_min(0)]
                        scores[begin : begin + visual.tokens] = values.masked_fill(seen < 0, float("nan"))
        found.append(Step(stage, None, stands, None if bool(scores.isnan().all()) else scores))
    place = torch.full((call.length,), GONE)
    for visual, begin in zip(visuals, first, strict=False):
        place[visual.span.patches] = begin + torch.arange(visual.tokens)
    for earlier, group in itertools.pairwise(call.groups):
        stands = torch.cat([_cells(visual, group.start, place) for visual in visuals])
        found.append(Step(group.stage, group.start, stands, _scores(earlier, group, row, place, found[-1].stands)))
    return found


def step_of_layer(found: list[Step], layer: int) -> int:
    """Number of the step that says what enters LLM layer `layer`."""
    return max(i for i, step in enumerate(found) if step.layer is None or step.layer <= layer)


def _cells(visual: VisualTrace, layer: int, place: Tensor) -> Tensor:
    rows = rows_in_layer(visual, layer)
    return torch.where(rows < 0, GONE, place[rows.clamp_min(0)])


def _scores(before: Group, group: Group, row: int, place: Tensor, stands: Tensor) -> Tensor | None:
    """Scores of a cut on the cells that its tokens stood for."""
    source = torch.arange(before.physical) if before.source is None else before.source[row].cpu()
    own = torch.full((len(stands),), float("nan"))
    for rows, at, values in group.scores:
        for i in (rows[:, 0] == row).nonzero()[:, 0].tolist():
            cells = place[source[at[i].cpu()]]
            own[cells] = values[i].float().cpu()
    found = own[stands.clamp_min(0)].masked_fill(stands < 0, float("nan"))
    return None if bool(found.isnan().all()) else found
