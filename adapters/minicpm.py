# SPDX-License-Identifier: Apache-2.0
"""MiniCPM-V 4.6 and later: packed pictures whose patches are merged between two blocks and again in front of the LLM."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.adapter import Block, body_of
from ..runtime.refusal import refusal
from .raster import RasterAdapter


class MiniCPMAdapter(RasterAdapter):
    """Blocks are those behind the merger in the encoder: their patches are those that the LLM's tokens are made of. A picture and
    each of its slices stand between a start and an end token."""

    family: ClassVar[str] = "MiniCPM-V with a merger in its vision encoder (minicpmv4_6, minicpmv4_7, minicpm_ocr)"
    packed: ClassVar[bool] = True
    delimited: ClassVar[bool] = True
    bias_argument: ClassVar[str | None] = None

    @classmethod
    def matches(cls, model: Any) -> bool:
        base = body_of(model)
        return refusal(model) is None and hasattr(base, "merger") and hasattr(base.vision_tower, "vit_merger")

    @property
    def window(self) -> int:
        """Patches per side that the merger between the blocks makes one of; 1 where it does not run."""
        between = self.config.downsample_mode != "4x"
        return int(self.tower.config.window_kernel_size[0]) if between else 1

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return super().blocks[self.tower.config.insert_layer_id + 1 if self.window > 1 else 0 :]

    @property
    def side(self) -> int:
        return int(self.config.merge_kernel_size[0]) ** int(self.config.merger_times)

    @property
    def projector(self) -> nn.Module:
        return self.base.merger

    def check_encoder_call(self, arguments: dict[str, Any]) -> None:
        super().check_encoder_call(arguments)
        mode, configured = arguments.get("downsample_mode"), self.config.downsample_mode
        if mode is not None and mode != configured:
            raise NotImplementedError(
                f"downsample_mode={mode!r} was passed to a compressed model whose config says {configured!r}: change "
                f"model.config.downsample_mode before compress()"
            )

    def shapes(self, arguments: dict[str, Any]) -> list[tuple[int, int]]:
        sizes = arguments.get("target_sizes")
        if sizes is None:
            sizes = arguments["target_sizes_videos"].repeat(len(arguments["pixel_values_videos"]), 1)
        return [(rows // self.window, columns // self.window) for rows, columns in sizes.tolist()]

    def shown(self, arguments: dict[str, Any]) -> Iterable[Tensor]:
        strip, sizes = arguments["pixel_values"][0], arguments["target_sizes"].tolist()
        side = strip.shape[1]
        for part, (h, w) in zip(strip.split([h * w * side for h, w in sizes], -1), sizes, strict=True):
            yield part.unflatten(-1, (h, w, side)).permute(0, 2, 1, 3, 4).reshape(-1, h * side, w * side)

    def project(self, rows: Tensor) -> Tensor:
        patches = rows.unflatten(-1, (self.unit, -1)).flatten(0, 2)
        size = torch.tensor([[len(patches) // self.side, self.side]])  # tokens one below the other are a picture, too
        return self.projector(patches[None], size)[0].unflatten(0, rows.shape[:2])
