# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.match import match
from ..kernels.merge import merge
from ..ops.cells import mean_weights
from ..ops.connected import Connected
from ..ops.groups import group_sizes
from ..ops.levels import levels, links
from ..ops.precision import wide
from ..ops.segments import Places
from ..ops.ties import largest
from ..plan import register
from ..selection import Selection
from ..stage import InputStage
from ..visuals import Visuals

FREE = 4096
"""Components of the first step of which a second one is made whatever the budget."""


@register("llava_scissor")
@dataclass(frozen=True, repr=False)
class LLaVAScissor(InputStage):
    """Replace tokens that hang together by similarity by their mean, in each frame and then in the whole video.

    Sun et al., "LLaVA-Scissor: Token Compression with Semantic Connected Components for Video LLMs", arXiv 2506.21862. Two
    tokens of a frame are connected if their cosine is above a threshold; each connected component becomes its mean, and so do
    components of these means over all frames. Every token of the video then goes to the most similar of what is left, which
    becomes the mean of itself and these. A component stands at its token of the most connections. A picture, or what stands for
    no video, is one frame.

    `tau` is the threshold. None takes the largest one tried that leaves no more than k; what then is missing are the tokens least
    like their representatives, which represent themselves. With `tau`, of more than k components those that stand for most
    tokens stay.

    At most `probes` thresholds are tried: one by how tokens are like those of the frame before, and if that leaves at most
    M = sqrt(N k) components of the first step (or 4,096) others up to M. Cost n^2 C / 2 for frames of n and M^2 C / 2 for their M
    components for each, which is N^2 C / 2 once at most (on the CPU often a small part of it: `kernels.components`), n^2 C twice
    or three times to find them, N k C in the end; in blocks. It waits for the device twice, and twice for each threshold, to read
    how many components there are.

    Departs from the reference in that the budget is exact, components are too (there they are sampled where there are many), and
    output is in the order of places.
    """

    keep: float | int = 0.1
    tau: float | None = None
    probes: int = 8
    paper: ClassVar[str] = "arXiv 2506.21862"
    merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None and not -1 <= self.tau <= 1:
            raise ValueError(
                f"tau={self.tau!r}: give a cosine, from -1 to 1 (the paper: 0.9), or None to find one for the budget"
            )
        if type(self.probes) is not int or self.probes < 1:
            raise ValueError(f"probes={self.probes!r}: give how many thresholds are tried, an int of at least 1")

    def select(self, visuals: Visuals) -> Selection:
        at = Places.of(visuals)
        found = [self.one(visuals.features[i : i + 1], at.row(i), visuals.k) for i in range(len(visuals.features))]
        keep, assign, weight, rows = (torch.cat(parts) for parts in zip(*found, strict=True))
        return Selection(keep, assign, weight, rows=rows.to(visuals.features.dtype))

    def one(self, x: Tensor, at: Places, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The k slots that are kept of one visual [1, N, C], which of them each token is merged into, with which weight, and
        what they become."""
        known = x.detach()
        parts = self.found(known, at, k) if self.tau is None else Connected.of(known, at, self.tau)
        own = parts.representatives(x[0])
        keys = parts.keys
        if len(keys) > k:
            size = group_sizes(torch.searchsorted(keys, parts.temporal)[None], len(keys))
            stay = size.sort(dim=1, descending=True, stable=True).indices[0, :k].sort().values
            keys, own = keys[stay], own[stay]
        near, into = match(known, own.detach()[None])
        if (m := len(keys)) < k:
            taken = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, keys[None], True)
            alone = largest(-near, torch.full_like(keys[:1, None], k - m), ~taken)
            more = alone[0].to(torch.uint8).sort(descending=True, stable=True).indices[: k - m]
            new = wide(x[0, more])
            nearer, other = match(known, new.detach()[None])
            keys, order = torch.cat([keys, more]).sort()
            own = torch.cat([own, new])[order]
            place = order.argsort()
            into, other = place[into], place[m + other]
            into = torch.where((nearer > near) | ((nearer == near) & (other < into)), other, into)
        into, made = into[0], self.absorbed(x[0], own, into[0])
        place = torch.arange(k, device=x.device)
        into = into.scatter(0, keys, place)  # every output stands for a token at least
        return keys[None], into[None], mean_weights(into[None], k), made[None]

    def found(self, x: Tensor, at: Places, k: int) -> Connected:
        """What the largest of the thresholds tried that leaves at most k components makes of x [1, N, C].

        The first one leaves k if each token joins the one of the frame before that is most like it. The others lie between as
        many components of the first step as cannot be too many, k, and `most`."""
        n, best, tries = x.shape[1], None, self.probes
        most = min(n, max(math.isqrt(n * k), FREE))
        link, low = falling(links(x, at)) if at.frames > 1 else [], (0, -1.01)
        if len(link) >= n - k:
            best, tries = Connected.of(x, at, between(link, n - k)), tries - 1
            if len(best.keys) > k:
                best = None
            elif len(best.firsts) > most:
                return best
            else:
                low = len(best.firsts), between(link, n - k)
        level = falling(levels(x, at))
        sure, high, firsts = between(level, n - k), (most + 1, 1.01), most
        if k >= n - len(level) and sure > low[1]:
            best, low = None, (k, sure)
        for _ in range(tries):
            tau = between(level, n - firsts)
            if not low[1] < tau < high[1]:
                tau = math.cos((angle(low[1]) + angle(high[1])) / 2)
            tried = Connected.of(x, at, tau)
            left = len(tried.keys)
            if left > k:
                high = firsts, tau
            else:
                best, low = tried, (firsts, tau)
                if left >= k - k // 64 or firsts == most < n:
                    break
            firsts = (low[0] + high[0]) // 2
        return best or Connected.of(x, at, low[1])

    @staticmethod
    def absorbed(x: Tensor, own: Tensor, into: Tensor) -> Tensor:
        """The means of the representatives `own` [K, C] with the tokens of x [N, C] that each is the most similar of, by `into`
        [N]: [K, C]."""
        many = torch.zeros_like(own[:, 0]).scatter_add(0, into, torch.ones_like(x[:, 0], dtype=own.dtype))
        return (own + merge(wide(x)[None], into[None], len(own))[0]) / (many[:, None] + 1)


def angle(cosine: float) -> float:
    """Of a cosine, which rounding may have taken beyond 1."""
    return math.acos(min(1.0, max(-1.0, cosine)))


def falling(level: Tensor) -> list[float]:
    """The cosines among `level`, the highest first. They are read."""
    return [value for value in level.sort(descending=True).values.tolist() if value >= -2]


def between(level: list[float], edges: int) -> float:
    """A threshold above which there are so many of the falling levels, or all: halfway to the next."""
    edges = min(edges, len(level))
    above = level[edges - 1] if edges else max([1.0, *level[:1]])
    return (above + (level[edges] if edges < len(level) else above - 0.01)) / 2
