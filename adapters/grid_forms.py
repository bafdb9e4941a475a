# SPDX-License-Identifier: Apache-2.0
"""Further forms of vision encoders that take packed grids: tokens made of several frames, of as many patches as each picture says,
and class tokens among the patches."""

from __future__ import annotations

import functools
import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..runtime.adapter import Encoded
from ..stage import Stage
from .grids import GridAdapter


class PooledAdapter(GridAdapter):
    """Tokens of a video are made of several frames."""

    joined: ClassVar[bool] = True  # type: ignore[assignment]

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        units = (self._grids(arguments).prod(-1) // self.unit).tolist()
        if sum(units) == sum(layout.cells for layout in encoded.layouts) or len(rows) != sum(units):
            return super().arrange(encoded, arguments, rows, nearest)
        if nearest:
            raise NotImplementedError(
                f"{type(self.model).__name__} makes each token of a video of several frames, and patches of each are merged by "
                f"themselves: give the stage inside the encoder on='image', or choose one behind it"
            )
        parts = zip(rows.split(units), encoded.layouts, strict=True)
        return [
            part.unflatten(0, (len(layout.views), -1, layout.views[0].cells)).mean(1).flatten(0, 1)
            for part, layout in parts
        ]


class KimiAdapter(PooledAdapter):
    """The tower takes the mean over all frames, and gives the patches of a token apart."""

    family: ClassVar[str] = "Kimi K2.5 (kimi_k25)"

    @classmethod
    def fits(cls, plain: GridAdapter) -> bool:
        return hasattr(plain.tower, "temporal_merge")

    def feature_rows(self, features: Tensor, arguments: dict[str, Any]) -> Tensor:
        return features.flatten(1)

    def project(self, rows: Tensor) -> Tensor:
        tokens = self.projector(rows.unflatten(-1, (self.unit, -1)).flatten(0, 1))
        return tokens.flatten(0, 1).unflatten(0, rows.shape[:2])


class ErnieAdapter(PooledAdapter):
    """A resampler makes tokens of pairs of frames; a picture is a pair by itself."""

    family: ClassVar[str] = "ERNIE 4.5 VL (ernie4_5_vl_moe)"

    @classmethod
    def fits(cls, plain: GridAdapter) -> bool:
        return hasattr(plain.projector, "temporal_linear")

    @functools.cached_property
    def road(self) -> list[nn.Module]:
        resampler: Any = GridAdapter(self.model).projector
        return [resampler.temporal_linear, resampler.mlp, resampler.after_norm]


class SizedAdapter(GridAdapter):
    """Each picture says how many patches make a token, which is their mean."""

    family: ClassVar[str] = "VideoLLaMA 3 (video_llama_3)"
    unit: ClassVar[int] = 1  # type: ignore[misc]
    grouped: ClassVar[bool] = True  # type: ignore[misc]

    @classmethod
    def fits(cls, plain: GridAdapter) -> bool:
        return "merge_sizes" in inspect.signature(plain.tower.forward).parameters

    def sides(self, arguments: dict[str, Any]) -> list[int]:
        names = ("merge_sizes", "image_merge_sizes", "video_merge_sizes")
        return next(sizes for name in names if (sizes := arguments.get(name)) is not None).tolist()

    def unit_in(self, arguments: dict[str, Any]) -> int:
        sides = set(self.sides(arguments))
        if len(sides) > 1:
            raise NotImplementedError(
                f"pictures of merge sizes {', '.join(map(str, sorted(sides)))} in one call: signals and stages of the vision "
                f"encoder need one for all pictures, and one for all videos"
            )
        return sides.pop() ** 2


class ClassTokenAdapter(GridAdapter):
    """In front of the patches of each picture stands a class token; grids are told in LLM tokens."""

    family: ClassVar[str] = "Inkling 2 (inkling2, inkling2_loop)"
    grouped: ClassVar[bool] = True  # type: ignore[misc]
    joined: ClassVar[bool] = True  # type: ignore[misc]

    @classmethod
    def fits(cls, plain: GridAdapter) -> bool:
        return hasattr(getattr(plain.tower, "embeddings", None), "class_embedding")

    def check_stage(self, stage: Stage) -> None:
        super().check_stage(stage)
        raise NotImplementedError(
            f"{stage!r}: pictures are packed into one row with a class token in front of each, and merging among those is not "
            f"supported: choose a stage behind the vision encoder"
        )

    @property
    def signals(self) -> frozenset[str]:
        # what patches give each other would count class tokens as patches
        return frozenset({"received_attention", "keys", "joint_keys", "encoder_features"})

    def _grids(self, arguments: dict[str, Any]) -> Tensor:  # type: ignore[override]
        return super()._grids(arguments).cpu() * torch.tensor([1, self.side, self.side])

    def order(self, patches: int, arguments: dict[str, Any]) -> Tensor:
        places, first = [], 0
        for length in self._grids(arguments).prod(-1).tolist():
            places.append(torch.arange(first + 1, first := first + 1 + length))
        return torch.cat(places)
