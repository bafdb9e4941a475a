# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ..plan import register
from ..selection import Selection
from ..stage import Need
from ..visuals import Visuals
from .pyramid import Pyramid


@register("transprune")
@dataclass(frozen=True, repr=False)
class TransPrune(Pyramid):
    """In the middle of the LLM, keep the visual tokens that its layers change most and that the instruction attends to most.

    Li et al., "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", CVPR 2026, arXiv 2507.20630.
    Attention and MLP of a layer each change a token: by the ratio of output to input length, times the token's share in the
    sum of exp(1 - cosine) over all tokens, text included. T sums this up from layer `start` on (a number, or a part of the
    depth; before the first cut), or over the layers of the tuple `start`: (3, 4, 5, 6, 9, 10) leaves out those between.
    a is the attention of the instruction in the layer behind the cut, mean over heads and
    words. The score is T / sum T + a / sum a. Cuts come before 7/32, 9/32 and 12/32 of the depth and leave 7/8, 5/8 and 1/8
    (the paper's "High", a mean of 236 of 576 tokens over 32 layers); the ratios of its "Low" are not public, (0.5, 0.25,
    0.06) has the same cost. Positions are numbered anew. `keep`, `layers` and `ratios`: see `Pyramid`. Cost: two norms and
    a cosine per token and module, and heads * T * S * d for each cut.

    As in the code, T and a are scaled to sum 1 before they are added, and cosines have a sign; the paper adds raw values,
    and takes |cosine|, which is `absolute=True`. The instruction is the text after the last image.
    """

    start: int | float | tuple[int, ...] = 6 / 32
    absolute: bool = False
    paper: ClassVar[str] = "arXiv 2507.20630"
    positions: ClassVar[str] = "reindex"
    published_layers: ClassVar[tuple[float, ...]] = (7 / 32, 9 / 32, 12 / 32)
    published_ratios: ClassVar[tuple[float, ...]] = (0.875, 0.625, 0.125)

    def __post_init__(self) -> None:
        super().__post_init__()
        listed = isinstance(self.start, tuple)
        layers = self.start if isinstance(self.start, tuple) else (self.start,)
        whole = all(type(layer) is int and layer >= 0 for layer in layers)
        rising = bool(layers) and all(a < b for a, b in pairwise(layers))
        if not (whole and rising) and (listed or not (type(self.start) is float and 0.0 <= self.start < 1.0)):
            raise ValueError(
                f"start={self.start!r}: give the number of an LLM layer, an int of at least 0, or its place as a part of the "
                f"depth, a float in [0, 1), or a tuple of layer numbers in ascending order"
            )
        if type(self.absolute) is not bool:
            raise ValueError(f"absolute={self.absolute!r}: choose False (the code) or True (the paper's formula)")

    @property
    def changes(self) -> str:
        """Name of the signal T."""
        if isinstance(self.start, tuple):
            where = "+".join(map(str, self.start)) + "+"
        else:
            where = f"{self.start:.9f}" if isinstance(self.start, float) else str(self.start)
        return f"{'absolute_' if self.absolute else ''}transitions@{where}"

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (self.changes, "text_attention@next")

    def cuts(self, depth: int) -> tuple[int, ...]:
        found = super().cuts(depth)
        if isinstance(self.start, tuple):
            if self.start[0] >= found[0] or self.start[-1] >= depth:
                raise ValueError(
                    f"{self!r}: changes are summed up in layers {self.start} of {depth}, and the first cut comes before layer "
                    f"{found[0]}: name a layer before it, and none that is not there"
                )
            return found
        start = self.start if isinstance(self.start, int) else round(self.start * depth)
        if start > found[0] or start == found[0] == self.start:
            raise ValueError(
                f"{self!r}: changes are summed up from layer {start} of {depth} on, but the first cut comes before layer "
                f"{found[0]}: start earlier or cut later"
            )
        return found

    def select(self, visuals: Visuals) -> Selection:
        changed, attended = visuals[self.changes].float(), visuals["text_attention@next"].float()
        attended = attended.sum(1) / max(1, attended.shape[1])
        return Selection.top(_to_one(changed) + _to_one(attended), visuals.k)


def _to_one(x: Tensor) -> Tensor:
    """x [U, N] over its sum in each row."""
    return x / (x.sum(1, keepdim=True) + 1e-8)
