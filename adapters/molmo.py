# SPDX-License-Identifier: Apache-2.0
"""Molmo 2: crops that overlap, and tokens that are told which patches (2 x 2, 3 x 3 in videos) attention pools them from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..runtime.adapter import OF_PATCHES, Adapter, Block, Encoded, body_of
from ..stage import Stage
from ..visuals import Layout, View
from .towers import blocks_of


class Molmo2Adapter(Adapter):
    """A patch of no token is in a part of a crop that another one shows better. Places of patches beyond the picture are -1."""

    family: ClassVar[str] = "Molmo 2 (molmo2)"
    delimited: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        return hasattr(getattr(body_of(model), "multi_modal_projector", None), "image_pooling_2d")

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return blocks_of(self.tower)

    @property
    def prefix(self) -> int:
        return 0

    @property
    def feature_blocks(self) -> list[int]:
        layers = self.model.config.adapter_config.vision_feature_layer
        return [layer % len(self.blocks) for layer in layers]

    @property
    def signals(self) -> frozenset[str]:
        return OF_PATCHES | {"encoder_features"}

    def check_stage(self, stage: Stage) -> None:
        raise NotImplementedError(
            f"{stage!r}: the tokens of {type(self.model).__name__} are pooled by attention from patches of overlapping crops, so "
            f"none of its patches can be merged token by token: choose a stage behind it"
        )

    @staticmethod
    def _pooled(arguments: dict[str, Any]) -> Tensor:
        """The patches of each token, [T, patches], -1 for none."""
        places = arguments.get("image_token_pooling")
        places = arguments["video_token_pooling"] if places is None else places
        return places[(places >= 0).any(-1)]

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        if modality == "video":
            return Encoded(modality, [Layout.raster(*grid) for grid in arguments["video_grids"].tolist()])
        layouts = []
        for rows, columns, tile_rows, tile_columns in arguments["image_grids"].tolist():
            whole, tiles = (rows, columns), (tile_rows, tile_columns)
            two = (View(whole, role="thumbnail"), View(tiles, role="tiles"))
            layouts.append(Layout(two) if 0 not in tiles else Layout.raster(1, *whole))
        return Encoded(modality, layouts)

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        places, flat = self._pooled(arguments).to(rows.device), rows.flatten(0, 1)
        if len(rows) > 1 or len(flat) != len(places):  # one row is of tokens
            there = (places >= 0)[..., None]
            flat = torch.where(there, flat[places.clamp(min=0)], 0).sum(1) / there.sum(1)
        return list(flat.split([layout.cells for layout in encoded.layouts]))

    def feature_rows(self, features: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The patches of each token side by side, zeros where there is none: [1, T, patches * De]."""
        places = self._pooled(arguments).to(features.device)
        found = features.reshape(-1, features.shape[-1])[places.clamp(min=0)]
        return torch.where((places >= 0)[..., None], found, 0).flatten(1)[None]

    def project(self, rows: Tensor) -> Tensor:
        width = self.projector.image_pooling_2d.k_proj.in_features
        patches = rows.reshape(-1, width)
        places = torch.arange(len(patches), device=rows.device).masked_fill(~patches.any(-1), -1)
        made = self.projector(patches, places.view(-1, rows.shape[-1] // width)).last_hidden_state
        return made.unflatten(0, rows.shape[:2])
