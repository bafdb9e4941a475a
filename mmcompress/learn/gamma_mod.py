# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .depth import ROUTER, MixtureOfDepths, Routed, Seen, best_of


@dataclass(frozen=True)
class GammaMoD(MixtureOfDepths):
    """In redundant layers a trained router, one for all of them, lets tokens pass by; the question never does in training.

    Luo et al., "gamma-MoD: Exploring Mixture-of-Depth Adaptation for Multimodal Large Language Models", ICLR 2025, arXiv
    2410.13859. The softmax of the router over (pass, run) of the normed state gives r, the factor of what the MLP adds to a
    token that runs. In training the part `skip` of all tokens up to the last visual one passes by, those with the lowest r;
    the loss of the router, `loss_weight` times its cross-entropy against that choice, is in
    `conversion(model).router_loss()`. Afterwards every token of a prompt with r above `threshold` runs, and a new token with r
    of at least `decode`.

    layers: those that are converted; None: all but the first three and the last one, as in the paper. `attention_ranks` finds
    those whose attention has the lowest rank. Tokens that run a layer are numbered anew in it (families with M-RoPE: they keep
    their ids), and each layer caches only them. At decode time a token that passes by is computed all the same, and masked.
    Routers begin normal with `std`; there is no state of them in which the model is as before. Departs from the reference, whose
    prefix is a constant number of tokens, in batches of one.
    """

    layers: tuple[int, ...] | None = None
    skip: float = 0.5
    threshold: float = 0.005
    decode: float = 0.5
    loss_weight: float = 0.01
    std: float = 0.02
    name: ClassVar[str] = "gamma_mod"
    paper: ClassVar[str] = "arXiv 2410.13859"
    reindexes: ClassVar[bool] = True
    of_text: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.layers is not None:
            given: Any = self.layers
            whole = isinstance(given, Sequence) and given and all(type(i) is int for i in given)
            if not whole or list(given) != sorted(set(given)):
                raise ValueError(
                    f"layers={given!r}: give numbers of layers, ascending, or None for all but 0, 1, 2 and the last"
                )
            object.__setattr__(self, "layers", tuple(given))
        for name in ("skip", "threshold", "decode"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value!r}: give a number from 0.0 to 1.0")
        for name in ("loss_weight", "std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 <= value < math.inf:
                raise ValueError(f"{name}={value!r}: give a number, at least 0.0")

    def converted(self, depth: int) -> tuple[int, ...]:
        return tuple(range(3, depth - 1)) if self.layers is None else self.layers

    def attach(self, language_model: Any) -> dict[int, nn.Module]:
        place = next(language_model.layers[0].parameters())
        router = nn.Linear(language_model.config.hidden_size, 2, bias=False).to(place.device, place.dtype)
        nn.init.normal_(router.weight, std=self.std) if self.std else nn.init.zeros_(router.weight)
        language_model.add_module(ROUTER, router)
        return dict.fromkeys(self.converted(len(language_model.layers)), router)

    def route(self, seen: Seen, router: nn.Module, layer: int, depth: int, hidden: Tensor, norm: nn.Module) -> Routed:
        states = norm(hidden)
        place = next(router.parameters()).device  # one router for all layers, which may lie on several devices
        return self.choose(seen, router(states.to(place)).to(hidden.device))

    def taken(self, tokens: int, prefix: int, compat: str | None = None) -> int:
        """How many of `tokens` run a layer in training, `prefix` of which compete. `compat="reference"` goes through a float, which
        for some numbers makes one more."""
        if compat == "reference":
            return math.ceil(tokens * (1 - prefix * self.skip / tokens))
        return tokens - int(prefix * self.skip)

    def choose(self, seen: Seen, logits: Tensor, compat: str | None = None) -> Routed:
        """The tokens that run a layer, from the router's logits [B, S, 2] of all tokens."""
        logits = logits.float()
        r = logits.softmax(-1)[..., 1]
        valid = seen.valid.to(r.device)
        if not seen.training:
            runs = r >= self.decode if seen.decoding else r > self.threshold
            return Routed(runs & valid, r)
        last = torch.where(seen.visual, torch.arange(r.shape[1], device=seen.visual.device), -1).amax(1, keepdim=True)
        behind = valid & (torch.arange(r.shape[1], device=r.device) > last.to(r.device))
        counts = [self.taken(n, p, compat) if n else 0 for n, p in zip(seen.counts, seen.prefixes, strict=True)]
        runs = best_of(r + behind, valid, torch.tensor(counts))
        wrong = F.cross_entropy(logits.flatten(0, 1), runs.flatten().long(), reduction="none").view_as(r)
        return Routed(runs, r, counts, loss=(wrong * valid).sum() / valid.sum())
