# SPDX-License-Identifier: Apache-2.0
"""Vision encoders that take packed grids of patches: pictures of any size and frames of videos, one after the other."""

from __future__ import annotations

import functools
import inspect
import itertools
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..runtime.adapter import OF_PATCHES, Adapter, Block, in_windows
from ..runtime.probe import plainly_rotated
from ..stage import Stage
from .raster import units
from .towers import blocks_of

GRIDS = ("grid_thw", "image_grid_thw", "video_grid_thw")
"""Frames, rows and columns of patches: keywords of towers and of methods that encode."""


class GridTower(Adapter):
    """A tower that is given `grid_thw`, found by that, and of which `side` x `side` patches become one LLM token.

    Patches stand unit after unit where the tower has that number as its `spatial_merge_size`, else row after row; those of a tower
    with windows stand window after window. Attention is within a frame, or within a video.
    """

    packed: ClassVar[bool] = True
    bias_argument: ClassVar[str | None] = None

    @functools.cached_property
    def tower(self) -> Any:
        return next(c for c in self.base.children() if {*GRIDS}.intersection(inspect.signature(c.forward).parameters))

    @functools.cached_property
    def side(self) -> int:
        """Patches per side of what becomes one LLM token."""
        sides = (
            getattr(self.tower.config, f"{name}_size", None) for name in ("spatial_merge", "merge_kernel", "merge")
        )
        side = next(side for side in sides if side is not None)
        return int(side if isinstance(side, int) else side[0])

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.side**2

    def sides(self, arguments: dict[str, Any]) -> list[int]:
        """The same of each visual of a call."""
        return [self.side] * len(self._grids(arguments))

    @property
    def grouped(self) -> bool:
        """Whether patches stand unit after unit."""
        return getattr(self.tower, "spatial_merge_size", 1) == self.side

    @property
    def windowed(self) -> bool:
        return hasattr(self.tower, "window_size")

    @functools.cached_property
    def blocks(self) -> list[Block]:
        blocks = blocks_of(self.tower)
        heard = not plainly_rotated(blocks[0])
        return [replace(block, heard=heard) for block in blocks]

    @property
    def feature_blocks(self) -> list[int]:
        """The last block; signals of attention need one with full attention, which the last one is in all releases."""
        return [max(getattr(self.tower, "fullatt_block_indexes", None) or [len(self.blocks) - 1])]

    @property
    def prefix(self) -> int:
        return 0

    def segments(self, arguments: dict[str, Any]) -> list[int]:
        if self.windowed:  # windows lie in frames
            return [h * w for t, h, w in arguments["grid_thw"].tolist() for _ in range(t)]
        return arguments["cu_seqlens"].diff().tolist()

    @property
    def signals(self) -> frozenset[str]:
        return OF_PATCHES | {"encoder_features"}

    def check_stage(self, stage: Stage) -> None:
        known = self.grouped and hasattr(self.tower, "merger") and hasattr(self.tower.config, "temporal_patch_size")
        if stage.kind == "pixel" and not known:
            raise NotImplementedError(
                f"{stage!r}: {type(self.tower).__name__} does not take and give patches as that of Qwen2-VL does, so it cannot be "
                f"given smaller pictures: choose a stage inside the encoder or behind it"
            )

    @staticmethod
    def _grids(arguments: dict[str, Any]) -> Tensor:
        """Frames, rows and columns of the patches of each visual, in a call of the tower or of the method that encodes."""
        return next(grids for name in GRIDS if (grids := arguments.get(name)) is not None)

    def order(self, patches: int, arguments: dict[str, Any]) -> Tensor | None:
        if self.grouped:
            return None
        frames = [units(h, w, self.side) for t, h, w in self._grids(arguments).tolist() for _ in range(t)]
        starts = itertools.accumulate(map(len, frames), initial=0)
        order = torch.cat([start + frame for start, frame in zip(starts, frames, strict=False)])
        return order if (places := self._in_windows(arguments)) is None else places[order]

    def _in_windows(self, arguments: dict[str, Any]) -> Tensor | None:
        """Where each unit (patch, where they are not grouped) of the tower stands among its windows; None: it has no windows."""
        if not self.windowed:
            return None
        tower, grids = self.tower, tuple(map(tuple, self._grids(arguments).tolist()))
        return in_windows(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)
