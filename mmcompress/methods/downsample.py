# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import register
from ..stage import PixelStage


@register("downsample")
@dataclass(frozen=True, repr=False)
class Downsample(PixelStage):
    """Shrink every picture (tile, frame) before the vision encoder to the share `keep` of its tokens: the baseline that any
    published method has to beat, since it saves the encoder's time too.

    Fixed-size encoders get a smaller picture with interpolated position embeddings, native-resolution encoders (Qwen-VL) just
    a smaller picture. The new grid is the one nearest to the wanted number of tokens; where it has one too many or too few, the
    last token is dropped or shown twice, so that the budget is exact. `keep` is a ratio. Cost: less than nothing.
    """

    keep: float = 0.25

    def __post_init__(self) -> None:
        if not isinstance(self.keep, float) or not 0.0 < self.keep <= 1.0:
            raise ValueError(f"keep={self.keep!r}: downsample takes the ratio of tokens to keep, a float in (0, 1]")

    paper: ClassVar[str] = "baseline"

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        wanted, shrink = self.keep * rows * columns, self.keep**0.5
        near = [(r, c) for r in _around(rows * shrink, rows) for c in _around(columns * shrink, columns)]
        return min(near, key=lambda g: (abs(g[0] * g[1] - wanted), abs(g[0] / g[1] - rows / columns), g))


def _around(size: float, most: int) -> range:
    return range(max(1, int(size)), min(most, int(size) + 1) + 1)
