# SPDX-License-Identifier: Apache-2.0
"""Training of a flexible projector: the language model answers from random numbers of visual tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..adapters import Adapter, adapter_for
from ..api import _stock, compressed
from ..methods.tokenflex import TokenFlex, TokenFlexProjector
from ..ops.exits import answer_losses
from ..selection import Selection
from ..visuals import Visuals

SHARES, CHANCES = (0.0878, 0.1975, 0.3512), (0.2, 0.3, 0.5)
"""Parts of the visual tokens that training draws, and how often: 64, 144 and 256 of 729 in the paper."""


def draw_share(step: int, seed: int = 0, shares: Sequence[float] = SHARES, chances: Sequence[float] = CHANCES) -> float:
    """The part of the visual tokens of one step, the same for all samples of its batch; a function of seed and step alone."""
    return random.Random(seed * 1_000_003 + step).choices(list(shares), list(chances))[0]


def fresh_projector(model: Any, ratio: int = 3) -> TokenFlexProjector:
    """An untrained projector for `model`, between its vision encoder and its language model."""
    stock = _stock(model)
    adapter = adapter_for(stock)
    if not isinstance(adapter, Adapter) or "encoder_features" not in adapter.signals:
        raise NotImplementedError(
            f"{type(stock).__name__}: its encoder features are not known to mmcompress, so that no projector can be trained on them"
        )
    config = stock.config.vision_config
    width = getattr(config, "embed_dim", None) if stock.config.model_type == "qwen2_vl" else None
    width = (width or config.hidden_size) * adapter.unit
    layers = getattr(stock.config, "vision_feature_layer", None)
    width *= len(layers) if isinstance(layers, (list, tuple)) else 1
    place = next(adapter.language_model.parameters())
    return TokenFlexProjector(width, adapter.language_model.config.hidden_size, ratio).to(place.device)


@dataclass(frozen=True, repr=False)
class Aligning(TokenFlex):
    """tokenflex while it is trained: also notes how far its tokens are from pooled tokens of the model's own projector, relative to
    how much those vary."""

    def select(self, visuals: Visuals) -> Selection:
        chosen = super().select(visuals)
        assert chosen.rows is not None
        target = self.pool(visuals.features.detach(), visuals.layout.views, visuals.k)[0]
        error = (chosen.rows.float() - target).square().mean()
        self.notes.append(error / target.var().clamp_min(1e-12))
        return chosen

    @property
    def notes(self) -> list[Tensor]:
        return self.trained.__dict__.setdefault("_notes", [])


def weighted_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Loss of the answer tokens, each weighted by 1 / sqrt(number of those of its sample): the paper's balance of long and short
    answers."""
    count = (labels[:, 1:] >= 0).sum(1)
    weight = count.float().sqrt()
    return (answer_losses(logits, labels) * weight).sum() / weight.sum()


def flexible_loss(
    model: Any, projector: TokenFlexProjector, inputs: Mapping[str, Any], share: float, align: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(loss of the answers, error of alignment) of a batch in which `projector` makes the part `share` of the visual tokens.

    inputs: those of the model with `labels` [B, S]. Gradients reach the projector, and the model as far as its parameters ask for
    them. With align=0.0 the second one is not computed.
    """
    given = {name: value for name, value in inputs.items() if name != "labels"}
    stage = (Aligning if align else TokenFlex)(keep=share).holding(projector)
    projector.__dict__.pop("_notes", None)
    with compressed(model, stage):
        logits = model(**given, use_cache=False).logits
    notes = projector.__dict__.pop("_notes", [])
    error = torch.stack(notes).mean() if notes else torch.zeros((), device=logits.device)
    return weighted_loss(logits, inputs["labels"].to(logits.device)), error
