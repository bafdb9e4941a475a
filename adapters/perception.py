# SPDX-License-Identifier: Apache-2.0
"""Perception LM: the Perception Encoder of timm, mean of patches behind the projector, tiles behind the thumbnail."""

from __future__ import annotations

from typing import Any, ClassVar

from ..runtime.adapter import body_of
from ..runtime.refusal import refusal
from ..stage import Stage
from .square import SquareAdapter


class PerceptionAdapter(SquareAdapter):
    """Its tower rotates queries and keys by tables of patches, without CLS."""

    family: ClassVar[str] = "Perception LM (perception_lm)"
    delimited: ClassVar[bool] = False

    @classmethod
    def matches(cls, model: Any) -> bool:
        timm = getattr(getattr(body_of(model), "vision_tower", None), "timm_model", None)
        wanted = hasattr(getattr(model, "config", None), "projector_pooling_ratio")
        return wanted and hasattr(timm, "blocks") and refusal(model) is None

    @property
    def prefix(self) -> int:
        return int(self.tower.timm_model.num_prefix_tokens)

    @property
    def side(self) -> int:
        return int(self.tower.timm_model.patch_embed.grid_size[0])

    def check_stage(self, stage: Stage) -> None:
        raise NotImplementedError(
            f"{stage!r}: the encoder of {type(self.model).__name__} is given one table of rotations for all pictures, so none of "
            f"them can be shorter than others: choose a stage behind it"
        )
