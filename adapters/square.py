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

from ..runtime.adapter import OF_CLS, OF_PATCHES, Adapter, Block, Encoded, Run, body_of
from ..stage import PixelStage, Stage
from ..visuals import Layout
from .common import refusal
from .tiles import join, pictures, small
from .towers import blocks_of, child

TOWERS = ("vision_tower", "vision_model", "image_tower")
PROJECTORS = ("multi_modal_projector", "aligner", "connector")
SQUARES = frozenset(
    {"pixel_values", "pixel_attention_mask", "vision_feature_layer", "vision_feature_select_strategy", "kwargs"}
)
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
        tower, projector = child(base, TOWERS), child(base, PROJECTORS)
        encode = getattr(base, "get_image_features", None)
        given = () if encode is None else inspect.signature(encode).parameters
        if (
            not given
            or tower is None
            or projector is None
            or not set(given) <= SQUARES
            or cls._embeddings(tower) is None
        ):
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

    @property
    def projector(self) -> Any:
        return child(self.base, PROJECTORS)

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
        side, factor = math.isqrt(patches), self.factor
        if factor == 1:
            return None
        grid = torch.arange(patches).view(side // factor, factor, side // factor, factor)
        return grid.permute(0, 2, 1, 3).flatten()

    @property
    def signals(self) -> frozenset[str]:
        found = OF_PATCHES | {"encoder_features"} | (OF_CLS if self.prefix else frozenset())
        # a CLS token cannot take a road on which patches are fused
        return found | {"cls_feature"} if self.prefix and self.unit == 1 else found

    @property
    def structural(self) -> int:
        """Tokens of a view that strategy "full" keeps before the patches: the CLS token, if the tower has one."""
        return self.prefix if getattr(self.config, "vision_feature_select_strategy", None) == "full" else 0

    def check_stage(self, stage: Stage) -> None:
        if isinstance(stage, PixelStage):
            takes = inspect.signature(self.tower.forward).parameters
            always = "bool_masked_pos" in takes
            if "interpolate_pos_encoding" not in takes and not always:
                raise NotImplementedError(
                    f"{stage!r}: {type(self.tower).__name__} takes pictures of one size only, no smaller ones"
                )

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
            join(encoded, pictures(encoded.pixels.cpu(), runs, encoded.layouts[0].tokens))

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        return list(rows)

    def feature_rows(self, features: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Where the projector fuses patches: those of a token side by side, [n, N, unit * De]."""
        if self.pools == 1:
            return features
        order = self.order(features.shape[1], arguments)
        assert order is not None
        return features[:, order.to(features.device)].unflatten(1, (-1, self.unit)).flatten(2)

    def project(self, rows: Tensor) -> Tensor:
        if self.pools == 1:
            return self.projector(rows)
        each = (self.side // self.pools) ** 2  # a projector that fuses patches takes whole views
        flat = rows.flatten(0, 1)
        views = torch.cat([flat, flat.new_zeros(-len(flat) % each, flat.shape[1])]).unflatten(0, (-1, each))
        patches, order = views.unflatten(2, (self.unit, -1)).flatten(1, 2), self.order(each * self.unit, {})
        assert order is not None
        made = self.projector(patches[:, order.argsort().to(rows.device)])
        return made.reshape(views.shape[0] * each, -1)[: len(flat)].unflatten(0, rows.shape[:2])
