# SPDX-License-Identifier: Apache-2.0
"""The Pixtral tower: pictures of any size packed into one row, 2-D rotary positions (Pixtral, Mistral 3, LightOnOCR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..runtime.adapter import Adapter, body_of
from ..runtime.refusal import refusal
from .raster import RasterAdapter

TOWER, PROJECTOR = ("vision_tower", "vision_encoder"), ("multi_modal_projector", "vision_projection")


class PixtralAdapter(RasterAdapter):
    """A picture is a run of placeholders for each row of tokens, with a token behind it that ends the row or the picture."""

    family: ClassVar[str] = "models with a Pixtral vision tower (llava, mistral3, mistral_large4, lighton_ocr)"
    packed: ClassVar[bool] = True
    opened: ClassVar[bool] = False

    @classmethod
    def matches(cls, model: Any) -> bool:
        if refusal(model) is not None:
            return False
        tower = _child(body_of(model), TOWER)
        return all(hasattr(tower, name) for name in ("patch_conv", "transformer", "patch_positional_embedding"))

    @property
    def delimited(self) -> bool:  # type: ignore[override]
        return not hasattr(self.base, "vision_encoder")  # LightOnOCR has no tokens between rows

    @property
    def tower(self) -> Any:
        return _child(self.base, TOWER)

    @property
    def projector(self) -> nn.Module:
        return _child(self.base, PROJECTOR)

    @property
    def side(self) -> int:
        return int(getattr(self.config, "spatial_merge_size", 1))

    @property
    def feature_blocks(self) -> list[int]:
        if not hasattr(self.config, "vision_feature_layer"):
            return super().feature_blocks
        return Adapter.feature_blocks.fget(self)  # type: ignore[attr-defined]

    def check_encoder_call(self, arguments: dict[str, Any]) -> None:
        super().check_encoder_call(arguments)
        if arguments.get("image_sizes") is None:
            raise ValueError(
                "pictures without their sizes in pixels: pass image_sizes, [pictures, 2], as the processor makes them"
            )

    def shapes(self, arguments: dict[str, Any]) -> list[tuple[int, int]]:
        patch, sizes = self.tower.config.patch_size, arguments["image_sizes"]
        return [(int(height) // patch, int(width) // patch) for height, width in sizes]

    def features(self, output: Any, arguments: dict[str, Any]) -> Sequence[Tensor]:
        return output.pooler_output

    def project(self, rows: Tensor) -> Tensor:
        patches = rows.unflatten(-1, (self.unit, -1)).flatten(0, 2)
        if self.side == 1:
            return self.projector(patches).unflatten(0, rows.shape[:2])
        size, patch = self.side, self.tower.config.patch_size  # tokens one below the other are a picture, too
        tall = len(patches) // size
        return self.projector(patches, [(tall * patch, size * patch)]).unflatten(0, rows.shape[:2])


def _child(base: Any, names: Sequence[str]) -> Any:
    return next((getattr(base, name) for name in names if hasattr(base, name)), None)
