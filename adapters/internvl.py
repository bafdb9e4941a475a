# SPDX-License-Identifier: Apache-2.0
"""InternVL (HF-native) and what is built like it: tiles with the thumbnail last, several patches to one token by pixel shuffle."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from ..runtime.adapter import Encoded, Run, config_of
from ..runtime.packing import Array
from .square import SquareAdapter
from .tiles import Picture, arrangement, join


class InternVLAdapter(SquareAdapter):
    """The model is given a row of tiles. Which of them make one picture is read from the prompt (a run of placeholders is
    one picture), and how they lie is found by comparing them with the thumbnail. A video is a row of pictures to it."""

    family: ClassVar[str] = "InternVL (internvl) and others with a downsample_ratio (qianfan_ocr)"
    delimited: ClassVar[bool] = True

    @classmethod
    def matches(cls, model: Any) -> bool:
        return hasattr(config_of(model), "downsample_ratio") and super().matches(model)

    @property
    def factor(self) -> int:
        return round(1 / self.config.downsample_ratio)

    def assemble(self, encoded: Encoded, runs: list[Run]) -> None:
        if encoded.pixels is None:
            return
        tokens = encoded.layouts[0].cells
        lengths = [run.length for run in runs]
        if any(length % tokens or length == 2 * tokens for length in lengths) or sum(lengths) != tokens * len(
            encoded.layouts
        ):
            raise ValueError(
                f"the prompt has runs of {', '.join(map(str, lengths))} image placeholders, but there are {len(encoded.layouts)} "
                f"tiles of {tokens} tokens: a picture is one run between its start and end token"
            )
        tiles = [length // tokens for length in lengths]
        parts = np.split(encoded.pixels.cpu().numpy(), np.cumsum(tiles)[:-1])
        join(encoded, [Picture(n, *_lie(part)) for n, part in zip(tiles, parts, strict=True)])


def _lie(views: Array) -> tuple[int, int]:
    """Rows and columns of the tiles of one picture, its view as a whole last."""
    return arrangement(views[:-1], views[-1])[:2] if len(views) > 1 else (1, 1)
