# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: a CLIP or SigLIP tower, an MLP projector, one token per patch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor, nn

from ..runtime.adapter import Adapter, Block
from ..visuals import Layout

TOWERS = {"clip_vision_model": 1, "siglip_vision_model": 0}
"""Supported towers by config type, with the number of their tokens before the patches (CLS)."""


class LlavaAdapter(Adapter):
    family: ClassVar[str] = "LLaVA-1.5 (model_type llava with a CLIP or SigLIP vision tower)"

    @classmethod
    def matches(cls, model: Any) -> bool:
        config = getattr(model, "config", None)
        if getattr(config, "model_type", None) != "llava" or not hasattr(model, "base_model_prefix"):
            return False
        tower = config.vision_config.model_type
        if tower not in TOWERS:
            raise NotImplementedError(
                f"LLaVA with a {tower} vision tower is not supported; supported towers: {', '.join(TOWERS)}"
            )
        return True

    @property
    def placeholders(self) -> dict[str, int]:
        return {"image": self.model.config.image_token_id}

    @property
    def encoders(self) -> dict[str, str]:
        return {"get_image_features": "image"}

    @property
    def tower(self) -> nn.Module:
        return self.base.vision_tower

    @property
    def blocks(self) -> list[Block]:
        return [
            Block(layer, layer.self_attn, layer.layer_norm2, layer.mlp)
            for layer in self.base.vision_tower.encoder.layers
        ]

    @property
    def feature_blocks(self) -> list[int]:
        chosen = self.model.config.vision_feature_layer
        count = len(self.base.vision_tower.encoder.layers)
        states = [chosen] if isinstance(chosen, int) else list(chosen)
        # hidden_states[0] are the embeddings, hidden_states[i] is the output of block i - 1
        return [(state if state >= 0 else count + 1 + state) - 1 for state in states]

    @property
    def prefix(self) -> int:
        return TOWERS[self.model.config.vision_config.model_type]

    @property
    def projector(self) -> nn.Module:
        return self.base.multi_modal_projector

    def check_encoder_call(self, arguments: dict[str, Any]) -> None:
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given, configured = arguments.get(name), getattr(self.model.config, name)
            if given is not None and given != configured:
                raise NotImplementedError(
                    f"{name}={given!r} was passed to a compressed model whose config says {configured!r}: change "
                    f"model.config.{name} before compress()"
                )

    def layouts(self, lengths: Iterable[int]) -> list[Layout]:
        # strategy "full" keeps the CLS token of the tower as the first LLM token
        structural = tuple(range(self.prefix)) if self.model.config.vision_feature_select_strategy == "full" else ()
        found = []
        for length in lengths:
            side = math.isqrt(length - len(structural))
            if side * side != length - len(structural):
                raise NotImplementedError(f"an image of {length} tokens is no square grid of patches")
            found.append(Layout((1, side, side), structural))
        return found

    def project(self, rows: Tensor) -> Tensor:
        return self.base.multi_modal_projector(rows)

    @property
    def signals(self) -> frozenset[str]:
        always = {"received_attention", "keys", "encoder_features"}
        return frozenset(always | {"cls_attention", "cls_feature"} if self.prefix else always)
