# SPDX-License-Identifier: Apache-2.0
"""InternVL (HF-native): tiles with the thumbnail last, 2x2 patches of a tile to one token by pixel shuffle."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.adapter import OF_CLS, OF_PATCHES, Adapter, Block, Encoded
from ..visuals import Layout
from .layouts import tiled
from .towers import blocks_of


class InternVLAdapter(Adapter):
    """The model is given a row of tiles. Which of them make one picture is read from the prompt (a run of placeholders is
    one picture), and how they lie is found by comparing them with the thumbnail. A video is a row of pictures to it."""

    family: ClassVar[str] = "InternVL (internvl)"
    unit: ClassVar[int] = 4
    delimited: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        if getattr(getattr(model, "config", None), "model_type", None) != "internvl":
            return False
        if model.config.downsample_ratio != 0.5:
            raise NotImplementedError(f"downsample_ratio={model.config.downsample_ratio}: only 0.5 is supported")
        return True

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return blocks_of(self.tower)

    @property
    def prefix(self) -> int:
        return 1

    def order(self, patches: int, arguments: dict[str, Any]) -> Tensor:
        side = math.isqrt(patches)
        grid = torch.arange(patches).view(side // 2, 2, side // 2, 2)
        return grid.permute(0, 2, 1, 3).flatten()

    @property
    def signals(self) -> frozenset[str]:
        # no cls_feature: a CLS token cannot take the road through the pixel shuffle
        return OF_CLS | OF_PATCHES | {"encoder_features"}

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        side = math.isqrt(lengths[0]) if lengths else 0
        small = F.adaptive_avg_pool2d(arguments["pixel_values"].detach().float(), 8) if len(lengths) > 1 else None
        return Encoded(modality, [Layout.raster(1, side, side)] * len(lengths), pixels=small)

    def assemble(self, encoded: Encoded, runs: list[int]) -> None:
        if encoded.pixels is None:
            return
        tokens = encoded.layouts[0].cells
        if any(run % tokens for run in runs) or sum(runs) != tokens * len(encoded.layouts):
            raise ValueError(
                f"the prompt has runs of {', '.join(map(str, runs))} image placeholders, but there are {len(encoded.layouts)} "
                f"tiles of {tokens} tokens: a picture is one run between its start and end token"
            )
        side, pixels = math.isqrt(tokens), encoded.pixels.cpu()
        tiles = [run // tokens for run in runs]
        encoded.layouts = [tiled(*_arrangement(part), side) for part in pixels.split(tiles)]
        for name, values in encoded.signals.items():
            encoded.signals[name] = _together(values, tiles)
        if encoded.clusters is not None:
            encoded.clusters = _together(encoded.clusters, tiles)
            first = [sum(tiles[:i]) for i in range(len(tiles))]
            encoded.left = [sum(encoded.left[at : at + n]) for at, n in zip(first, tiles, strict=True)]
        encoded.pixels = None

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        return list(rows)


def _together(parts: list[Tensor], counts: list[int]) -> list[Tensor]:
    """Neighbouring parts joined, `counts` of them each time."""
    rest = iter(parts)
    return [torch.cat([next(rest) for _ in range(count)]) for count in counts]


def _arrangement(tiles: Tensor) -> tuple[int, int]:
    """Rows and columns of the tiles [n, 3, p, p] of one picture, the thumbnail last: those that look most like it."""
    count = len(tiles) - 1
    if count < 1:
        return 1, 1
    found, smallest = (1, count), math.inf
    for rows in (r for r in range(1, count + 1) if count % r == 0):
        columns = count // rows
        whole = tiles[:-1].unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        difference = float((F.adaptive_avg_pool2d(whole, tiles.shape[-1]) - tiles[-1]).square().mean())
        if difference < smallest:
            found, smallest = (rows, columns), difference
    return found
