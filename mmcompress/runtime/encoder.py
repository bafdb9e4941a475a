# SPDX-License-Identifier: Apache-2.0
"""Merging inside the vision encoder behind a full-length facade.

Between two blocks the outside world (recorded hidden states, projector, placeholder counts) sees all tokens: after a
block every token shows its cluster (a gather), before the next block one representative per cluster is taken again
(exact). Inside a block the merge sits between attention and MLP, where the paper puts it: the norm before the MLP gets
the merged tokens, the MLP runs on them, and the residual stream, which is the tensor that the norm was given, is
overwritten with the merged tokens at full length of the block.

Where several patches make one LLM token (2x2 in Qwen-VL and InternVL), such a unit is merged as a whole, each corner with
the same corner. Indices here are those of units, the tokens before the patches (CLS) being units of one token; `_patches`
turns them into indices of patches. A packed tower is one row with segments that are matched each by itself.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..ops import merge_mean, proportional_bias
from ..selection import gather
from ..stage import EncoderStage
from .adapter import Adapter, Encoded, Encoder


@dataclass
class _State:
    """Tokens as one block sees them, in units. source [n, T0]: unit of the block for each unit of the tower;
    representative [n, T]: a unit of the tower for each unit of the block; size [n, T]: how many are in it. None before the
    first merge. lengths: units in each segment."""

    lengths: list[int]
    source: Tensor | None = None
    representative: Tensor | None = None
    size: Tensor | None = None


@dataclass
class _Merge:
    """target [n, T]: new unit of each unit of a block; patches: the same for patches, as they stand in the block; count:
    new units in a row; state: what the next block sees."""

    target: Tensor
    patches: Tensor
    count: int
    state: _State


class EncoderFacade:
    """Runs one EncoderStage in a vision encoder."""

    def __init__(self, encoder: Encoder, stage: EncoderStage) -> None:
        self.encoder, self.stage = encoder, stage
        self.blocks = encoder.blocks
        self.active_blocks = max(encoder.feature_blocks) + 1
        self.proportional = stage.proportional
        if self.proportional is None:
            self.proportional = encoder.bias_argument is not None
        elif self.proportional and encoder.bias_argument is None:
            raise NotImplementedError(
                f"{stage!r}: proportional attention adds a bias per key, which the attention of {encoder.family} does not "
                f"take: use {stage.name}(..., proportional=False)"
            )
        if self.proportional and encoder.attention not in ("sdpa", "eager"):
            raise NotImplementedError(
                f"{stage!r}: proportional attention adds a bias per key, which {encoder.attention} cannot take: use "
                f"attn_implementation='sdpa' for the vision tower, or {stage.name}(..., proportional=False)"
            )
        self._begin(None, (), {})

    def install(self) -> list[RemovableHandle]:
        handles = [self.encoder.tower.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for i, block in enumerate(self.blocks):
            bind = functools.partial
            handles += [
                block.module.register_forward_pre_hook(bind(self._block_pre, i), with_kwargs=True),
                # before transformers' own recording hooks, which are put on the same modules later
                block.module.register_forward_hook(bind(self._block_post, i), prepend=True),
                *block.tap(bind(self._keep_keys, i)),
                block.attention.register_forward_pre_hook(bind(self._attention_pre, i), with_kwargs=True),
                block.norm.register_forward_pre_hook(bind(self._norm_pre, i)),
                block.mlp.register_forward_hook(bind(self._mlp_post, i)),
            ]
        return handles

    # ------------------------------------------------------------------ what the runtime asks
    def spread(self, block: int) -> Tensor | None:
        """[n, P0]: which token of `block` each token of the tower is in, None for itself."""
        state = self.states[block]
        return None if state.source is None else self._in_tower_order(self._patches(state.source))

    def clusters(self, encoded: Encoded, arguments: dict[str, Any]) -> list[Tensor] | None:
        """Which tokens of each visual are one cluster at the end, [N] each; None if nothing was merged."""
        source = self.states[self.active_blocks].source
        if source is None:
            return None
        source = source[:, self.encoder.prefix :]
        rows = torch.arange(len(source), device=source.device)[:, None] * self.units
        numbers = source[0] if self.encoder.packed else source + rows
        assert isinstance(self.encoder, Adapter)
        return [row[:, 0] for row in self.encoder.arrange(encoded, arguments, numbers[..., None], nearest=True)]

    def left(self, tokens: int, first_view: int) -> int:
        """How many are left of a visual with `tokens` LLM tokens. Where packing crops or pools what the encoder gives, a
        visual has fewer tokens than its views have units: it keeps the same part of them."""
        units = first_view if self.encoder.packed else self.units - self.encoder.prefix
        return max(1, round(tokens * self.stage.budget(units, self.active_blocks, self.encoder.prefix) / units))

    @property
    def merged(self) -> list[int] | None:
        """How many units each block has merged away in the first row (segment) of the last call."""
        return self.schedules[self.lengths[0]] if self.lengths else None

    # ------------------------------------------------------------------ indices of units and patches
    def _patches(self, index: Tensor) -> Tensor:
        """Indices of units as indices of patches: [n, T] to [n, T * unit]."""
        unit, prefix = self.encoder.unit, self.encoder.prefix
        if unit == 1:
            return index
        corners = torch.arange(unit, device=index.device)
        each = ((index[:, prefix:, None] - prefix) * unit + prefix + corners).flatten(1)
        return torch.cat([index[:, :prefix], each], 1)

    def _in_tower_order(self, index: Tensor) -> Tensor:
        """Columns of [n, P], which stand unit after unit, as the patches of the tower stand."""
        return index if self.from_tower is None else index[:, self.from_tower.to(index.device)]

    def _schedule(self, length: int) -> list[int]:
        prefix = self.encoder.prefix
        planned = self.stage.schedule(length - prefix, self.active_blocks, prefix)
        return planned + [0] * (len(self.blocks) - self.active_blocks)

    # ------------------------------------------------------------------ hooks
    def _begin(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.arguments = kwargs
        self.lengths: list[int] = []
        self.schedules: dict[int, list[int]] = {}
        """How many units of a row of a length each block merges away."""
        self.units = 0
        self.states: list[_State] = [_State([])] * (len(self.blocks) + 1)
        """What enters each block, and what comes out of the last one."""
        self.merges: list[_Merge | None] = [None] * len(self.blocks)
        self.keys: Tensor | None = None
        self.to_tower: Tensor | None = None
        self.from_tower: Tensor | None = None

    def _open(self, hidden: Tensor) -> None:
        """Find out the shape of the rows, before the first block."""
        unit, prefix = self.encoder.unit, self.encoder.prefix
        if self.encoder.packed:
            self.lengths = [length // unit for length in self.encoder.segments(self.arguments)]
            self.units = sum(self.lengths)
        else:
            patches = hidden.shape[1] - prefix
            self.units = patches // unit + prefix
            self.lengths = [self.units]
            order = self.encoder.order(patches)
            if order is not None:
                self.to_tower = torch.cat([torch.arange(prefix), order + prefix])
                self.from_tower = self.to_tower.argsort()
        self.states[0] = _State(self.lengths)
        self.schedules = {length: self._schedule(length) for length in set(self.lengths)}

    def _rows(self, hidden: Tensor) -> Tensor:
        return hidden[None] if self.encoder.packed else hidden

    def _back(self, hidden: Tensor) -> Tensor:
        return hidden[0] if self.encoder.packed else hidden

    def _block_pre(self, i: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if i == 0:
            self._open(args[0])
        state = self.states[i]
        if state.representative is None:
            return None
        index = self._patches(state.representative)
        if self.to_tower is not None:
            index = self.to_tower.to(index.device)[index]
        hidden = self._back(gather(self._rows(args[0]), index))
        if self.encoder.packed:
            kwargs = self._shorter_segments(index[0], kwargs, len(args[0]))
        return (hidden, *args[1:]), kwargs

    @staticmethod
    def _shorter_segments(index: Tensor, kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
        """The boundaries and rotary tables of the tokens of a packed sequence that are left."""
        bounds = kwargs["cu_seqlens"]
        kept = torch.zeros(tokens + 1, dtype=torch.int64, device=index.device).index_fill(0, index + 1, 1)
        bounds = torch.unique_consecutive(kept.cumsum(0)[bounds.long()]).to(bounds.dtype)
        changed = {"cu_seqlens": bounds, "position_embeddings": tuple(t[index] for t in kwargs["position_embeddings"])}
        if kwargs.get("max_seqlen") is not None:
            longest = (bounds[1:] - bounds[:-1]).max()
            changed["max_seqlen"] = longest if isinstance(kwargs["max_seqlen"], Tensor) else int(longest)
        return {**kwargs, **changed}

    def _attention_pre(self, i: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        size = self.states[i].size
        if size is None or not self.proportional:
            return None
        patches = size if self.encoder.unit == 1 else self._sizes(size)
        dtype = (args[0] if args else kwargs["hidden_states"]).dtype
        bias = self.encoder.bias(proportional_bias(patches, dtype), self.blocks[i])
        return args, {**kwargs, str(self.encoder.bias_argument): bias}

    def _sizes(self, size: Tensor) -> Tensor:
        """Sizes of units as sizes of patches."""
        prefix = self.encoder.prefix
        return torch.cat([size[:, :prefix], size[:, prefix:].repeat_interleave(self.encoder.unit, 1)], 1)

    def _keep_keys(self, i: int, name: str, heads: Tensor) -> None:
        if name == "k" and self.merges[i] is None and any(schedule[i] for schedule in self.schedules.values()):
            self.keys = self._rows(heads.detach()).mean(-2)

    def _norm_pre(self, i: int, module: Any, args: tuple) -> tuple | None:
        if self.merges[i] is None:  # decided once, applied again when gradient checkpointing replays the block
            if self.keys is None:
                return None
            self.merges[i] = self._decide(i, self.keys)
            self.keys = None
        merge = self.merges[i]
        assert merge is not None
        hidden = args[0]
        rows = self._rows(hidden)
        size = self.states[i].size
        sizes = torch.ones(rows.shape[:2], device=hidden.device) if size is None else self._sizes(size)
        prefix = self.encoder.prefix
        count = prefix + (merge.count - prefix) * self.encoder.unit
        merged, _ = merge_mean(rows, sizes, merge.patches, count)
        hidden.copy_(self._back(gather(merged, merge.patches)))
        return (self._back(merged),)

    def _decide(self, i: int, keys: Tensor) -> _Merge:
        """Match the units of block `i` by the mean keys of their patches [n, P, d]."""
        state, unit, prefix = self.states[i], self.encoder.unit, self.encoder.prefix
        if self.to_tower is not None and state.source is None:
            keys = keys[:, self.to_tower.to(keys.device)]
        if unit > 1:
            keys = torch.cat([keys[:, :prefix], keys[:, prefix:].unflatten(1, (-1, unit)).mean(2)], 1)
        target, lengths = self._match(i, keys, state.lengths)
        patches = self._patches(target)
        if state.source is None:
            patches = self._in_tower_order(patches)
        count = sum(lengths)
        source = target if state.source is None else target.gather(1, state.source)
        tokens = source.shape[1]
        place = torch.arange(tokens, device=source.device).expand_as(source)
        first = torch.full((source.shape[0], count), tokens, device=source.device)
        first = first.scatter_reduce(1, source, place, "amin")
        size = state.size if state.size is not None else torch.ones(target.shape, device=target.device)
        merged_size = size.new_zeros(size.shape[0], count).scatter_add(1, target, size)
        self.states[i + 1] = _State(lengths, source, first, merged_size)
        return _Merge(target, patches, count, self.states[i + 1])

    def _match(self, i: int, keys: Tensor, lengths: list[int]) -> tuple[Tensor, list[int]]:
        """Target of every unit [n, T] and the new lengths of the segments."""
        prefix = self.encoder.prefix
        if not self.encoder.packed:
            target, count = self.stage.match(keys, self.schedules[self.lengths[0]][i], prefix)
            return target, [count]
        after = [now - self.schedules[before][i] for now, before in zip(lengths, self.lengths, strict=True)]
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for segment, sizes in enumerate(zip(lengths, after, strict=True)):
            alike[sizes].append(segment)
        parts = keys[0].split(lengths)
        targets: list[Tensor] = list(parts)
        for (now, then), members in alike.items():
            target, _ = self.stage.match(torch.stack([parts[m] for m in members]), now - then, prefix)
            for row, m in zip(target, members, strict=True):
                targets[m] = row + sum(after[:m])
        return torch.cat(targets)[None], after

    def _mlp_post(self, i: int, module: Any, args: tuple, output: Tensor) -> Tensor | None:
        merge = self.merges[i]
        return None if merge is None else self._back(gather(self._rows(output), merge.patches))

    def _block_post(self, i: int, module: Any, args: tuple, output: Any) -> Any:
        state = self.states[i]
        if self.merges[i] is None:
            self.states[i + 1] = state
        if state.source is None:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        index = self._in_tower_order(self._patches(state.source))
        hidden = self._back(gather(self._rows(hidden), index))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
