# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.diverse import max_min
from ..kernels.match import match
from ..ops.shares import split_budget
from ..ops.ties import argmax_first
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Layout, Visuals


@register("seats")
@dataclass(frozen=True, repr=False)
class Seats(InputStage):
    """In every short window of time, keep the tokens that are farthest apart, the attended ones first.

    "SEATS: Stage-adaptive Token Selection for Omni-modal LLMs", arXiv 2605.20035, its stage before the language model. A window
    is `frames` frames of a video (of an encoder that takes two pictures at a time: pairs of them) or `tokens` tokens of a
    sound: 2 seconds at the 25 tokens a second of Qwen2.5-Omni; no config tells that rate, so for another one give `tokens`.
    The last window may be shorter. A picture, and a video whose encoder does not tell its frames, is one window. In each, greedy
    max-min on cosine distance times the attention that the candidate receives (of the vision encoder; left out where the model
    does not give it, and for sounds). Videos and sounds have budgets of their own with
    `seats(keep=0.2, on="video") >> seats(keep=0.55, on="audio")`: the paper's pairs are 0.3 and 0.65, 0.2 and 0.55, 0.1 and 0.45,
    0.06 and 0.35, in the mean of all layers, and `seats` itself gets 1.4 times that. Cost n^2 D and k n per window of n tokens.

    Departs from the reference in that the budget of the whole is exact, and windows share it by size (there each is rounded by
    itself and keeps a token at least); and that attention is the encoder's own, within its own span, not made anew within the
    window. The drops between layers by question relevance, and the removal of what is left late, are `seats_layers`.
    """

    keep: float | int = 0.28
    frames: int = 2
    tokens: int = 50
    paper: ClassVar[str] = "arXiv 2605.20035"
    positions: ClassVar[str] = "keep"
    needs: ClassVar[tuple[Need, ...]] = (("received_attention", None),)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in (("frames", self.frames), ("tokens", self.tokens)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name}={value!r}: give how many make a window, an int of at least 1")

    def windows(self, layout: Layout) -> list[int]:
        """Number of the window of each of the N cells, ascending."""
        roles = {view.role for view in layout.views}
        if roles == {"audio"}:
            return [cell // self.tokens for cell in range(layout.cells)]
        frames = self.frames if roles == {"frame"} else len(layout.views)
        return [number // frames for number, view in enumerate(layout.views) for _ in range(view.cells)]

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        window, slots, k = self.windows(visuals.layout), visuals.slots, visuals.k
        features, weight = visuals.features, visuals.signals.get("received_attention")
        if slots is None:
            return Selection.of(kept_of(features, weight, window, k))
        # an earlier stage has left each visual other windows
        rows = [(features[i : i + 1], None if weight is None else weight[i : i + 1]) for i in range(len(slots))]
        kept = [kept_of(*row, [window[i] for i in at], k) for row, at in zip(rows, slots.tolist(), strict=True)]
        return Selection.of(torch.cat(kept))


def kept_of(features: Tensor, weight: Tensor | None, window: Sequence[int], k: int) -> Tensor:
    """`k` of the tokens [U, N, D], shared out over the windows of the N tokens by their size, [U, k]."""
    members: dict[int, list[int]] = defaultdict(list)
    for place, number in enumerate(window):
        members[number].append(place)
    alike: dict[tuple[int, int], list[list[int]]] = defaultdict(list)
    shares = split_budget(k, [len(places) for places in members.values()])
    for places, share in zip(members.values(), shares, strict=True):
        alike[len(places), share].append(places)
    kept = []
    for (size, share), group in alike.items():
        index = torch.tensor(group).to(features.device, non_blocking=True)
        at = index.repeat(len(features), 1)
        if 0 < share < size:
            worth = None if weight is None else weight[:, index].flatten(0, 1)
            at = at.gather(1, farthest(features[:, index].flatten(0, 1), worth, share))
        kept.append(at[:, :share].unflatten(0, (-1, len(group))).flatten(1))
    return torch.cat(kept, 1)


def farthest(features: Tensor, weight: Tensor | None, k: int) -> Tensor:
    """Greedy max-min as in `max_min`, [W, k], with the weight [W, n] in the first pick too."""
    if weight is None:
        return max_min(features, k)
    near, _ = match(features, features, exclude_self=True)
    return max_min(features, k, weight, first=argmax_first((1 - near) * weight.float()))


def keep_ratios(layers: int, drops: Sequence[int], gone: int, scale: float = 1.4) -> list[float]:
    """What part of the tokens each drop of the reference keeps, where `scale` times the target enters the language model.

    Drops come after the layers `drops` of `layers` and grow by e; after layer `gone` all is gone; the mean over all layers is the
    target, which cancels out.
    """
    weights = [math.exp(i) for i in range(len(drops))]
    shares = [sum(weights[: i + 1]) / sum(weights) for i in range(len(weights))]
    spans = [end - start for start, end in zip(drops, (*drops[1:], gone), strict=True)]
    dropped = (gone - layers / scale) / sum(span * share for span, share in zip(spans, shares, strict=True))
    left = [1.0, *(1 - min(1.0, max(0.0, dropped)) * share for share in shares)]
    return [round(now / before, 4) if before else 0.0 for before, now in itertools.pairwise(left)]
