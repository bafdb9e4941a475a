# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.crops import alike_crops, joined
from ..ops.precision import wide
from ..ops.shares import worth_shares
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Visuals

_ELEMENTS = 1 << 24
"""Largest number of similarities that are held at a time."""


@register("holov")
@dataclass(frozen=True, repr=False)
class HoloV(InputStage):
    """Cut the picture into strips, share the budget by the attention and variety in each, keep each one's most attended.

    Zou et al., "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS 2025,
    arXiv 2510.02912. `strips` runs of tokens in raster order (by default 16 N / 9 k of them: 16, 8, 5 for 64, 128, 192 of
    576); a strip is worth its mean attention plus `variety` times the mean variance of the cosines between its projected
    tokens, that variance scaled to the mean attention of the picture. Each crop (thumbnail, tile, video frame) is a picture
    with a budget by its size; where an earlier stage has thinned the visual out, it is one. Without a CLS token attention
    means the attention that a patch receives. Cost (N / strips) N D at most.
    Departs from the reference: it scales variety strip by strip, so that it cancels (`variety=0` gives its shares), and counts
    a token's similarity to itself as 0; where a strip is full, it pads the output with zero vectors, here the others take
    what is left over; its output is sorted by attention within a strip, here it is in raster order. `compat="reference"` does
    all of that as the reference does: the slots of zero vectors, which are the lowest unused ones, are assigned to nothing.
    """

    keep: float | int = 0.25
    strips: int | None = None
    variety: float = 0.09
    compat: str | None = None
    paper: ClassVar[str] = "arXiv 2510.02912"
    needs: ClassVar[tuple[Need, ...]] = (("cls_attention", "received_attention"),)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strips is not None and (type(self.strips) is not int or self.strips < 1):
            raise ValueError(f"strips={self.strips!r}: give a count of at least 1, or None (16 N / 9 k)")
        if not self.variety >= 0:
            raise ValueError(f"variety={self.variety!r}: give a weight >= 0 (0.09 in the paper)")
        if self.compat not in (None, "reference"):
            raise ValueError(f"compat={self.compat!r}: choose 'reference' (with its zero vectors) or None")

    def select(self, visuals: Visuals) -> Selection:
        score = visuals["cls_attention", "received_attention"].float()
        features = visuals.features.detach()[..., : None if self.variety else 0]
        views = visuals.layout.views if visuals.slots is None else ()
        keep, filled = [], []
        for part in alike_crops(views, visuals.n, visuals.k, score.device):
            picks, taken = self._choose(part.take(score), part.take(features), part.k)
            keep.append(part.slots(picks))
            filled.append(taken)
        slots = joined(keep)
        if self.compat is None:
            return Selection.of(slots, score)
        real = joined([taken.view(len(score), -1) for taken in filled])
        place = torch.arange(visuals.k, device=slots.device).expand_as(slots)
        assign = torch.full_like(score, -1, dtype=torch.int64)
        assign = assign.scatter(1, slots, place.masked_fill(~real, -1))
        return Selection(slots, assign, weight=torch.ones_like(score), scores=score)

    def _choose(self, score: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Places [B, k] of the tokens that B crops keep, and which are real: the reference can run out of them."""
        n = score.shape[1]
        strips = min(self.strips or max(1, 16 * n // (9 * k)), n)
        short, longer = divmod(n, strips)
        strip, size, place = (x.to(score.device, non_blocking=True) for x in _strips(n, strips))

        parts = [(count, length) for count, length in ((longer, short + 1), (strips - longer, short)) if count]
        cuts = [count * length for count, length in parts]
        attention, tokens = (
            [x.unflatten(1, shape) for x, shape in zip(x.split(cuts, 1) if len(cuts) > 1 else (x,), parts, strict=True)]
            for x in (1000 * score, features)
        )
        order = score.sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, strip[order].sort(dim=1, stable=True).indices)
        if self.compat is None:
            share = worth_shares(self._worth(attention, tokens), size, k)
        else:
            share = self._reference_shares(attention, tokens, k)
            order = torch.where((share >= size)[:, strip], torch.arange(n, device=score.device), order)
        taken = place < share[:, strip]
        first = taken.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :k]
        return order.gather(1, first), taken.gather(1, first)

    def _worth(self, attention: list[Tensor], tokens: list[Tensor]) -> Tensor:
        """Worth of every strip, [B, strips]; attention and tokens [B, strips, n, ...] of the longer and the other ones."""
        worth = joined([a.mean(-1) for a in attention])
        if self.variety == 0:
            return worth
        variety = [local_variety(x, itself=False) for x in tokens]
        scale = _mean(attention) / (_mean(variety) + 1e-6)
        return worth + self.variety * scale * joined([v.mean(-1) for v in variety])

    def _reference_shares(self, attention: list[Tensor], tokens: list[Tensor], k: int) -> Tensor:
        """Shares [B, strips] as the reference gives them, larger than the strip at times."""
        parts = []
        for a, x in zip(attention, tokens, strict=True):
            variety = local_variety(x, itself=True)
            scale = a.mean(-1, keepdim=True) / (variety.mean(-1, keepdim=True) + 1e-6)
            parts.append((a + self.variety * scale * variety).mean(-1) if a.shape[2] > 1 else a[..., 0] / 1000)
        worth = joined(parts)
        weight = worth / (worth.sum(1, keepdim=True) + 1e-6)
        share = (weight * k).floor().long()
        by_weight = weight.sort(dim=1, descending=True, stable=True).indices
        more = torch.arange(share.shape[1], device=share.device) < k - share.sum(1, keepdim=True)
        return share + torch.zeros_like(share).scatter(1, by_weight, more.long())


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _strips(n: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """`n` tokens in `count` runs, the first of them one longer where it does not go even: the run of each token [n], the length of
    each run [count], and the place of each token in its run [n], on the CPU."""
    short, longer = divmod(n, count)
    size = torch.full((count,), short) + (torch.arange(count) < longer)
    strip = torch.repeat_interleave(size)
    return strip, size, torch.arange(n) - (size.cumsum(0) - size)[strip]


def local_variety(x: Tensor, itself: bool) -> Tensor:
    """Variance of the cosines between each token and the others of its strip, [B, strips, n]; x [B, strips, n, D].

    `itself` counts the token itself as one more, with cosine 0. Never holds more than `_ELEMENTS` cosines.
    """
    batch, strips, n, _ = x.shape
    x = wide(x).flatten(0, 1)
    unit = x / (x.norm(dim=-1, keepdim=True) + 1e-6)
    others, rows = max(1, n - 1), max(1, _ELEMENTS // max(1, batch * strips * n))
    parts = []
    for first in range(0, n, rows):
        cosine = torch.bmm(unit[:, first : first + rows], unit.transpose(1, 2))
        cosine.diagonal(first, 1, 2).zero_()
        mean = cosine.sum(-1, keepdim=True) / others
        squares = (cosine - mean).square().sum(-1, keepdim=True)
        parts.append((squares if itself else (squares - mean.square()).clamp_min(0)) / others)
    return joined(parts).view(batch, strips, n)


def _mean(parts: list[Tensor]) -> Tensor:
    """Mean over all tokens of strips of two lengths, [B, 1]."""
    return joined([part.flatten(1) for part in parts]).mean(1, keepdim=True)
