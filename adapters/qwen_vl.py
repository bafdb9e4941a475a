# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed pictures of any size, 2x2 patches to one token, M-RoPE."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from ..runtime.adapter import OF_PATCHES, Adapter, Block, Encoded
from ..visuals import Layout
from .towers import blocks_of


class QwenVLAdapter(Adapter):
    """Attention is within a frame; Qwen2.5-VL keeps its patches in the order of attention windows."""

    family: ClassVar[str] = "Qwen2-VL, Qwen2.5-VL and Qwen3-VL (qwen2_vl, qwen2_5_vl, qwen3_vl)"
    reindexes: ClassVar[bool] = False
    delimited: ClassVar[bool] = True
    packed: ClassVar[bool] = True
    bias_argument: ClassVar[str | None] = None

    @classmethod
    def matches(cls, model: Any) -> bool:
        config = getattr(model, "config", None)
        # Qwen3.5 has the same vision encoder on a hybrid language model
        return getattr(config, "model_type", None) in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")

    @property
    def tower(self) -> Any:
        return self.base.visual

    @property
    def unit(self) -> int:  # type: ignore[override]
        return int(self.tower.spatial_merge_size) ** 2

    @functools.cached_property
    def blocks(self) -> list[Block]:
        # their rotation is one that can be made again
        return [replace(block, heard=False) for block in blocks_of(self.tower)]

    @property
    def feature_blocks(self) -> list[int]:
        """The last block; signals of attention need one with full attention, which the last one is in all releases."""
        return [max(getattr(self.tower, "fullatt_block_indexes", None) or [len(self.tower.blocks) - 1])]

    @property
    def prefix(self) -> int:
        return 0

    def segments(self, arguments: dict[str, Any]) -> list[int]:
        return [h * w for t, h, w in arguments["grid_thw"].tolist() for _ in range(t)]

    @property
    def projector(self) -> nn.Module:
        return self.tower.merger

    @property
    def signals(self) -> frozenset[str]:
        return OF_PATCHES | {"encoder_features"}

    @staticmethod
    def _grids(arguments: dict[str, Any]) -> Tensor:
        grids = arguments.get("image_grid_thw")
        return grids if grids is not None else arguments["video_grid_thw"]

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        side = int(self.tower.spatial_merge_size)
        return Encoded(
            modality, [Layout.raster(t, h // side, w // side) for t, h, w in self._grids(arguments).tolist()]
        )

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        if hasattr(self.tower, "window_size"):
            index, _ = get_vision_window_index(
                self._grids(arguments),
                spatial_merge_size=self.tower.spatial_merge_size,
                window_size=self.tower.window_size,
                patch_size=self.tower.patch_size,
            )
            rows = rows[torch.argsort(index).to(rows.device)]
        return list(rows.split([layout.cells for layout in encoded.layouts]))

    def project(self, rows: Tensor) -> Tensor:
        patches = rows.unflatten(-1, (self.unit, -1)).flatten(0, 2)
        return self.projector(patches).unflatten(0, rows.shape[:2])
