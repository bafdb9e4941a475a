# SPDX-License-Identifier: Apache-2.0
"""Vision encoders that take packed grids of patches: pictures of any size and frames of videos, one after the other."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.vision_utils import get_vision_window_index

from ..runtime.adapter import OF_PATCHES, Adapter, Block, Encoded
from ..runtime.probe import plainly_rotated
from ..stage import Stage
from ..visuals import Layout
from .common import refusal
from .raster import units
from .towers import blocks_of

GRIDS = ("grid_thw", "image_grid_thw", "video_grid_thw")
"""Frames, rows and columns of patches: keywords of towers and of methods that encode."""


class GridAdapter(Adapter):
    """Qwen-VL and what is built like it: a tower that is given `grid_thw`, and modules that make tokens of `side` x `side` patches.

    Patches stand unit after unit where the tower has that number as its `spatial_merge_size`, else row after row; those of a tower
    with windows stand window after window. Attention is within a frame, or within a video.
    """

    family: ClassVar[str] = (
        "models that take packed grids of patches (Qwen2-VL to Qwen3.5, Qwen-Omni, GLM-V, Exaone 4.5)"
    )
    packed: ClassVar[bool] = True
    bias_argument: ClassVar[str | None] = None

    @classmethod
    def matches(cls, model: Any) -> bool:
        if refusal(model) is not None:
            return False
        plain = GridAdapter(model)
        try:
            return bool(blocks_of(plain.tower) and plain.road) and cls.fits(plain)
        except (StopIteration, NotImplementedError):
            return False

    @classmethod
    def fits(cls, plain: GridAdapter) -> bool:
        """Whether the parts that were found are of this form; raises StopIteration where one is missing."""
        return plain.side > 0

    @property
    def reindexes(self) -> bool:  # type: ignore[override]
        return not hasattr(self.base, "get_rope_index")  # which makes positions of several axes

    @property
    def delimited(self) -> bool:  # type: ignore[override]
        return any(hasattr(self.config, f"{name}_start_token_id") for name in ("vision", "image"))

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

    @functools.cached_property
    def road(self) -> list[nn.Module]:
        """The modules between the blocks and the LLM, one after the other: of the tower, and those of the base model that are no
        model by themselves."""
        last = [getattr(self.tower, name, None) for name in ("merger", "patch_merger")]
        behind = [part for part in self.base.children() if not isinstance(part, PreTrainedModel)]
        return [*(part for part in last if part is not None), *behind]

    @property
    def projector(self) -> nn.Module:
        return self.road[0]

    @property
    def joined(self) -> bool:
        """Whether the projector is given one row for each LLM token."""
        return any(hasattr(self.tower, name) for name in ("downsample", "pixel_shuffle", "pixel_unshuffle"))

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
        return order if (index := self._windows(arguments)) is None else index.argsort()[order]

    def _windows(self, arguments: dict[str, Any]) -> Tensor | None:
        """The units (patches, where they are not grouped) of the tower in the order of its windows; None: it has no windows."""
        if not self.windowed:
            return None
        index, _ = get_vision_window_index(
            self._grids(arguments),
            spatial_merge_size=self.tower.spatial_merge_size,
            window_size=self.tower.window_size,
            patch_size=self.tower.patch_size,
        )
        return index

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        grids = zip(self._grids(arguments).tolist(), self.sides(arguments), lengths, strict=True)
        return Encoded(modality, [laid(t, h // side, w // side, length) for (t, h, w), side, length in grids])

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        if self.grouped and (index := self._windows(arguments)) is not None:
            rows = rows[torch.argsort(index).to(rows.device)]
        return list(rows.split([layout.cells for layout in encoded.layouts]))

    def feature_rows(self, features: Tensor, arguments: dict[str, Any]) -> Tensor:
        return features if self.joined else super().feature_rows(features, arguments)

    def project(self, rows: Tensor) -> Tensor:
        first, asked = self.projector, inspect.signature(self.projector.forward).parameters
        if self.joined:
            tokens = first(rows.flatten(0, 1))
        elif len(asked) == 1:
            tokens = first(rows.unflatten(-1, (self.unit, -1)).flatten(0, 2))
        else:  # it is given pictures: units side by side are one, too
            units = rows.unflatten(-1, (self.side, self.side, -1)).flatten(0, 1)
            picture, size = units.transpose(0, 1).flatten(0, 2), (self.side, self.side * len(units))
            if "size" in asked:
                tokens = first(picture[None], size=size)[0]
            else:
                tokens = first(picture, torch.tensor([[1, *size]], device=rows.device))
            begin = (len(tokens) - len(units)) // 2  # of structural tokens, one or none stands in front
            tokens = tokens[begin : begin + len(units)]
        for part in self.road[1:]:
            tokens = part(tokens)
        return tokens.unflatten(0, rows.shape[:2])


def laid(frames: int, rows: int, columns: int, length: int) -> Layout:
    """The layout of `length` tokens of a grid. Frames may have become fewer; or each row has a newline behind it, and all of them
    perhaps a token on both sides. Raises NotImplementedError for other numbers."""
    count, rest = divmod(length, rows * columns)
    if not rest and count <= frames:
        return Layout.raster(count, rows, columns)
    ends = length - frames * rows * (columns + 1)
    if ends not in (0, 2):
        raise NotImplementedError(f"{length} features of {frames} x {rows} x {columns} tokens: no such layout is known")
    newlines = range(ends // 2 + columns, length - ends // 2, columns + 1)
    return Layout.raster(frames, rows, columns, (*([0] if ends else []), *newlines, *([length - 1] if ends else [])))
