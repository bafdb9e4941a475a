# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..ops.pivots import least_similar
from ..plan import register
from ..selection import Selection, gather
from ..stage import LayerStage, Need
from ..visuals import Visuals


@register("dart")
@dataclass(frozen=True, repr=False)
class DART(LayerStage):
    """Before LLM layer `layer`, keep a few pivots and the visual tokens that are least like them: what is not said already.

    Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", EMNLP 2025, arXiv
    2502.11494. Pivots are the `image_pivots` visual tokens and the `text_pivots` tokens of the instruction with the largest
    L1 norm of their keys in the layer before the cut (after rotation, all KV heads together). Image pivots stay. Then each
    pivot in turn, those of the image first, both by falling norm, takes those of the tokens left whose hidden states, behind
    the model's final norm, have the lowest cosine to its own. All images of a sample are one pool; output keeps its order and
    its positions. No attention is read. Cost (pivots) N D.

    Departs from the reference in the budget, which is exact here: what the image pivots leave of k is shared out evenly, the
    first pivots take one more (there every pivot takes floor(B / 8), and the image pivots come on top, so that 64 are 68; for
    its numbers give keep=68). The order of the pivots is defined here (there it is that of a Python set), and where the
    question stands before the picture, it is its text that counts. Fewer text tokens than `text_pivots`: all of them are
    pivots. A k below `image_pivots`: the first k pivots stay.
    """

    layer: int | float = 2
    keep: float | int = 0.25
    image_pivots: int = 4
    text_pivots: int = 4
    paper: ClassVar[str] = "arXiv 2502.11494"
    needs: ClassVar[tuple[Need, ...]] = ("key_norms", "text_key_norms", "final_states", "text_final_states")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("image_pivots", 1), ("text_pivots", 0)):
            count = getattr(self, name)
            if type(count) is not int or count < least:
                raise ValueError(f"{name}={count!r}: give a number of tokens, at least {least} (the paper: 4)")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        image, text = self.pivots(visuals)
        tokens = visuals["final_states"]
        pivots = torch.cat([gather(tokens, image), gather(visuals["text_final_states"], text)], 1)
        counts = self.counts(visuals.k, image.shape[1], pivots.shape[1])
        return Selection.of(torch.cat([image, least_similar(tokens, pivots, image, counts)], 1))

    def pivots(self, visuals: Visuals) -> tuple[Tensor, Tensor]:
        """Visual tokens [U, P] and tokens of the instruction [U, Q] that are pivots, each by falling norm."""
        image, text = (
            visuals[name].float().sort(dim=1, descending=True, stable=True).indices[:, :count]
            for name, count in (("key_norms", min(self.image_pivots, visuals.k)), ("text_key_norms", self.text_pivots))
        )
        return image, text

    @staticmethod
    def counts(k: int, kept: int, pivots: int) -> list[int]:
        """How many tokens each of the pivots takes, so that together with the `kept` ones they are `k`."""
        each, more = divmod(k - kept, pivots)
        return [each + (i < more) for i in range(pivots)]
