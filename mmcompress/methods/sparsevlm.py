# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import floored, kept_beside_recycled, layer_mean, recycling, scaled_to_mean
from ..ops.density import density_peaks
from ..ops.groups import group_sizes
from ..plan import register
from ..selection import Selection, gather
from ..stage import Need
from ..visuals import Visuals
from .pyramid import Pyramid

PUBLISHED = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""By version and name: the tokens of 576 that the three cuts keep; those that 1.5 merges come on top."""
WHOLE = 576
_SMALLEST_GAIN = 1e-4


@register("sparsevlm")
@dataclass(frozen=True, repr=False)
class SparseVLM(Pyramid):
    """At three depths of the LLM, keep the visual tokens that the words which match the picture attend to; recycle others.

    Zhang et al., "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv
    2410.04417. Raters are the words of the instruction that the visual tokens mean more than the average word (softmax over
    words of plain dot products of what enters the LLM, mean over visual tokens), or all words where none is above it. The
    score is their attention in the layer before the cut, mean over heads. Cuts come before 3/32, 7/32 and 16/32 of the depth.

    `version="1.5"` is SparseVLM: the best 30 % of the dropped tokens are merged around density peaks (`ops.density`), ten of
    them into one plain mean on average. Merged tokens stand behind the kept ones, the clearest peak first, and k counts both.
    Positions are numbered anew; where a plan or family keeps them, a merged token has that of its centre. "2.0" is SparseVLM+:
    attention is divided by what the rotary embedding alone would give, and only the `heads` heads with the largest sums count
    (None: half of them, rounded up); nothing is merged, positions stay. The divisor is at least 1e-4 in size and keeps its
    sign: with small heads or very long prompts scores of distant tokens turn around, as in the reference.

    `setting` names a published list of kept tokens: 192, 128, 96 or 64, whose true means are 206, 145, 114 and 82 of 576 over
    32 layers, taken as parts of 576. None: 192, or with `keep` the one whose mean is nearest, then scaled. `keep`, `layers`
    and `ratios` (of kept tokens, merged ones come on top): see `Pyramid`. Cost: heads * T * S * d for each cut, and in 1.5
    t^2 d for t merged tokens.

    Departs from the reference: ties go by index, not by noise, and half of the heads count in "2.0", where it takes 14 in every
    model. The number of tokens that a cut leaves is fixed, as in its code; the paper's, which follows the rank of the attention,
    is in neither.
    """

    version: str = "1.5"
    setting: int | None = None
    heads: int | None = None
    paper: ClassVar[str] = "arXiv 2410.04417"
    merging: ClassVar[bool] = True
    published_layers: ClassVar[tuple[float, ...]] = (3 / 32, 7 / 32, 16 / 32)

    def __post_init__(self) -> None:
        if self.version not in PUBLISHED:
            raise ValueError(f"version={self.version!r}: choose '1.5' (SparseVLM) or '2.0' (SparseVLM+)")
        if self.setting is not None and (type(self.setting) is not int or self.setting not in PUBLISHED[self.version]):
            raise ValueError(f"setting={self.setting!r}: choose 192, 128, 96, 64 (published lists) or None")
        if self.setting is not None and self.ratios is not None:
            raise ValueError(
                f"setting={self.setting!r}, ratios={self.ratios!r}: a setting names ratios, so give one of both"
            )
        if self.heads is not None and (type(self.heads) is not int or self.heads < 1 or self.version != "2.0"):
            raise ValueError(f"heads={self.heads!r}: give how many heads version='2.0' reads, or None (half of them)")
        super().__post_init__()

    @property
    def positions(self) -> str:  # type: ignore[override]
        return "reindex" if self.version == "1.5" else "keep"

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        if self.version == "1.5":
            return ("text_relevance", "text_attention")
        return ("text_relevance", "text_attention_heads", "rotary_gain")

    def shares(self) -> tuple[float, ...]:
        return self.ratios or self._list(self.setting or 192)

    def _list(self, name: int) -> tuple[float, ...]:
        return tuple(kept / WHOLE for kept in PUBLISHED[self.version][name])

    def budgets(self, tokens: int, depth: int) -> tuple[int, ...]:
        if self.keep is None:
            return self.left(self.shares(), tokens)
        fixed, layers = self.ratios is not None or self.setting is not None, self.cuts(depth)
        lists = [self.shares()] if fixed else [self._list(name) for name in PUBLISHED[self.version]]
        part = self.keep if isinstance(self.keep, float) else self.keep / tokens
        parts = [tuple(n / WHOLE for n in self.left(kept, WHOLE)) for kept in lists]
        best = min(parts, key=lambda left: abs(layer_mean(1.0, left, layers, depth) - part))
        return scaled_to_mean(best, tokens, layers, depth, self.keep)

    def left(self, ratios: tuple[float, ...], tokens: int) -> tuple[int, ...]:
        """What each cut leaves of `tokens`, merged tokens included, where it keeps these parts of them."""
        found: list[int] = []
        for kept in floored(ratios, tokens):
            now = found[-1] if found else tokens
            kept = min(kept, now)
            found.append(kept + (recycling(now - kept)[1] if self.version == "1.5" else 0))
        return tuple(found)

    def select(self, visuals: Visuals) -> Selection:
        score = self.score(visuals)
        if self.version == "2.0":
            return Selection.top(score, visuals.k)
        return self.recycle(visuals.features, score, kept_beside_recycled(visuals.n, visuals.k), visuals.k)

    def score(self, visuals: Visuals) -> Tensor:
        """How much the raters attend to each token, [U, N]."""
        raters = self.raters(visuals["text_relevance"].float())
        share = raters / raters.sum(1, keepdim=True).clamp_min(1)
        if self.version == "1.5":
            return (share[..., None] * visuals["text_attention"].float()).sum(1)
        gain = visuals["rotary_gain"].float()
        gain = torch.where(gain < 0, gain.clamp_max(-_SMALLEST_GAIN), gain.clamp_min(_SMALLEST_GAIN))
        attention = visuals["text_attention_heads"].float() / gain[:, None]
        attention = (share[:, None, :, None] * attention).sum(2)
        heads = self.heads or (attention.shape[1] + 1) // 2
        best = attention.sum(2).sort(dim=1, descending=True, stable=True).indices[:, :heads]
        return gather(attention, best).mean(1)

    @staticmethod
    def raters(relevance: Tensor) -> Tensor:
        """Which words are raters, [U, T] bool: those with more than the mean `relevance` [U, T], or all if there is none."""
        above = relevance > relevance.mean(1, keepdim=True)
        return above | ~above.any(1, keepdim=True)

    @staticmethod
    def recycle(features: Tensor, score: Tensor, kept: int, k: int) -> Selection:
        """Keep the `kept` best of `features` [U, N, D] by `score` [U, N] and merge the best of the others into k - kept."""
        order = score.sort(dim=1, descending=True, stable=True).indices
        clusters, again = k - kept, kept + recycling(score.shape[1] - kept)[0]
        keep, spare = (part.sort(dim=1).values for part in (order[:, :kept], order[:, kept:again]))
        if not clusters:
            return Selection(keep, scores=score)
        centres, into = density_peaks(gather(features, spare), clusters)
        place = torch.arange(kept, device=keep.device).expand_as(keep)
        assign = torch.full_like(order, -1).scatter(1, keep, place).scatter(1, spare, kept + into)
        share = group_sizes(into, clusters, torch.float32).gather(1, into).reciprocal()
        weight = torch.zeros_like(score).scatter(1, keep, 1.0).scatter(1, spare, share)
        return Selection(torch.cat([keep, spare.gather(1, centres)], 1), assign, weight, scores=score)
