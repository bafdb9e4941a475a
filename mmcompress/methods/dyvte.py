# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..ops.exits import exit_features, router_logits
from ..plan import register
from ..stage import ExitStage, Need, check_layer, layer_at
from ..visuals import Visuals
from ..weights import Learned, Saved, load_into


class ExitRouters(nn.Module):
    """A classifier for each layer of a language model of width `dim`, behind which visual tokens may leave."""

    def __init__(self, layers: int, dim: int, width: int = 2048) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.empty(layers, width, 2 * dim))
        self.w2 = nn.Parameter(torch.empty(layers, 2, width))
        for layer in range(layers):
            nn.init.xavier_uniform_(self.w1.data[layer])
            nn.init.xavier_uniform_(self.w2.data[layer])

    def forward(self, features: Tensor, layer: int) -> Tensor:
        """Logits [U, 2] of (stay, leave) behind `layer`, from `exit_features` [U, 2D] of its output."""
        return router_logits(features.to(self.w1.device), self.w1[layer], self.w2[layer])


@register("dyvte")
@dataclass(frozen=True, repr=False)
class DyVTE(Learned, ExitStage):
    """Let all visual tokens leave the LLM behind the first layer whose trained router says that the text has taken them in.

    Wu et al., "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit and the Empirical Findings",
    NeurIPS 2025, arXiv 2411.19628. A router reads the mean state of the text behind the visuals and the state of its last
    token (the residual stream, no norm); visual tokens leave if its logit for that is larger by more than `margin` (0 is
    the paper; `inf` never leaves). Each sample of a batch leaves when it is ready. What is left keeps its position ids, and
    nothing is decided while decoding. `layer`: the first one before which they may leave, the others follow; none before
    which another stage of the plan cuts.

    weights: the folder that `mmcompress learn dyvte` wrote for this very model; without one there is nothing to decide by.
    Departs from the reference: text behind the last visual of any prompt (there: behind token 611); newlines and other
    structural tokens stay. Cost per layer 2 D H, H the width of the routers; every layer waits for the device once.
    """

    weights: str | None = None
    margin: float = 0.0
    layer: int | float = 1
    paper: ClassVar[str] = "arXiv 2411.19628"
    needs: ClassVar[tuple[Need, ...]] = ("text_states",)

    def __post_init__(self) -> None:
        self.check_weights()
        check_layer(self.layer)
        if isinstance(self.margin, bool) or not isinstance(self.margin, (int, float)) or math.isnan(self.margin):
            raise ValueError(
                f"margin={self.margin!r}: give by how much the logit for leaving must be larger, 0.0 in the paper"
            )

    def layers(self, depth: int) -> range:
        first = depth if self.margin == math.inf else layer_at(self.layer, depth)
        if first > depth - 1 and self.margin != math.inf:
            raise ValueError(
                f"{self!r}: the language model has {depth} layers, let tokens leave before one of 1 to {depth - 1}"
            )
        if self.trained is None and self.margin != math.inf:
            raise ValueError(
                "dyvte has no routers: train them for this model with `mmcompress learn dyvte MODEL`, and name the folder that "
                "this writes: dyvte(weights='...')"
            )
        if self.trained is not None and len(self.trained.w1) < depth - 1:
            raise ValueError(f"{self!r} has routers for {len(self.trained.w1)} layers, the language model has {depth}")
        return range(first, depth)

    def build(self, saved: Saved) -> nn.Module:
        layers, width, features = saved.tensors["w1"].shape if "w1" in saved.tensors else (0, 1, 2)
        return load_into(ExitRouters(layers, features // 2, width), saved)

    def leave(self, visuals: Visuals, layer: int) -> Tensor:
        logits = self.trained(exit_features(visuals["text_states"]), layer - 1)
        return self.exits(logits)

    def exits(self, logits: Tensor) -> Tensor:
        """Whether visual tokens leave, [...] bool, from logits [..., 2]."""
        return logits[..., 1] - logits[..., 0] > self.margin
