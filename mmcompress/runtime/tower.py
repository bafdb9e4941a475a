# SPDX-License-Identifier: Apache-2.0
"""Compression of a vision transformer without a language model: one encoder stage behind its facade."""

from __future__ import annotations

from torch.utils.hooks import RemovableHandle

from ..stage import Pipeline
from .adapter import Encoder
from .encoder import EncoderFacade


class TowerEngine:
    """Merges tokens in one vision encoder, from `install` to `remove`."""

    def __init__(self, encoder: Encoder, plan: Pipeline) -> None:
        if len(plan.parts) != 1 or not plan.encoder_stages:
            raise ValueError(
                f"{plan!r}: a vision model without language model takes exactly one stage that acts inside the encoder (tome)"
            )
        self.encoder, self.plan = encoder, plan
        self.facade = EncoderFacade(encoder, plan.encoder_stages[0])
        self.handles: list[RemovableHandle] = []

    def install(self) -> None:
        self.handles = self.facade.install()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []
