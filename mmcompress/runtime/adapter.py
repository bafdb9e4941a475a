# SPDX-License-Identifier: Apache-2.0
"""Adapter: where things are in one model family. Facts only; no algorithm, no forward pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..visuals import Layout


@dataclass(frozen=True)
class Block:
    """The parts of one vision encoder block: attention (with `q_proj` and `k_proj`), the norm before the MLP, the MLP."""

    module: nn.Module
    attention: Any
    norm: nn.Module
    mlp: nn.Module


class Adapter:
    """What the runtime asks about a model. One subclass per family, in `mmcompress.adapters`."""

    family: ClassVar[str] = ""
    reindexes: ClassVar[bool] = True
    """Whether position ids are a plain count, so that they can be numbered anew (M-RoPE families: no)."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.base: Any = getattr(model, model.base_model_prefix)
        self.language_model: Any = self.base.language_model

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Whether this adapter knows where things are in `model`."""
        raise NotImplementedError

    @property
    def placeholders(self) -> dict[str, int]:
        """Token id that stands for one visual token in `input_ids`, by modality ("image", "video")."""
        raise NotImplementedError

    @property
    def encoders(self) -> dict[str, str]:
        """Methods of the base model that encode pixels, with the modality that each one encodes."""
        raise NotImplementedError

    @property
    def tower(self) -> nn.Module:
        raise NotImplementedError

    @property
    def blocks(self) -> list[Block]:
        raise NotImplementedError

    @property
    def feature_blocks(self) -> list[int]:
        """Indices of the blocks whose outputs become the LLM's tokens."""
        raise NotImplementedError

    @property
    def prefix(self) -> int:
        """How many tokens of the encoder come before the patches (1 with a CLS token)."""
        raise NotImplementedError

    @property
    def projector(self) -> nn.Module:
        """The module that receives the encoder features of the patches."""
        raise NotImplementedError

    def check_encoder_call(self, arguments: dict[str, Any]) -> None:
        """Raise if a call of an encoder method asks for something that would make layout or signals wrong."""

    def layouts(self, lengths: Iterable[int]) -> list[Layout]:
        """The layout of each visual of one encoder call, given how many tokens each one got."""
        raise NotImplementedError

    def project(self, rows: Tensor) -> Tensor:
        """Encoder features [U, m, De] as LLM tokens [U, m, D]."""
        raise NotImplementedError

    @property
    def signals(self) -> frozenset[str]:
        """Names of the vision signals that this model can give."""
        raise NotImplementedError
