# SPDX-License-Identifier: Apache-2.0
"""Other vision-language models of transformers that follow the common interface: stages that need only features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..runtime.adapter import Adapter, Encoded
from ..visuals import Layout


class CommonAdapter(Adapter):
    """A model with `get_image_features`, one placeholder id per visual token, and a language model. Nothing is known
    of its vision encoder: no signals, no encoder stages, and a layout that is just a row of tokens."""

    family: ClassVar[str] = (
        "other models with get_image_features and config.image_token_id (input and layer stages only)"
    )

    @classmethod
    def matches(cls, model: Any) -> bool:
        config, base = getattr(model, "config", None), getattr(model, getattr(model, "base_model_prefix", ""), None)
        return (
            getattr(config, "image_token_id", None) is not None
            and hasattr(base, "get_image_features")
            and hasattr(getattr(base, "language_model", None), "layers")
        )

    @property
    def reindexes(self) -> bool:  # type: ignore[override]
        rope = getattr(self.language_model.config, "rope_parameters", None) or {}
        return "mrope_section" not in rope

    @property
    def encoders(self) -> dict[str, str]:
        return {"get_image_features": "image"}

    @property
    def blocks(self) -> list[Any]:
        raise NotImplementedError(f"{self.lacks}: stages inside the vision encoder are not possible")

    @property
    def signals(self) -> frozenset[str]:
        return frozenset()

    @property
    def lacks(self) -> str:
        return f"the vision encoder of {type(self.model).__name__} is not known to mmcompress"

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        return Encoded(modality, [Layout.raster(1, 1, length) for length in lengths])

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        raise AssertionError("no signals, nothing to arrange")
