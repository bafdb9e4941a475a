# SPDX-License-Identifier: Apache-2.0
"""Compression of a vision transformer without a language model: one encoder stage behind its facade."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.hooks import RemovableHandle

from ..stage import Pipeline
from .adapter import Encoder
from .encoder import EncoderFacade
from .hooks import Following


class TowerEngine(Following):
    """Merges tokens in one vision encoder, from `install` to `remove`.

    last  of the last call: tokens of a row, and how many of them each block has merged away.
    """

    kept = (*Following.kept, "last")
    last: tuple[int, list[int]] | None = None

    def __init__(self, encoder: Encoder, plan: Pipeline) -> None:
        super().__init__()
        if len(plan.parts) != 1 or not plan.encoder_stages:
            raise ValueError(
                f"{plan!r}: a vision model without language model takes exactly one stage that acts inside the encoder (tome)"
            )
        self.plan = plan
        self.find(encoder)

    def find(self, adapter: Encoder) -> None:
        self.adapter, self.facade = adapter, EncoderFacade(self, adapter, self.plan.encoder_stages[0])

    def doors(self) -> Iterator[RemovableHandle]:
        yield self.adapter.tower.register_forward_pre_hook(self._begin, with_kwargs=True)

    def hooks(self) -> Iterator[RemovableHandle]:
        yield self.adapter.tower.register_forward_hook(self._end)  # before that of the facade, which closes the call
        yield from self.facade.inside()

    def _begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.whole:
            self.follow()
            self.facade.start(module, args, kwargs)

    def _end(self, module: Any, args: tuple, output: Any) -> None:
        self.last = self.facade.run().lengths[0], self.facade.merged
