# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from .depth import ROUTER, MixtureOfDepths, Routed, Seen, best_of


@dataclass(frozen=True)
class PMoD(MixtureOfDepths):
    """In deeper layers only the visual tokens that a trained router ranks highest are processed, fewer from layer to layer.

    Zhang et al., "p-MoD: Building Mixture-of-Depths MLLMs via Progressive Ratio Decay", ICCV 2025, arXiv 2412.04449. Layer i of L
    keeps the part 0.5 cos(pi i / (L - 1)) + `shift` of the visual tokens, at least `minimum` (`schedule="linear"`: a straight
    line); layers whose part is above `maximum` stay as they are. A router gives each token the factor g = `scale` tanh(z) + 1:
    of what the MLP adds to a token that is kept, and of the whole state of one that passes by. Text always runs, and so does
    a new token. Order and position ids stay; each layer caches only what ran it.

    Routers begin at zero as in the paper (all factors 1, ties to the first tokens), or normal with `std`. With `minimum=1.0` and
    fresh routers the model is as before, bit for bit. Useless without training: a state that passes by often fades away. Departs
    from the reference, in which a text token can take the place of a visual one when routers saturate.
    """

    schedule: str = "cosine"
    shift: float = 0.5
    maximum: float = 0.85
    minimum: float = 0.15
    scale: float = 0.2
    std: float = 0.0
    name: ClassVar[str] = "p_mod"
    paper: ClassVar[str] = "arXiv 2412.04449"

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "linear"):
            raise ValueError(f"schedule={self.schedule!r}: choose 'cosine' (the paper) or 'linear'")
        for name in ("maximum", "minimum"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value!r}: give a part of the visual tokens, 0.0 to 1.0")
        for name, least in (("shift", -math.inf), ("scale", 0.0), ("std", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise ValueError(f"{name}={value!r}: give a number{'' if least else ', at least 0.0'}")

    def raw(self, depth: int) -> list[float]:
        """What the schedule says of each of `depth` layers, before its ends are cut."""
        part = [i / (depth - 1) if depth > 1 else 0.0 for i in range(depth)]
        if self.schedule == "linear":
            return [0.5 - p + self.shift for p in part]
        return [0.5 * math.cos(math.pi * p) + self.shift for p in part]

    def converted(self, depth: int) -> tuple[int, ...]:
        return tuple(i for i, raw in enumerate(self.raw(depth)) if raw <= self.maximum)

    def ratios(self, depth: int) -> list[float]:
        """The part of the visual tokens that each layer processes."""
        raw = self.raw(depth)
        return [max(r, self.minimum) if r <= self.maximum else 1.0 for r in raw]

    @staticmethod
    def kept(tokens: int, ratio: float) -> int:
        """How many of `tokens` the part `ratio` is: cut off, in float32 as the reference does it."""
        return min(tokens, int(np.float32(tokens) * np.float32(ratio)))

    def attach(self, language_model: Any) -> dict[int, nn.Module]:
        found: dict[int, nn.Module] = {}
        for i in self.converted(len(language_model.layers)):
            layer = language_model.layers[i]
            place = next(layer.parameters())
            router = nn.Linear(language_model.config.hidden_size, 1).to(place.device, place.dtype)
            nn.init.normal_(router.weight, std=self.std) if self.std else nn.init.zeros_(router.weight)
            nn.init.zeros_(router.bias)
            layer.add_module(ROUTER, router)
            found[i] = router
        return found

    def weights(self, logits: Tensor) -> Tensor:
        """Factors of tokens from what the router says of them, [...] float32."""
        return self.scale * torch.tanh(logits.float()) + 1

    def route(self, seen: Seen, router: nn.Module, layer: int, depth: int, hidden: Tensor, norm: nn.Module) -> Routed:
        return self.choose(seen, router(hidden)[..., 0], self.ratios(depth)[layer])

    def choose(self, seen: Seen, logits: Tensor, ratio: float) -> Routed:
        """The tokens that run a layer which keeps the part `ratio`, from the router's logits [B, S] of all tokens."""
        g = self.weights(logits)
        visual = seen.visual.to(g.device)
        counts = _counts(tuple(seen.visuals), ratio)
        kept = best_of(g, visual, torch.tensor(counts))
        runs = kept | (seen.valid.to(g.device) & ~visual)
        total = [n - v + k for n, v, k in zip(seen.counts, seen.visuals, counts, strict=True)]
        one = torch.ones_like(g)
        return Routed(runs, torch.where(kept, g, one), total, torch.where(visual & ~kept, g, one))


@functools.lru_cache(maxsize=1024)
def _counts(tokens: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    return tuple(PMoD.kept(n, ratio) for n in tokens)
