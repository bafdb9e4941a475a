# SPDX-License-Identifier: Apache-2.0
"""Vision encoders that take pictures or tiles of one square size, found by the parts and attributes that the model has."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.adapter import CLS_FEATURES, OF_CLS, OF_PATCHES, Adapter, Block, Encoded, Run, body_of
from ..runtime.hooks import running
from ..runtime.refusal import refusal
from ..stage import PixelStage, Stage
from ..visuals import Layout
from .tiles import join, pictures, small
from .towers import blocks_of, child
from .units import side_by_side, through, unit_order

TOWERS = ("vision_tower", "vision_model", "image_tower")
PROJECTORS = ("multi_modal_projector", "aligner", "connector")
SQUARES = frozenset(
    {
        "pixel_values", "pixel_attention_mask", "vision_feature_layer", "vision_feature_select_strategy", "kwargs",
        "high_res_pixel_values", "tile_fine_mask",
    }
)  # fmt: skip
"""Arguments of a method that encodes squares: none says of what size pictures are."""
RATIOS = ("scale_factor", "downsample_factor", "kernel_size", "pooling_ratio")
"""How many patches of a side a projector makes one token of."""


class SquareAdapter(Adapter):
    """`factor` x `factor` patches make one token: 1, or by a shuffle or mean of patches. Views that stand close together in the
    prompt and laid together look like another one beside them are tiles of one picture."""

    family: ClassVar[str] = "models whose vision encoder takes square pictures or tiles"

    @classmethod
    def matches(cls, model: Any) -> bool:
        if refusal(model) is not None:
            return False
        base = body_of(model)
        tower, encode = child(base, TOWERS), getattr(base, "get_image_features", None)
        projector = cls._projector(base, tower)
        if tower is None or projector is None or encode is None or cls._embeddings(tower) is None:
            return False
        if not set(inspect.signature(encode).parameters) <= SQUARES:
            return False
        if any("attn" in name or "perceiver" in name for name, _ in projector.named_modules()):
            return False  # of queries, which have no grid
        try:
            return all(hasattr(block.attention, "config") for block in blocks_of(tower))
        except NotImplementedError:
            return False

    @staticmethod
    def _embeddings(tower: nn.Module) -> Any:
        """The part of a tower that cuts pictures into patches and puts CLS before them."""
        return next((part for name, part in tower.named_modules() if name.split(".")[-1] == "embeddings"), None)

    @property
    def tower(self) -> Any:
        return child(self.base, TOWERS)

    @staticmethod
    def _projector(base: Any, tower: Any) -> Any:
        return child(base, PROJECTORS) or (tower and child(tower, PROJECTORS))

    @property
    def projector(self) -> Any:
        return self._projector(self.base, self.tower)

    @property
    def alone(self) -> bool:
        """Whether the projector is given encoder features and nothing else, so that rows of them can be sent through it."""
        taken = inspect.signature(running(self.projector).forward).parameters.values()
        return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in taken) <= 1

    @functools.cached_property
    def blocks(self) -> list[Block]:
        return blocks_of(self.tower)

    @property
    def prefix(self) -> int:
        embeddings = self._embeddings(self.tower)
        return int(any(getattr(embeddings, name, None) is not None for name in ("class_embedding", "cls_token")))

    @property
    def feature_blocks(self) -> list[int]:
        if getattr(self.config, "vision_feature_layer", None) is None:
            return [len(self.blocks) - 1]
        return super().feature_blocks

    @property
    def side(self) -> int:
        """Patches per side of a view."""
        vision = self.config.vision_config
        size, patch = (n if isinstance(n, int) else n[0] for n in (vision.image_size, vision.patch_size))
        return size // patch

    @functools.cached_property
    def pools(self) -> int:
        """How many patches of a side the projector makes one token of."""
        found = (getattr(part, name, None) for part in self.projector.modules() for name in RATIOS)
        return next((ratio for ratio in found if isinstance(ratio, int)), 1)

    @property
    def factor(self) -> int:
        """How many patches of a side make one token."""
        return self.pools

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.factor**2

    @property
    def delimited(self) -> bool:  # type: ignore[override]
        return self.factor > 1 or any(hasattr(self.config, f"eoi_token_{what}") for what in ("id", "index"))

    def order(self, patches: int, arguments: dict[str, Any]) -> Tensor | None:
        return unit_order(patches, self.factor) if self.factor > 1 else None

    @property
    def signals(self) -> frozenset[str]:
        found = OF_PATCHES | (OF_CLS if self.prefix else frozenset())
        if not self.alone:
            return found
        # a CLS token cannot take a road on which patches are fused
        return found | {"encoder_features"} | (set(CLS_FEATURES) if self.prefix and self.unit == 1 else set())

    @property
    def lacks(self) -> str:
        what = "puts more than the features of this vision encoder together, so that alone they make no tokens"
        return "" if self.alone else f"{type(self.projector).__name__} {what}"

    @property
    def structural(self) -> int:
        """Tokens of a view that strategy "full" keeps before the patches: the CLS token, if the tower has one."""
        return self.prefix if getattr(self.config, "vision_feature_select_strategy", None) == "full" else 0

    def check_stage(self, stage: Stage) -> None:
        kind, takes = type(self.tower).__name__, inspect.signature(self.tower.forward).parameters
        if "high_res_pixel_values" in inspect.signature(self.base.get_image_features).parameters:
            raise NotImplementedError(f"{stage!r} acts in {kind}, one of two vision encoders: the other gives all")
        embeddings, name = self._embeddings(self.tower), "interpolate_pos_encoding"
        always = hasattr(embeddings, name) and name not in inspect.signature(embeddings.forward).parameters
        if isinstance(stage, PixelStage) and name not in takes and not always:
            raise NotImplementedError(f"{stage!r}: {kind} takes pictures of one size only, no smaller ones")

    def check_encoder_call(self, arguments: dict[str, Any]) -> None:
        super().check_encoder_call(arguments)
        if arguments.get("tile_fine_mask") is not None:
            raise NotImplementedError("tile_fine_mask: a compressed model takes the coarse route only, call it without")

    def features(self, output: Any, arguments: dict[str, Any]) -> Sequence[Tensor]:
        found = super().features(output, arguments)
        if isinstance(found, Tensor) and found.dim() == 3:
            return found
        states = output.last_hidden_state  # one tensor per sample, or all pictures in a row
        return torch.cat([f.flatten(0, -2) for f in found]).unflatten(0, (len(states), -1))

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        layouts = []
        for length in lengths:
            side = math.isqrt(length - self.structural)
            if side * side != length - self.structural:
                raise NotImplementedError(f"an image of {length} tokens is no square grid of patches")
            layouts.append(Layout.raster(1, side, side, tuple(range(self.structural))))
        return Encoded(modality, layouts, pixels=small(arguments, len(layouts)) if self.factor > 1 else None)

    def assemble(self, encoded: Encoded, runs: list[Run]) -> None:
        if encoded.pixels is not None:
            join(encoded, pictures(encoded.pixels, runs, [layout.tokens for layout in encoded.layouts]))

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        return list(rows)

    def feature_rows(self, features: Tensor, arguments: dict[str, Any]) -> Tensor:
        return side_by_side(features, self.pools) if self.pools > 1 else features

    def project(self, rows: Tensor) -> Tensor:
        if self.pools == 1:
            return self.projector(rows)
        return through(self.projector, rows, self.pools, (self.side // self.pools) ** 2)
