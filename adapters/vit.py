# SPDX-License-Identifier: Apache-2.0
"""Vision transformers without a language model: timm and open_clip. They take one encoder stage."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..runtime.adapter import Block, Encoder, Record


class PlainEncoder(Encoder):
    """A vision transformer by itself."""

    bias_argument: ClassVar[str | None] = "attn_mask"

    @property
    def base(self) -> Any:
        return self.tower

    @property
    def tower(self) -> Any:
        return self.model

    @property
    def attention(self) -> str | None:
        return "sdpa"


class TimmAdapter(PlainEncoder):
    family: ClassVar[str] = "timm vision transformers (with the attention of vit_*, deit_*)"

    @classmethod
    def matches(cls, model: Any) -> bool:
        first = next(iter(getattr(model, "blocks", ())), None)
        parts = ("norm1", "attn", "norm2", "mlp")
        if first is None or not all(hasattr(first, p) for p in parts) or not hasattr(model, "num_prefix_tokens"):
            return False
        if not hasattr(first.attn, "qkv") or getattr(model, "rope", None) is not None or model.num_prefix_tokens > 1:
            raise NotImplementedError(
                f"{type(model).__name__} has rotary positions, separate projections or {model.num_prefix_tokens} prefix "
                f"tokens; supported: fused qkv, absolute positions, at most a CLS token (vit_base_patch16_224 and its like)"
            )
        return True

    @property
    def blocks(self) -> list[Block]:
        return [
            Block(block, block.norm1, at := block.attn, block.norm2, block.mlp, at.num_heads, at.scale, qkv=at.qkv)
            for block in self.model.blocks
        ]

    @property
    def prefix(self) -> int:
        return int(self.model.num_prefix_tokens)


@dataclass(frozen=True)
class OpenClipBlock(Block):
    """torch's MultiheadAttention keeps its projections to itself: keys are computed again from its input."""

    def tap(self, record: Record) -> list[RemovableHandle]:
        return [self.attention.register_forward_pre_hook(functools.partial(self._inputs, record))]

    def _inputs(self, record: Record, module: Any, args: tuple) -> None:
        hidden: Tensor = args[0]
        bias = module.in_proj_bias.chunk(3)[1] if module.in_proj_bias is not None else None
        keys = F.linear(hidden, module.in_proj_weight.chunk(3)[1], bias)
        record("k", keys.unflatten(-1, (self.heads, -1)))


class OpenClipAdapter(PlainEncoder):
    family: ClassVar[str] = "open_clip image towers (VisionTransformer, or a CLIP that has one)"

    @property
    def tower(self) -> Any:
        return getattr(self.model, "visual", self.model)

    @classmethod
    def matches(cls, model: Any) -> bool:
        tower = getattr(model, "visual", model)
        first = next(iter(getattr(getattr(tower, "transformer", None), "resblocks", ())), None)
        if first is None or not hasattr(tower, "class_embedding"):
            return False
        if not hasattr(first.attn, "in_proj_weight") or not first.attn.batch_first:
            raise NotImplementedError(
                f"{type(tower).__name__} with blocks of type {type(first).__name__}: only the plain ResidualAttentionBlock "
                f"with batch_first attention is supported"
            )
        return True

    @property
    def blocks(self) -> list[Block]:
        return [
            OpenClipBlock(block, block.ln_1, at := block.attn, block.ln_2, block.mlp, at.num_heads, at.head_dim**-0.5)
            for block in self.tower.transformer.resblocks
        ]

    @property
    def prefix(self) -> int:
        return 1

    def bias(self, bias: Tensor, block: Block) -> Tensor:
        """MultiheadAttention wants one matrix per head."""
        n, _, _, tokens = bias.shape
        return bias.expand(n, block.heads, tokens, tokens).flatten(0, 1)


ENCODERS: tuple[type[TimmAdapter] | type[OpenClipAdapter], ...] = (TimmAdapter, OpenClipAdapter)
