# SPDX-License-Identifier: Apache-2.0
"""Pictures of any size as rasters of patches: what the adapters of packed and of padded vision encoders share."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..runtime.adapter import OF_PATCHES, Adapter, Block, Encoded
from ..visuals import Layout
from .towers import blocks_of


class RasterAdapter(Adapter):
    """Every row of the encoder is one picture, its patches row after row; `side` x `side` of them make one LLM token."""

    prefix: ClassVar[int] = 0  # type: ignore[assignment]

    @property
    def side(self) -> int:
        """Patches per side of a token."""
        raise NotImplementedError

    def shapes(self, arguments: dict[str, Any]) -> list[tuple[int, int]]:
        """Rows and columns of patches of every row of the encoder, from the keyword arguments of the tower's or the encoder
        method's call."""
        raise NotImplementedError

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.side**2

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return blocks_of(self.tower)

    @property
    def signals(self) -> frozenset[str]:
        return OF_PATCHES | {"encoder_features"}

    def segments(self, arguments: dict[str, Any]) -> list[int]:
        return [rows * columns for rows, columns in self.shapes(arguments)]

    def order(self, patches: int, arguments: dict[str, Any]) -> Tensor:
        shapes = self.shapes(arguments)
        lengths = [patches // len(shapes) if self.padded else rows * columns for rows, columns in shapes]
        starts = itertools.accumulate(lengths, initial=0)
        return torch.cat([start + units(*shape, self.side) for start, shape in zip(starts, shapes, strict=False)])

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        side = self.side
        grids = [(rows // side, columns // side) for rows, columns in self.shapes(arguments)]
        return Encoded(modality, [Layout.raster(1, rows, columns) for rows, columns in grids])

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        return list(rows.split([layout.cells for layout in encoded.layouts]))


@functools.lru_cache(maxsize=256)
def units(rows: int, columns: int, side: int) -> Tensor:
    """Numbers of the patches of a picture, side * side of them for each token after each other; those that fill none are left
    out."""
    grid = torch.arange(rows * columns).view(rows, columns)[: rows // side * side, : columns // side * side]
    return grid.unflatten(1, (-1, side)).unflatten(0, (-1, side)).permute(0, 2, 1, 3).flatten()
