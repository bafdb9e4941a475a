# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..budget import check_keep, exact_merge_schedule, merge_schedule, resolve
from ..ops import bipartite_match
from ..plan import register
from ..stage import EncoderStage


@register("tome")
@dataclass(frozen=True, repr=False)
class ToMe(EncoderStage):
    """In every block of the vision encoder, between attention and MLP, merge the token pairs with the most similar keys.

    Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461. Merged tokens are means weighted by
    the number of patches; `proportional` adds log(size) to the attention logits, as in the paper (by default wherever the
    attention takes a bias; that of the Qwen vision encoders does not). Give either `keep` (the exact number or ratio of
    patch tokens left, spread evenly over the blocks; 0.25 if neither is given) or `r` (tokens merged per block; with
    `inflect` falling or rising over the blocks; or one number per block). Where 2x2 patches make one LLM token, they are
    merged as a whole. The LLM gets one token per cluster, in the order of the clusters' median patches. Cost per block
    T^2 d / 4.

    Departs from the reference, which is made for classifiers: `keep` is exact, patches that make one LLM token go as a whole, and
    clusters become tokens of the LLM. Ties go to the lower index.
    """

    keep: float | int | None = None
    r: int | tuple[int, ...] | None = None
    inflect: float = 0.0
    proportional: bool | None = None
    paper: ClassVar[str] = "arXiv 2210.09461"

    def __post_init__(self) -> None:
        if self.keep is not None and self.r is not None:
            raise ValueError(f"keep={self.keep} and r={self.r}: give one of them")
        if self.keep is not None:
            check_keep(self.keep)

    def schedule(self, tokens: int, blocks: int, protected: int) -> list[int]:
        if self.r is None:
            keep = resolve(0.25 if self.keep is None else self.keep, tokens)
            return exact_merge_schedule(tokens, keep, blocks, protected)
        schedule: list[int] = []
        for r in merge_schedule(self.r, blocks, self.inflect):
            schedule.append(max(0, min(r, (tokens - sum(schedule)) // 2)))
        return schedule

    def match(self, keys: Tensor, r: int, protected: int) -> tuple[Tensor, int]:
        return bipartite_match(keys, r, protected)
