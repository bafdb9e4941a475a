# SPDX-License-Identifier: Apache-2.0
"""The vision encoder of Gemma 4: patches with their places, in rows filled up with padding, pooled into tokens by place."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..runtime.adapter import body_of
from .common import refusal
from .raster import RasterAdapter

PLACES = ("image_position_ids", "video_position_ids", "pixel_position_ids")


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
        places = next(arguments[name] for name in PLACES if arguments.get(name) is not None)
        return [(y + 1, x + 1) for x, y in places.flatten(0, -3).amax(1).tolist()]

    def feature_rows(self, features: Tensor, arguments: dict[str, Any]) -> Tensor:
        return features  # pooled already
