# SPDX-License-Identifier: Apache-2.0
"""The road from packed grids of patches to the tokens of the language model: Qwen-VL and what is built like it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..runtime.adapter import Encoded
from ..runtime.refusal import refusal
from ..visuals import Layout
from .grid_towers import GridTower
from .towers import blocks_of


class GridAdapter(GridTower):
    """Modules of the tower and of the base model make LLM tokens of its patches, one after the other. They are given patches, unit
    after unit; or one row for each token; or a picture and its size."""

    family: ClassVar[str] = (
        "models that take packed grids of patches (Qwen2-VL to Qwen3.5, Qwen-Omni, GLM-V, Exaone 4.5)"
    )

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

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        grids = zip(self._grids(arguments).tolist(), self.sides(arguments), lengths, strict=True)
        return Encoded(modality, [laid(t, h // side, w // side, length) for (t, h, w), side, length in grids])

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        if self.grouped and (places := self._in_windows(arguments)) is not None:
            rows = rows[places.to(rows.device, non_blocking=True)]
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
