# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import check_each
from ..ops.shares import split_budget
from ..plan import as_pipeline, register
from ..selection import Selection, gather
from ..stage import InputStage, Need
from ..visuals import PER_VISUAL, Layout, Visuals
from .hosted import Hosted


@register("per_frame")
@dataclass(frozen=True, repr=False)
class PerFrame(Hosted):
    """A method for pictures on videos: every frame by itself, with a budget of its own, or all of them as one picture.

    This library's own. `host` is the method as a plan string without `keep`; its signals are asked for. `over="frames"`: the budget
    is split over the frames as evenly as whole numbers can be, the first ones get what is left over, and the host sees each as a
    picture; fewer tokens than frames raise ValueError. `over="whole"`: frames one below the other are one picture, also
    for hosts that treat each frame alone. By themselves hosts that compare all tokens take a video as a whole (divprune, cdpruner),
    those that go by crops each frame alone (fopru, prumerge, aim_merge). A host that reads the CLS feature is given that of
    its own frame. Pictures, and what an earlier stage has left, are the host's as ever. Cost: the host's, for T visuals of
    N / T tokens, or for one of N.
    """

    over: str = "frames"
    paper: ClassVar[str] = "this library"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.over not in ("frames", "whole"):
            raise ValueError(f"over={self.over!r}: choose 'frames' (each by itself) or 'whole' (all as one picture)")

    def stage(self) -> InputStage:
        """The host."""
        stages = as_pipeline(self.host).parts
        one = stages[0] if len(stages) == 1 else None
        if not isinstance(one, InputStage) or hasattr(one, "weights") or isinstance(one, PerFrame):
            raise ValueError(
                f"host={self.host!r}: give one method that acts before the language model and is not trained, with its options but "
                f"keep if need be ('divprune', 'visionzip')"
            )
        return one

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        """Those of the host, and the CLS feature of each frame where it reads one."""

        def each(name: str | None) -> str | None:
            return "cls_features" if name == "cls_feature" else name

        needs = self.stage().needs
        return tuple(each(need) or need if isinstance(need, str) else tuple(map(each, need)) for need in needs)

    @property
    def positions(self) -> str:  # type: ignore[override]
        return self.stage().positions

    @property
    def merging(self) -> bool:  # type: ignore[override]
        return self.stage().merging

    def select(self, visuals: Visuals) -> Selection:
        host, frames = self.stage(), visuals.layout.frames
        cls = visuals.signals.get("cls_features")
        first_cls = {} if cls is None else {"cls_feature": cls[:, 0]}
        whole = replace(visuals, signals={**visuals.signals, **first_cls})
        if frames == 1 or visuals.slots is not None:
            return host.select(whole)
        rows, columns = visuals.layout.views[0].grid
        if self.over == "whole":
            return host.select(replace(whole, layout=Layout.raster(1, frames * rows, columns)))
        check_each(self, visuals.k, visuals.n, frames)
        places, first, made = rows * columns, 0, []
        for k, run in groupby(split_budget(visuals.k, [places] * frames)):
            count = len(list(run))
            made.append(self._of(host, visuals, first, count, places, k))
            first += count
        return _together(made, visuals, first * places)

    @staticmethod
    def _of(host: InputStage, visuals: Visuals, first: int, count: int, places: int, k: int) -> tuple[Selection, int]:
        """What the host decides for `count` frames from `first` on, each with the budget `k`, as one selection of their tokens; and
        the first of these."""
        part = slice(first * places, (first + count) * places)

        def cut(x: Tensor) -> Tensor:
            return x[:, part].unflatten(1, (count, places)).flatten(0, 1)

        signals = {n: s.repeat_interleave(count, 0) if n in PER_VISUAL else cut(s) for n, s in visuals.signals.items()}
        if "cls_features" in signals:
            signals["cls_feature"] = visuals["cls_features"][:, first : first + count].flatten(0, 1)
        layout = Layout.raster(1, *visuals.layout.views[0].grid)
        found = host.select(replace(visuals, features=cut(visuals.features), layout=layout, k=k, signals=signals))
        frame = torch.arange(count, device=found.keep.device)[:, None]

        def back(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.unflatten(0, (-1, count)).flatten(1, 2)

        keep = back(found.keep + (frame * places).repeat(len(visuals.features), 1))
        assign = found.assign
        if assign is not None:
            moved = assign + (frame * k).repeat(len(visuals.features), 1)
            assign = back(moved.masked_fill(assign < 0, -1))
        rows = None if found.rows is None else found.rows.unflatten(0, (-1, count)).flatten(1, 2)
        assert keep is not None
        return Selection(keep, assign, back(found.weight), rows, back(found.scores)), part.start


def _together(parts: list[tuple[Selection, int]], visuals: Visuals, tokens: int) -> Selection:
    """Selections of runs of frames as one of all `tokens` tokens, in ascending order."""
    keep, order = torch.cat([one.keep + start for one, start in parts], 1).sort(dim=1)
    shape, device = (len(keep), tokens), keep.device
    assign = torch.full(shape, -1, device=device) if parts[0][0].assign is not None else None
    weight = torch.zeros(shape, device=device) if parts[0][0].weight is not None else None
    scores = torch.zeros(shape, device=device) if parts[0][0].scores is not None else None
    first, place = 0, order.argsort(dim=1)
    for one, start in parts:
        if assign is not None and one.assign is not None:
            moved = place.gather(1, (one.assign + first).clamp_min(0))
            assign[:, start : start + moved.shape[1]] = moved.masked_fill(one.assign < 0, -1)
        for whole, mine in ((weight, one.weight), (scores, one.scores)):
            if whole is not None and mine is not None:
                whole[:, start : start + mine.shape[1]] = mine
        first += one.k
    rows = [one.rows for one, _ in parts if one.rows is not None]
    return Selection(keep, assign, weight, gather(torch.cat(rows, 1), order) if rows else None, scores)
