# SPDX-License-Identifier: Apache-2.0
"""Merging inside the vision encoder behind a full-length facade.

Between two blocks the outside world (recorded hidden states, projector, placeholder counts) sees all tokens: after a
block every token shows its cluster (a gather), before the next block one representative per cluster is taken again
(exact). Inside a block the merge sits between attention and MLP, where the paper puts it: the norm before the MLP gets
the merged tokens, the MLP runs on them, and the residual stream, which is the tensor that the norm was given, is
overwritten with the merged tokens at full length of the block.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..ops import merge_mean, proportional_bias
from ..selection import gather
from ..stage import EncoderStage
from .adapter import Adapter


@dataclass
class _State:
    """Tokens as one block sees them. source [n, T0]: token of the block for each token of the tower; representative
    [n, T]: a tower token for each token of the block; size [n, T]: patches in it. None before the first merge."""

    source: Tensor | None = None
    representative: Tensor | None = None
    size: Tensor | None = None


class EncoderFacade:
    """Runs one EncoderStage in the tower of a model."""

    def __init__(self, adapter: Adapter, stage: EncoderStage) -> None:
        self.adapter, self.stage = adapter, stage
        self.active_blocks = max(adapter.feature_blocks) + 1
        attention = getattr(adapter.tower.config, "_attn_implementation", None)
        if stage.proportional and attention not in ("sdpa", "eager"):
            raise NotImplementedError(
                f"{stage!r}: proportional attention adds a bias per key, which {attention} cannot take: use "
                f"attn_implementation='sdpa' for the vision tower, or {stage.name}(..., proportional=False)"
            )
        self._begin()

    def install(self) -> list[RemovableHandle]:
        handles = [self.adapter.tower.register_forward_pre_hook(self._begin)]
        for i, block in enumerate(self.adapter.blocks):
            bind = functools.partial
            handles += [
                block.module.register_forward_pre_hook(bind(self._block_pre, i), with_kwargs=True),
                # before transformers' own recording hooks, which are put on the same modules later
                block.module.register_forward_hook(bind(self._block_post, i), prepend=True),
                block.attention.k_proj.register_forward_hook(bind(self._keys_post, i)),
                block.norm.register_forward_pre_hook(bind(self._norm_pre, i)),
                block.mlp.register_forward_hook(bind(self._mlp_post, i)),
            ]
        return handles

    # ------------------------------------------------------------------ what the runtime asks
    def source(self, block: int) -> Tensor | None:
        """[n, T0]: which token of `block` each token of the tower is in, None for itself."""
        return self.states[block].source

    def clusters(self) -> Tensor | None:
        """[n, N]: cluster of every patch at the end, None if nothing was merged."""
        source = self.states[-1].source
        return None if source is None else source[:, self.adapter.prefix :]

    def left(self, patches: int) -> int:
        """How many tokens are left of `patches` patches."""
        return self.stage.budget(patches, self.active_blocks, self.adapter.prefix)

    # ------------------------------------------------------------------ hooks
    def _begin(self, *_: Any) -> None:
        blocks = len(self.adapter.blocks)
        self.states = [_State() for _ in range(blocks + 1)]
        """What enters each block, and what comes out of the last one."""
        self.merges: list[tuple[Tensor, int] | None] = [None] * blocks
        self.keys: Tensor | None = None
        self.schedule: list[int] | None = None

    def _block_pre(self, i: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        hidden = args[0]
        if self.schedule is None:
            planned = self.stage.schedule(
                hidden.shape[1] - self.adapter.prefix, self.active_blocks, self.adapter.prefix
            )
            self.schedule = planned + [0] * (len(self.states) - 1 - self.active_blocks)
        state = self.states[i]
        if state.representative is None or state.size is None:
            return None
        hidden = gather(hidden, state.representative)
        if not self.stage.proportional:
            return (hidden, *args[1:]), kwargs
        bias = proportional_bias(state.size, hidden.dtype)
        if len(args) > 1:
            return (hidden, bias, *args[2:]), kwargs
        return (hidden,), {**kwargs, "attention_mask": bias}

    def _keys_post(self, i: int, module: Any, args: tuple, output: Tensor) -> None:
        if self.schedule and self.schedule[i] and self.merges[i] is None:
            self.keys = output.detach()

    def _norm_pre(self, i: int, module: Any, args: tuple) -> tuple | None:
        if not self.schedule or not self.schedule[i]:
            return None
        hidden = args[0]
        state = self.states[i]
        size = state.size if state.size is not None else torch.ones(hidden.shape[:2], device=hidden.device)
        if self.merges[i] is None:  # decided once, applied again when gradient checkpointing replays the block
            assert self.keys is not None
            heads = self.adapter.blocks[i].attention.num_heads
            keys = self.keys.unflatten(-1, (heads, -1)).mean(2)
            self.keys = None
            self.merges[i] = self.stage.match(keys, self.schedule[i], self.adapter.prefix)
            target, count = self.merges[i]  # type: ignore[misc]
            self.states[i + 1] = self._merged_state(state, size, target, count)
        target, count = self.merges[i]  # type: ignore[misc]
        merged, _ = merge_mean(hidden, size, target, count)
        hidden.copy_(gather(merged, target))
        return (merged,)

    def _mlp_post(self, i: int, module: Any, args: tuple, output: Tensor) -> Tensor | None:
        merge = self.merges[i]
        return None if merge is None else gather(output, merge[0])

    def _block_post(self, i: int, module: Any, args: tuple, output: Any) -> Any:
        state = self.states[i]
        if self.merges[i] is None:
            self.states[i + 1] = state
        if state.source is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = gather(hidden, state.source)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    @staticmethod
    def _merged_state(state: _State, size: Tensor, target: Tensor, count: int) -> _State:
        source = target if state.source is None else target.gather(1, state.source)
        tokens = source.shape[1]
        place = torch.arange(tokens, device=source.device).expand_as(source)
        first = torch.full((source.shape[0], count), tokens, device=source.device)
        first = first.scatter_reduce(1, source, place, "amin")
        return _State(source, first, size.new_zeros(size.shape[0], count).scatter_add(1, target, size))
