# SPDX-License-Identifier: Apache-2.0
"""Pictures of any size as rasters of patches: what the adapters of packed and of padded vision encoders share."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.adapter import OF_PATCHES, Adapter, Block, Encoded, Run
from ..stage import Stage
from ..visuals import Layout, View
from .tiles import THUMB, join, pictures
from .towers import blocks_of


class RasterAdapter(Adapter):
    """Every row of the encoder is one picture or frame, its patches row after row; `side` x `side` of them make one LLM token."""

    prefix: ClassVar[int] = 0  # type: ignore[assignment]

    @property
    def reindexes(self) -> bool:  # type: ignore[override]
        return not hasattr(self.base, "get_rope_index")  # which makes positions of several axes

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
        # masks and bounds of rows are those of the module
        return [replace(block, heard=True) for block in blocks_of(self.tower)]

    @property
    def feature_blocks(self) -> list[int]:
        return [len(self.blocks) - 1]

    @property
    def signals(self) -> frozenset[str]:
        return OF_PATCHES | {"encoder_features"}

    def check_stage(self, stage: Stage) -> None:
        if stage.kind == "pixel":
            raise NotImplementedError(
                f"{stage!r}: {type(self.tower).__name__} is given patches and their places, not pictures that could be made "
                f"smaller: choose a stage behind the encoder, or give the processor smaller pictures"
            )

    def segments(self, arguments: dict[str, Any]) -> list[int]:
        return [rows * columns for rows, columns in self.shapes(arguments)]

    def order(self, patches: int, arguments: dict[str, Any]) -> Tensor:
        shapes = self.shapes(arguments)
        lengths = [patches // len(shapes) if self.padded else rows * columns for rows, columns in shapes]
        starts = itertools.accumulate(lengths, initial=0)
        return torch.cat([start + units(*shape, self.side) for start, shape in zip(starts, shapes, strict=False)])

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        layouts = laid([(rows // self.side, columns // self.side) for rows, columns in self.shapes(arguments)], lengths)
        seen = self.shown(arguments) if modality == "image" and len(layouts) > 1 else ()
        small = [F.adaptive_avg_pool2d(picture.detach().float(), THUMB) for picture in seen]
        return Encoded(modality, layouts, pixels=torch.stack(small) if small else None)

    def shown(self, arguments: dict[str, Any]) -> Iterable[Tensor]:
        """The picture [3, height, width] that every row shows, where large pictures come as tiles and a view of the whole."""
        return ()

    def assemble(self, encoded: Encoded, runs: list[Run]) -> None:
        if encoded.pixels is not None:
            join(encoded, pictures(encoded.pixels, runs, [layout.tokens for layout in encoded.layouts]))

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        return list(rows.split([layout.cells for layout in encoded.layouts]))


def laid(grids: Sequence[tuple[int, int]], lengths: Sequence[int]) -> list[Layout]:
    """Layouts of visuals of so many tokens, whose pictures or frames have these rows and columns of tokens."""
    views, layouts = iter(View(grid) for grid in grids), []
    for length in lengths:
        frames: list[View] = []
        while sum(view.cells for view in frames) < length:
            frames.append(next(views))
        layouts.append(Layout(tuple(frames if len(frames) == 1 else (replace(view, role="frame") for view in frames))))
    return layouts


@functools.lru_cache(maxsize=256)
def units(rows: int, columns: int, side: int) -> Tensor:
    """Numbers of the patches of a picture, side * side of them for each token after each other; those that fill none are left
    out."""
    grid = torch.arange(rows * columns).view(rows, columns)[: rows // side * side, : columns // side * side]
    return grid.unflatten(1, (-1, side)).unflatten(0, (-1, side)).permute(0, 2, 1, 3).flatten()
