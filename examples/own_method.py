# SPDX-License-Identifier: Apache-2.0
"""Write your own method: this file is all of it. `python examples/own_method.py` tries it on an embedded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F

import mmcompress as mm


@mm.register("contrast")
@dataclass(frozen=True, repr=False)
class Contrast(mm.InputStage):
    """Keep the tokens that are least like the token on their left: edges rather than surfaces.

    `shift` is how many tokens to the left. Cost N D. A batch of U visuals comes at once; `visuals.k` is the exact budget; the frame
    has seen to ratios, several images, tiles, padding, positions and caches, and checks what comes back.
    """

    keep: float | int = 0.25
    shift: int = 1
    paper: ClassVar[str] = "this file"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift < 1:
            raise ValueError(f"shift={self.shift}: at least 1")

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        features = visuals.features.float()  # [U, N, D]
        alike = F.cosine_similarity(features, features.roll(self.shift, 1), dim=-1)
        return mm.Selection.top(1 - alike, visuals.k)  # ties to the lower slot, output in order


def main() -> None:
    from mmcompress.assets import model_path
    from mmcompress.eval.synthetic import evaluate, items, prepare

    from mmcompress.demo import load

    model, processor = load(model_path("llava-shapes"))
    batches = prepare(processor, items(70))
    for plan in ("contrast(keep=0.25)", "random(keep=0.25)", "contrast(keep=0.5) >> fastv(layer=2, keep=0.5)"):
        with mm.compressed(model, plan):
            print(f"{plan:<45} {100 * evaluate(model, processor, batches).accuracy():.1f} % right")


if __name__ == "__main__":
    main()
