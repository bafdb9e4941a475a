# SPDX-License-Identifier: Apache-2.0
"""Other vision-language models of transformers that follow the common interface: stages that need only features."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..runtime.adapter import Adapter, Encoded, Run
from ..runtime.refusal import refusal
from ..runtime.structural import StructuralTokens, ruled
from ..visuals import Layout


class CommonAdapter(Adapter):
    """A model with `get_image_features` (of videos, of audio), one placeholder id per token, and a language model. Nothing is
    known of its encoders: no signals, no encoder stages, and a layout that is just a row of tokens."""

    family: ClassVar[str] = (
        "other models with get_image_features and config.image_token_id, or those of audio (input and layer stages only)"
    )

    @classmethod
    def matches(cls, model: Any) -> bool:
        return refusal(model) is None

    @property
    def reindexes(self) -> bool:  # type: ignore[override]
        return not hasattr(self.base, "get_rope_index")  # which makes positions of several axes

    @property
    def blocks(self) -> list[Any]:
        raise NotImplementedError(f"{self.lacks}: stages inside the vision encoder are not possible")

    @property
    def signals(self) -> frozenset[str]:
        return frozenset()

    @property
    def lacks(self) -> str:
        tower = getattr(getattr(self.config, "vision_config", None), "model_type", "")
        of = type(self.model).__name__ + (f" ({tower})" if tower else "")
        return f"the vision encoder of {of} is not known to mmcompress"

    def features(self, output: Any, arguments: dict[str, Any]) -> Sequence[Tensor]:
        features, states = output.pooler_output, output.last_hidden_state
        if features is None:  # none, or all of them enter layers
            features = states if states is not None else output.deepstack_features[0][1]
        pixels = arguments.get("pixel_values")
        if pixels is None or pixels.dim() != 5 or len(features) != len(pixels) or states is None or states.dim() != 3:
            return features
        lengths = [f.numel() // f.shape[-1] for f in features]  # [samples, pictures, C, H, W]: one tensor per sample
        each = sum(lengths) // len(states)
        if each * len(states) != sum(lengths) or any(length % each for length in lengths):
            return features
        return torch.cat([f.flatten(0, -2) for f in features]).split(each)

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        return Encoded(modality, [Layout.raster(1, 1, length) for length in lengths])

    def assemble(self, encoded: Encoded, runs: list[Run]) -> None:
        """Where features come token by token, a run of placeholders is a picture."""
        if len(encoded.layouts) == sum(run.length for run in runs) > len(runs):
            encoded.layouts = [Layout.raster(1, 1, run.length) for run in runs]

    @functools.cached_property
    def structural_tokens(self) -> StructuralTokens:
        return StructuralTokens(self.base, self.language_model)

    def mark(self, encoded: Encoded, features: Sequence[Tensor]) -> None:
        layouts = encoded.layouts
        if not self.structural_tokens or any(layout != Layout.raster(1, 1, layout.tokens) for layout in layouts):
            return  # none are made of parameters, or it is known how the tokens lie
        which = self.structural_tokens.among(torch.cat([f.flatten(0, -2) for f in features]))
        for i, part in enumerate(which.split([layout.tokens for layout in layouts])):
            if part.any():
                layouts[i] = ruled(part, encoded.modality == "image")

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        raise AssertionError("no signals, nothing to arrange")
