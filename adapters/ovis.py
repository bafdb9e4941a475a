# SPDX-License-Identifier: Apache-2.0
"""Ovis 2: patches become words of a visual vocabulary, whose embeddings enter the language model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from ..runtime.adapter import body_of
from .square import SquareAdapter


class Ovis2Adapter(SquareAdapter):
    """The tower ends in a distribution over the words for `hidden_stride` x `hidden_stride` patches side by side."""

    family: ClassVar[str] = "Ovis 2 (ovis2)"

    @classmethod
    def matches(cls, model: Any) -> bool:
        return hasattr(body_of(model), "visual_embeddings_table")

    @property
    def projector(self) -> Any:
        return self.tower.head_linear

    @property
    def factor(self) -> int:
        return int(self.tower.config.hidden_stride)

    @property
    def alone(self) -> bool:
        return self.tower.config.tokenize_function == "softmax"

    @property
    def lacks(self) -> str:
        return (
            ""
            if self.alone
            else f"its words are chosen by {self.tower.config.tokenize_function}, no mean of embeddings"
        )

    def project(self, rows: Tensor) -> Tensor:
        words = self.tower.head_norm(self.projector(rows)).softmax(-1)
        return self.base.visual_embeddings_table(F.pad(words, (0, self.tower.num_visual_indicator_tokens)))
