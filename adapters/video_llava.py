# SPDX-License-Identifier: Apache-2.0
"""Video-LLaVA: one vision encoder for pictures and one of the same kind for videos, whose frames keep their CLS tokens."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from ..runtime.adapter import Adapter, Encoded, body_of
from ..visuals import Layout, View
from .square import SquareAdapter


class VideoLlavaAdapter(SquareAdapter):
    """Knows the encoder of one modality; `eye` gives the other."""

    family: ClassVar[str] = "Video-LLaVA (video_llava)"

    def __init__(self, model: Any, modality: str = "image") -> None:
        super().__init__(model)
        self.modality = modality

    @classmethod
    def matches(cls, model: Any) -> bool:
        return hasattr(body_of(model), "video_tower") and hasattr(body_of(model), "image_tower")

    @functools.cached_property
    def _video(self) -> VideoLlavaAdapter:
        return VideoLlavaAdapter(self.model, "video")

    def eye(self, modality: str) -> Adapter:
        return self._video if modality == "video" != self.modality else self

    @property
    def tower(self) -> Any:
        return getattr(self.base, f"{self.modality}_tower")

    @property
    def structural(self) -> int:
        return self.prefix if self.modality == "video" else super().structural

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        if modality != "video":
            return super().encoded(modality, arguments, lengths)
        frames, side = arguments["pixel_values_videos"].shape[1], self.side
        tokens = self.structural + side**2
        before = tuple(frame * tokens + i for frame in range(frames) for i in range(self.structural))
        layout = Layout((View((side, side), role="frame"),) * frames, before)
        return Encoded(modality, [layout] * (len(lengths) // frames))

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        return list(rows.unflatten(0, (len(encoded.layouts), -1)).flatten(1, 2))

    def views(self, encoded: Encoded, arguments: dict[str, Any]) -> list[int]:
        return [len(layout.views) for layout in encoded.layouts]
