# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass

from ..stage import InputStage, Need


@dataclass(frozen=True, repr=False)
class Hosted(InputStage):
    """What methods share that change or complete another one, their `host`: a plan string without `keep`, whose signals are asked
    for."""

    host: str = "divprune"
    keep: float | int = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        host = self.stage()
        if host.keep != type(host).keep:
            raise ValueError(f"host={self.host!r}: give keep to {self.name}, not to its host")

    def stage(self) -> InputStage:
        """The host; raises ValueError if it cannot be one."""
        raise NotImplementedError

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return self.stage().needs

    @property
    def clip(self) -> str | None:
        return getattr(self.stage(), "clip", None)

    @property
    def tokenizer(self) -> str | None:
        return getattr(self.stage(), "tokenizer", None)
