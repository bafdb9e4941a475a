# SPDX-License-Identifier: Apache-2.0
"""SigLIP 2 NaFlex towers: patches of pictures of any size in rows filled up with padding (LFM2-VL)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..runtime.adapter import body_of
from ..runtime.refusal import refusal
from .raster import RasterAdapter


class NaFlexAdapter(RasterAdapter):
    """Pixel unshuffle joins neighbouring patches in the projector; large pictures come as tiles and a view of the whole."""

    family: ClassVar[str] = "models with a SigLIP 2 NaFlex tower and pixel unshuffle (lfm2_vl)"
    padded: ClassVar[bool] = True
    delimited: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        if refusal(model) is not None or not hasattr(model.config, "downsample_factor"):
            return False
        return "spatial_shapes" in inspect.signature(body_of(model).get_image_features).parameters

    @property
    def side(self) -> int:
        return int(self.config.downsample_factor)

    def shapes(self, arguments: dict[str, Any]) -> list[tuple[int, int]]:
        return [(int(rows), int(columns)) for rows, columns in arguments["spatial_shapes"].tolist()]

    def shown(self, arguments: dict[str, Any]) -> Iterable[Tensor]:
        side = self.tower.config.patch_size
        for row, (h, w) in zip(arguments["pixel_values"], self.shapes(arguments), strict=True):
            yield row[: h * w].view(h, w, side, side, -1).permute(4, 0, 2, 1, 3).reshape(-1, h * side, w * side)

    def tap_features(self, record: Callable[[Tensor], None]) -> RemovableHandle:
        # some releases of transformers give the projector one picture after the other
        return self.tower.register_forward_hook(functools.partial(_last_state, record))

    def project(self, rows: Tensor) -> Tensor:
        patches = rows.unflatten(-1, (self.side, self.side, -1)).flatten(0, 2)  # one token below the other
        return self.projector(patches[None]).flatten(0, -2).unflatten(0, rows.shape[:2])


def _last_state(record: Callable[[Tensor], None], module: Any, args: tuple, output: Any) -> None:
    record(output.last_hidden_state)
