# SPDX-License-Identifier: Apache-2.0
"""Gemma 4: patches with their places, in rows filled up with padding; encoded and pooled by place, or projected as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..runtime.adapter import Encoded, body_of
from ..runtime.refusal import refusal
from .common import CommonAdapter
from .raster import RasterAdapter, laid

PLACES = ("image_position_ids", "video_position_ids", "pixel_position_ids")


def shapes(arguments: dict[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of the patches of each picture or frame, from their places (x, y), -1 for padding."""
    places = next(arguments[name] for name in PLACES if arguments.get(name) is not None)
    return [(y + 1, x + 1) for x, y in places.flatten(0, -3).amax(1).tolist()]


class GemmaAdapter(RasterAdapter):
    """A token is the mean of its patches, scaled; a picture stands between a start and an end token."""

    family: ClassVar[str] = "models with the vision encoder of Gemma 4 (gemma4)"
    padded: ClassVar[bool] = True
    delimited: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        tower = getattr(body_of(model), "vision_tower", None)
        return refusal(model) is None and all(hasattr(tower, name) for name in ("patch_embedder", "encoder", "pooler"))

    @property
    def side(self) -> int:
        return int(self.tower.config.pooling_kernel_size)

    @property
    def projector(self) -> nn.Module:
        return self.base.embed_vision

    def shapes(self, arguments: dict[str, Any]) -> list[tuple[int, int]]:
        return shapes(arguments)

    def feature_rows(self, features: Tensor, arguments: dict[str, Any]) -> Tensor:
        return features  # pooled already


class GemmaPatchesAdapter(CommonAdapter):
    """There is no vision encoder: every patch is a token."""

    family: ClassVar[str] = "Gemma 4 without a vision encoder (gemma4_unified: input and layer stages)"
    delimited: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        embedder = getattr(body_of(model), "embed_vision", None)
        return super().matches(model) and hasattr(embedder, "patch_dense")

    @property
    def lacks(self) -> str:
        return f"{type(self.model).__name__} has no vision encoder"

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        known = modality in ("image", "video")
        return (
            Encoded(modality, laid(shapes(arguments), lengths))
            if known
            else super().encoded(modality, arguments, lengths)
        )
