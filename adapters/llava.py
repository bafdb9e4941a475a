# SPDX-License-Identifier: Apache-2.0
"""LLaVA: 1.5 (one view), NeXT, NeXT-Video and OneVision (thumbnail, tiles, newlines, video), CLIP or SigLIP tower."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..runtime.adapter import Adapter, Encoded, config_of
from ..visuals import Layout, View
from .layouts import AnyRes, resize
from .square import SquareAdapter

TOWERS = ("clip_vision_model", "siglip_vision_model")  # by config type


class LlavaAdapter(SquareAdapter):
    """LLaVA-1.5: one token per patch."""

    family: ClassVar[str] = "LLaVA-1.5 (model_type llava with a CLIP or SigLIP vision tower)"
    model_types: ClassVar[tuple[str, ...]] = ("llava",)

    @classmethod
    def matches(cls, model: Any) -> bool:
        config = config_of(model)
        if getattr(config, "model_type", None) not in cls.model_types or not hasattr(model, "base_model_prefix"):
            return False
        return config.vision_config.model_type in TOWERS

    def features(self, output: Any, arguments: dict[str, Any]) -> Sequence[Tensor]:
        return Adapter.features(self, output, arguments)


class AnyResAdapter(LlavaAdapter):
    """What LLaVA-NeXT, NeXT-Video and OneVision share: pictures cut into tiles, videos pooled frame by frame."""

    def check_encoder_call(self, arguments: dict[str, Any]) -> None:
        super().check_encoder_call(arguments)
        if self.structural:
            raise NotImplementedError(
                "vision_feature_select_strategy='full' keeps a CLS token in every tile, for which there is no place: use 'default'"
            )

    def pictures(self, arguments: dict[str, Any]) -> list[AnyRes | None]:
        """How each picture of an encoder call is cut; None: one view and a newline."""
        config = self.config
        pinpoints = tuple((int(height), int(width)) for height, width in config.image_grid_pinpoints)
        tile, patch = config.vision_config.image_size, config.vision_config.patch_size
        given = arguments["image_sizes"]  # a tensor, or what a collator makes: lists, tuples, tensors in a list
        rows = given.tolist() if hasattr(given, "tolist") else given
        sizes = [(int(height), int(width)) for height, width in rows]
        cut = self._cut(arguments, len(sizes))
        found = (AnyRes(size, pinpoints, tile, patch, most_tiles=self._most_tiles(arguments)) for size in sizes)
        return [picture if is_cut else None for picture, is_cut in zip(found, cut, strict=True)]

    def _cut(self, arguments: dict[str, Any], pictures: int) -> list[bool]:
        return [True] * pictures

    def _most_tiles(self, arguments: dict[str, Any]) -> int | None:
        return None

    video_newline: ClassVar[bool] = False

    @property
    def pooled(self) -> int:
        """Tokens per side of a video frame."""
        raise NotImplementedError

    def pool(self, frames: Tensor, nearest: bool) -> Tensor:
        """[frames, C, side, side] as a video's frames are pooled."""
        raise NotImplementedError

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        if modality == "video":
            pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))  # 5.17 has the latter name
            frames, side = pixels.shape[1], self.pooled
            newline = (frames * side * side,) if self.video_newline else ()
            return Encoded(modality, [Layout((View((side, side), role="frame"),) * frames, newline)] * len(lengths))
        one = Layout((View((self.side, self.side)),), (self.side**2,))
        return Encoded(modality, [p.layout() if p is not None else one for p in self.pictures(arguments)])

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        if encoded.modality == "video":
            if rows.shape[1] != self.pooled**2:  # not pooled yet
                rows = self.pool(rows.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2), nearest)
                rows = rows.flatten(2).transpose(1, 2)
            return list(rows.unflatten(0, (len(encoded.layouts), -1)).flatten(1, 2))
        parts = rows.split(self.views(encoded, arguments))
        return [
            part[0] if picture is None else picture.pack(part, nearest)
            for picture, part in zip(self.pictures(arguments), parts, strict=True)
        ]

    def views(self, encoded: Encoded, arguments: dict[str, Any]) -> list[int]:
        if encoded.modality == "video":
            return [len(layout.views) for layout in encoded.layouts]
        return [1 if p is None else 1 + p.tiles[0] * p.tiles[1] for p in self.pictures(arguments)]


class LlavaNextAdapter(AnyResAdapter):
    family: ClassVar[str] = "LLaVA-NeXT and LLaVA-NeXT-Video (llava_next, llava_next_video)"
    model_types: ClassVar[tuple[str, ...]] = ("llava_next", "llava_next_video")

    @property
    def pooled(self) -> int:
        return self.side // self.config.spatial_pool_stride

    def pool(self, frames: Tensor, nearest: bool) -> Tensor:
        stride = self.config.spatial_pool_stride
        # a "conv" resampler cannot pool signals: they take the mean
        if self.config.spatial_pool_mode == "max" or nearest:
            return F.max_pool2d(frames.double(), stride).to(frames.dtype)
        return F.avg_pool2d(frames, stride)


class LlavaOnevisionAdapter(AnyResAdapter):
    family: ClassVar[str] = "LLaVA-OneVision (llava_onevision)"
    model_types: ClassVar[tuple[str, ...]] = ("llava_onevision",)
    video_newline: ClassVar[bool] = True

    def _cut(self, arguments: dict[str, Any], pictures: int) -> list[bool]:
        counts = arguments.get("batch_num_images")
        if counts is None:
            return [True] * pictures
        return [int(n) == 1 for n in counts for _ in range(int(n))]

    def _most_tiles(self, arguments: dict[str, Any]) -> int | None:
        ratio = arguments.get("vision_aspect_ratio") or self.config.vision_aspect_ratio
        return int(ratio.removeprefix("anyres_max_"))

    @property
    def pooled(self) -> int:
        return math.ceil(self.side / 2)

    def pool(self, frames: Tensor, nearest: bool) -> Tensor:
        return resize(frames, (self.pooled, self.pooled), nearest)
