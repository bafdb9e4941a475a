# SPDX-License-Identifier: Apache-2.0
"""Merging inside the vision encoder behind a full-length facade.

Between two blocks the outside world (recorded hidden states, projector, placeholder counts) sees all tokens: after a
block every token shows its cluster (a gather), before the next block one representative per cluster is taken again
(exact). Inside a block the merge sits between attention and MLP, where the paper puts it: the norm before the MLP gets
the merged tokens, the MLP runs on them, and the residual stream, which is the tensor that the norm was given, becomes the
merged tokens. Where a backward pass may come, it is overwritten with them at full length of the block, and what the MLP makes is
spread over it.

Where several patches make one LLM token (2x2 in Qwen-VL and InternVL), such a unit is merged as a whole, each corner with
the same corner. Indices here are those of units, the tokens before the patches (CLS) being units of one token; `_patches`
turns them into indices of patches. A packed tower is one row with segments that are matched each by itself. Rows with padding
are each matched without it; what is left of it stands behind the tokens of its row and is masked in attention.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.hooks import RemovableHandle

from ..kernels.gather import gather, gather_into
from ..kernels.merge import merge as merged_rows
from ..ops import proportional_bias
from ..stage import EncoderStage
from ..visuals import Layout
from .adapter import Adapter, Encoded, Encoder
from .scope import ENCODE, Scope, current, enter, leave


@dataclass
class _State:
    """Tokens as one block sees them, in units. source [n, T0]: unit of the block for each unit of the tower; size [n, T]: how many
    are in it, and patches [n, P]: the same of each patch; first [n, T]: the first of the units of the tower, made when it is asked
    for. None before the first merge. lengths: units in each segment, or in each row without its padding."""

    lengths: list[int]
    source: Tensor | None = None
    size: Tensor | None = None
    patches: Tensor | None = None
    first: Tensor | None = None

    @property
    def representative(self) -> Tensor:
        """A unit of the tower for each unit of the block, [n, T]."""
        if self.first is None:
            assert self.source is not None and self.size is not None
            self.first = _first_of(self.source, self.size.shape[1])
        return self.first


@dataclass
class _Merge:
    """patches [n, P]: new patch of each patch, as they stand in the block; count: new units in a row; shorter: whether the residual
    stream of the block has only the new patches from here on."""

    patches: Tensor
    count: int
    shorter: bool = False


@dataclass
class _Run:
    """One call of the encoder.

    arguments  keywords of the call. lengths: units in each segment, or in each row without its padding; where rows are alike, in
               a row. units: in a row (packed: in all). unit: patches in each.
    schedules  how many units of a row of a length each block merges away.
    states     what enters each block, and what comes out of the last one. merges: of each block.
    corners    what makes a unit's number, times `unit`, those of its patches, [unit].
    keys       of the block that runs. given: the patches that came out of the last block, what it gave to the outside instead, and
               the version of that. to_tower, from_tower: order of the patches of every row, [n or 1, P], unit after unit, and back.
    """

    arguments: dict[str, Any]
    states: list[_State]
    merges: list[_Merge | None]
    lengths: list[int] = field(default_factory=list)
    schedules: dict[int, list[int]] = field(default_factory=dict)
    units: int = 0
    unit: int = 1
    corners: Tensor | None = None
    keys: Tensor | None = None
    given: tuple[Tensor, Tensor, int] | None = None
    to_tower: Tensor | None = None
    from_tower: Tensor | None = None


class _Replayed(threading.local):
    """The run whose blocks gradient checkpointing replays in this thread."""

    run: weakref.ref[_Run] | None = None


RESTS = "the stage of the tower rests"
"""Whether a call of the encoder is for a modality that the stage leaves alone: a key in the scope's state."""


class TowerScope:
    """Keeps what belongs to one call of a vision tower in the scope of the call; opens it where `owner` has not, since the tower
    may be called by itself."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner

    def begin(self, run: Any) -> None:
        scope = current(self.owner, ENCODE)
        if scope is None:
            scope = enter(Scope(self.owner, ENCODE))
            scope.state["mine"] = self
        scope.state[self] = run

    def end(self, module: Any, args: tuple, output: Any) -> None:
        scope = current(self.owner, ENCODE)
        if scope is not None and scope.state.get("mine") is self:
            leave(self.owner, ENCODE)

    @property
    def rests(self) -> bool:
        scope = current(self.owner, ENCODE)
        return scope is not None and RESTS in scope.state

    def run(self) -> Any:
        """What `begin` was given in the call that runs in this thread, None outside of one."""
        scope = current(self.owner, ENCODE)
        return None if scope is None else scope.state.get(self)


def opened_by_tower(scope: Scope) -> bool:
    """Whether a vision tower that was called by itself has opened a scope."""
    return "mine" in scope.state


class EncoderFacade(TowerScope):
    """Runs one EncoderStage in a vision encoder; `owner` is the engine.

    Gradient checkpointing replays blocks in the backward pass, when no call runs, perhaps in another thread. What they did is
    found by the storage of the block's input, which lives as long as a replay may come.
    """

    def __init__(self, owner: Any, encoder: Encoder, stage: EncoderStage) -> None:
        super().__init__(owner)
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
        if encoder.padded and encoder.attention not in ("sdpa", "eager"):
            raise NotImplementedError(
                f"{stage!r}: rows of the vision encoder have padding, which is masked anew behind a merge, and {encoder.attention} "
                f"takes no such mask: use attn_implementation='sdpa' for the vision tower"
            )
        self.inputs: dict[int, tuple[StorageWeakRef, _Run]] = {}
        """The run that each block input belongs to, by storage."""
        self.replayed = _Replayed()

    def install(self) -> Iterator[RemovableHandle]:
        yield self.encoder.tower.register_forward_pre_hook(self.start, with_kwargs=True)
        yield from self.inside()

    def inside(self) -> Iterator[RemovableHandle]:
        """All hooks but `start`, which begins a call of the tower."""
        bind = functools.partial
        yield self.encoder.tower.register_forward_hook(self.end, always_call=True)
        for i, block in enumerate(self.blocks):
            yield block.module.register_forward_pre_hook(bind(self._block_pre, i), with_kwargs=True)
            # before transformers' own recording hooks, which are put on the same modules later
            yield block.module.register_forward_hook(bind(self._block_post, i), prepend=True)
            yield block.first.register_forward_pre_hook(self._first_pre)
            yield from block.tap(bind(self._keep_keys, i))
            yield block.attention.register_forward_pre_hook(bind(self._attention_pre, i), with_kwargs=True)
            yield block.norm.register_forward_pre_hook(bind(self._norm_pre, i))
            yield block.mlp.register_forward_hook(bind(self._mlp_post, i))

    # ------------------------------------------------------------------ what the runtime asks
    def spread(self, block: int) -> Tensor | None:
        """[n, P0]: which token of `block` each token of the tower is in, None for itself."""
        run = self._running()
        state = run.states[block]
        return None if state.source is None else _in_tower_order(run, self._patches(run, state.source))

    def clusters(self, encoded: Encoded, arguments: dict[str, Any]) -> list[Tensor] | None:
        """Which tokens of each visual are one cluster at the end, [N] each; None if nothing was merged."""
        run = self._running()
        source = run.states[self.active_blocks].source
        if source is None:
            return None
        source = source[:, self.encoder.prefix :]
        rows = torch.arange(len(source), device=source.device)[:, None] * run.units
        numbers = source[0] if self.encoder.packed else source + rows
        if self.encoder.padded:
            numbers = numbers[torch.arange(run.units) < torch.tensor(run.lengths)[:, None]]
        assert isinstance(self.encoder, Adapter)
        return [row[:, 0] for row in self.encoder.arrange(encoded, arguments, numbers[..., None], nearest=True)]

    @property
    def merged(self) -> list[int]:
        """How many units each block has merged away in the first row (segment). Raises RuntimeError if one did not that should."""
        run = self._running()
        late = [
            i for i in range(len(self.blocks)) if run.merges[i] is None and any(s[i] for s in run.schedules.values())
        ]
        if late or not run.lengths:
            raise RuntimeError(
                f"{self.stage!r} has to merge tokens in the vision encoder, but saw no keys in block {late[0] if late else 0}: "
                f"what runs there is not what was found; call mmcompress.compress(model, plan) again"
            )
        return run.schedules[run.lengths[0]]

    def left(self, layouts: list[Layout]) -> list[int]:
        """How many LLM tokens are left of each visual. Where packing crops or pools what the encoder gives, a visual has fewer
        tokens than its views have units: it keeps the same part of them."""
        run, prefix = self._running(), self.encoder.prefix
        if not (self.encoder.packed or self.encoder.padded):
            units = run.units - prefix
            budget = self.stage.budget(units, self.active_blocks, prefix)
            return [max(1, round(layout.cells * budget / units)) for layout in layouts]
        lengths, counts = iter(run.lengths), []
        for layout in layouts:
            seen = count = 0
            while seen < layout.cells:
                seen += (length := next(lengths))
                count += self.stage.budget(length, self.active_blocks, prefix)
            counts.append(count)
        return counts

    # ------------------------------------------------------------------ indices of units and patches
    def _patches(self, run: _Run, index: Tensor) -> Tensor:
        """Indices of units as indices of patches: [n, T] to [n, T * unit]."""
        unit, prefix = run.unit, self.encoder.prefix
        if unit == 1:
            return index
        if run.corners is None:
            run.corners = torch.arange(unit, device=index.device) + (prefix - prefix * unit)
        each = torch.add(run.corners, (index[:, prefix:] if prefix else index)[..., None], alpha=unit).flatten(1)
        return torch.cat([index[:, :prefix], each], 1) if prefix else each

    def _schedule(self, length: int) -> list[int]:
        prefix = self.encoder.prefix
        planned = self.stage.schedule(length - prefix, self.active_blocks, prefix)
        return planned + [0] * (len(self.blocks) - self.active_blocks)

    # ------------------------------------------------------------------ runs
    def _running(self) -> _Run:
        """The run of this thread, or the one that it replays."""
        run = self.run()
        if run is None and self.replayed.run is not None:
            run = self.replayed.run()
        if run is None:
            raise RuntimeError(
                f"{self.stage!r}: a block of the vision encoder ran outside of a call of the encoder, or was replayed from an "
                f"input that had been moved: call the encoder as a whole, without offloading of checkpointed activations"
            )
        return run

    def _remember(self, run: _Run, hidden: Tensor, module: Any) -> None:
        """Note that `hidden` enters a block of a run, where a replay may come."""
        if _learns(module) and not torch.compiler.is_compiling():
            storage = StorageWeakRef(hidden.untyped_storage())
            self.inputs[storage.cdata] = storage, run

    def _replay(self, hidden: Tensor) -> None:
        """Find the run that `hidden` entered a block of."""
        found = self.inputs.get(hidden.untyped_storage()._cdata)
        if found is not None:
            self.replayed.run = weakref.ref(found[1])

    # ------------------------------------------------------------------ hooks
    def start(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        for key, (storage, _) in list(self.inputs.items()):
            if storage.expired():
                self.inputs.pop(key, None)
        names, count = inspect.signature(module.forward).parameters, len(self.blocks)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self.begin(_Run(given, [_State([])] * (count + 1), [None] * count))

    def _open(self, run: _Run, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        """Find out the shape of the rows, before the first block, whose keywords are given."""
        arguments, prefix = {**run.arguments, **kwargs}, self.encoder.prefix
        run.unit = unit = self.encoder.unit_in(arguments)
        rows = self._rows(hidden)
        width, ragged = rows.shape[1] - prefix, self.encoder.packed or self.encoder.padded
        segments = self.encoder.segments(arguments) if ragged else [width]
        run.lengths = [length // unit + prefix for length in segments]
        run.units = sum(run.lengths) if self.encoder.packed else width // unit + prefix
        order = self.encoder.order(len(rows) * width if self.encoder.padded else width, arguments)
        if order is not None:
            lost = (sum(segments) - len(order)) or (width % unit if self.encoder.padded else 0)
            if lost:
                raise NotImplementedError(
                    f"{self.stage!r}: {lost} patches make no visual token ({unit} make one), and could not be merged: give "
                    f"pictures whose sides are multiples of that, as the processor makes them"
                )
            parts = order.split(segments) if self.encoder.padded else [order]
            places = torch.stack([_before_others(part - i * width, width) for i, part in enumerate(parts)])
            run.to_tower = torch.cat([torch.arange(prefix).expand(len(places), -1), places + prefix], 1)
            run.from_tower = run.to_tower.argsort(1)
        run.states[0] = _State(run.lengths)
        run.schedules = {
            length: [0] * len(self.blocks) if self.rests else self._schedule(length) for length in set(run.lengths)
        }
        run.arguments = {}

    @staticmethod
    def _rows(hidden: Tensor) -> Tensor:
        """As rows [n, T, C]; some packed towers have no dimension for their one row."""
        return hidden if hidden.dim() == 3 else hidden[None]

    @staticmethod
    def _picked(x: Tensor, index: Tensor) -> Tensor:
        """The tokens `index` [n, T] of `x`, in its form."""
        return gather(x, index) if x.dim() == 3 else x.index_select(0, index[0])

    @staticmethod
    def _back(rows: Tensor, like: Tensor) -> Tensor:
        """Rows as `like` has them."""
        return rows if like.dim() == 3 else rows[0]

    def _block_pre(self, i: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if self.run() is None:
            self._replay(args[0])
        run = self._running()
        if not run.lengths:
            self._open(run, args[0], kwargs)
        state = run.states[i]
        self._remember(run, args[0], module)
        given, run.given = run.given, None
        if state.source is None:
            return None
        known = given is not None and len(module._forward_pre_hooks) == 1 and _is_still(*given[1:], args[0])
        short = given[0] if given is not None and known else None
        if short is not None and all(x is None for x in (*args[1:], *kwargs.values())):
            return (short, *args[1:]), kwargs
        index = self._patches(run, state.representative)
        if run.to_tower is not None:
            index = _ordered(run.to_tower, index)
        tokens = args[0].shape[-2]
        if any(x is not None for x in args[1:]):  # by name, which says what they are
            names = list(inspect.signature(module.forward).parameters)
            args, kwargs = args[:1], {**dict(zip(names[1:], args[1:], strict=False)), **kwargs}
        kwargs = self._fewer(index, kwargs, tokens)
        hidden = self._picked(args[0], index) if short is None else short
        self._remember(run, hidden, module)
        return (hidden, *args[1:]), kwargs

    @staticmethod
    def _fewer(index: Tensor, kwargs: dict[str, Any], tokens: int) -> dict[str, Any]:
        """The keywords of a block for the tokens `index` [n, T] of `tokens` that are left: whatever has a value per token (rotary
        tables, positions, masks), and the boundaries of segments."""
        changed = {name: _taken(name, value, index, tokens) for name, value in kwargs.items()}
        for name in ("cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k"):
            bounds = kwargs.get(name)
            if bounds is not None:
                kept = torch.zeros(tokens + 1, dtype=torch.int64, device=index.device).index_fill(0, index[0] + 1, 1)
                changed[name] = bounds = torch.unique_consecutive(kept.cumsum(0)[bounds.long()]).to(bounds.dtype)
                longest = (bounds[1:] - bounds[:-1]).max()
                for most in {"cu_seqlens": ("max_seqlen",)}.get(name, ("max_length_q", "max_length_k")):
                    if kwargs.get(most) is not None:
                        changed[most] = longest if isinstance(kwargs[most], Tensor) else int(longest)
        return changed

    def _first_pre(self, module: Any, args: tuple) -> None:
        if self.run() is None:  # transformers from 5.24 on replays the inside of a block only
            self._replay(args[0])

    def _attention_pre(self, i: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        run = self._running()
        patches = self._sizes(run, run.states[i]) if self.proportional or self.encoder.padded else None
        if patches is None:
            return None
        dtype = (args[0] if args else kwargs["hidden_states"]).dtype
        bias = proportional_bias(patches if self.proportional else torch.ones_like(patches), dtype)
        if self.encoder.padded:
            real = torch.arange(patches.shape[1]) < torch.tensor(run.states[i].lengths)[:, None] * run.unit
            bias = bias.masked_fill(~real.to(bias.device)[:, None, None], torch.finfo(dtype).min)
        bias, name = self.encoder.bias(bias, self.blocks[i]), str(self.encoder.bias_argument)
        mask = None if self.encoder.padded else kwargs.get(name)
        if mask is not None:
            bias = torch.where(mask, bias, torch.finfo(dtype).min) if mask.dtype == torch.bool else bias + mask
        return args, {**kwargs, name: bias}

    def _sizes(self, run: _Run, state: _State) -> Tensor | None:
        """Sizes of the patches of units, [n, P]; None: all are 1."""
        size, prefix = state.size, self.encoder.prefix
        if run.unit == 1:
            return size
        if state.patches is None and size is not None:
            each = (size[:, prefix:] if prefix else size).repeat_interleave(run.unit, 1)
            state.patches = torch.cat([size[:, :prefix], each], 1) if prefix else each
        return state.patches

    def _keep_keys(self, i: int, name: str, heads: Tensor) -> None:
        run = self._running()
        if name == "k" and run.merges[i] is None and any(schedule[i] for schedule in run.schedules.values()):
            run.keys = self._rows(heads.detach().mean(-2))

    def _norm_pre(self, i: int, module: Any, args: tuple) -> tuple | None:
        run = self._running()
        if run.merges[i] is None:  # decided once, applied again when gradient checkpointing replays the block
            if run.keys is None:
                return None
            run.merges[i] = self._decide(run, i, run.keys)
            run.keys = None
        merge = run.merges[i]
        assert merge is not None
        hidden, sizes, prefix = args[0], self._sizes(run, run.states[i]), self.encoder.prefix
        count = prefix + (merge.count - prefix) * run.unit
        merged = merged_rows(self._rows(hidden), merge.patches, count, sizes, mean=True)
        short = self._back(merged, hidden)
        merge.shorter = not (_learns(module) or hidden._is_view())
        if merge.shorter:
            hidden.set_(short)  # the block goes on with the same tensor
        else:
            gather_into(self._rows(hidden), merged, merge.patches)
        return (short,)

    def _decide(self, run: _Run, i: int, keys: Tensor) -> _Merge:
        """Match the units of block `i` by the mean keys of their patches [n, P, d]."""
        state, unit, prefix = run.states[i], run.unit, self.encoder.prefix
        if run.to_tower is not None and state.source is None:
            keys = gather(keys, run.to_tower.to(keys.device, non_blocking=True).expand(len(keys), -1))
        if unit > 1:
            each = (keys[:, prefix:] if prefix else keys).unflatten(1, (-1, unit)).mean(2)
            keys = torch.cat([keys[:, :prefix], each], 1) if prefix else each
        target, lengths, count = self._match(run, i, keys, state.lengths)
        source = target if state.source is None else target.gather(1, state.source)
        first = None
        if self.encoder.windowed:  # what a window holds stays together
            first = _first_of(source, count)
            corner = first * unit  # such towers have no CLS
            if run.to_tower is not None:
                corner = run.to_tower.to(corner.device, non_blocking=True).expand(len(corner), -1).gather(1, corner)
            order = corner.argsort(1)
            first, number = first.gather(1, order), order.argsort(1)
            target, source = number.gather(1, target), number.gather(1, source)
        patches = self._patches(run, target)
        if state.source is None:
            patches = _in_tower_order(run, patches)
        size = state.size if state.size is not None else torch.ones(target.shape, device=target.device)
        merged_size = size.new_zeros(size.shape[0], count).scatter_add(1, target, size)
        run.states[i + 1] = _State(lengths, source, merged_size, first=first)
        return _Merge(patches, count)

    def _match(self, run: _Run, i: int, keys: Tensor, lengths: list[int]) -> tuple[Tensor, list[int], int]:
        """Target of every unit [n, T], the new lengths of the segments, and how many units a row has then."""
        prefix = self.encoder.prefix
        if not (self.encoder.packed or self.encoder.padded):
            target, count = self.stage.match(keys, run.schedules[run.units][i], prefix)
            return target, [count], count
        after = [now - run.schedules[before][i] for now, before in zip(lengths, run.lengths, strict=True)]
        if self.encoder.packed and len(lengths) == 1:
            target, count = self.stage.match(keys, lengths[0] - after[0], prefix)
            return target, after, count
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for segment, sizes in enumerate(zip(lengths, after, strict=True)):
            alike[sizes].append(segment)
        parts = (
            keys[0].split(lengths)
            if self.encoder.packed
            else [row[:now] for row, now in zip(keys, lengths, strict=True)]
        )
        targets: list[Tensor] = list(parts)
        for (now, then), members in alike.items():
            target, _ = self.stage.match(torch.stack([parts[m] for m in members]), now - then, prefix)
            for row, m in zip(target, members, strict=True):
                targets[m] = row + sum(after[:m]) if self.encoder.packed else row
        if self.encoder.packed:
            return torch.cat(targets)[None], after, sum(after)
        tokens = keys.shape[1]
        count = max(then + (now < tokens) for now, then in zip(lengths, after, strict=True))
        rows = [torch.nn.functional.pad(row, (0, tokens - len(row)), value=count - 1) for row in targets]
        return torch.stack(rows), after, count

    def _mlp_post(self, i: int, module: Any, args: tuple, output: Tensor) -> Tensor | None:
        merge = self._running().merges[i]
        if merge is None or merge.shorter:
            return None
        return self._picked(output, merge.patches)

    def _block_post(self, i: int, module: Any, args: tuple, output: Any) -> Any:
        run = self._running()
        state, merge = run.states[i], run.merges[i]
        if merge is None:
            run.states[i + 1] = state
        elif merge.shorter:
            state = run.states[i + 1]
        if state.source is None:
            return None
        short = output[0] if isinstance(output, tuple) else output
        index = _in_tower_order(run, self._patches(run, state.source))
        hidden = self._picked(short, index)
        unseen = len(module._forward_hooks) == 1 and not _learns(module) and not hidden.is_inference()
        if unseen and (merge is None or merge.shorter):
            run.given = short, hidden, hidden._version
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _taken(name: str, value: Any, index: Tensor, tokens: int) -> Any:
    """A keyword of a block at the tokens `index` [n, T]. Masks end in keys, and before them queries where there are several;
    numbers have a dimension of tokens; tables are [..., tokens, d]. A dimension of rows in front is of one row or of n."""
    if isinstance(value, tuple | list):
        return type(value)(_taken(name, part, index, tokens) for part in value)
    if not isinstance(value, Tensor):
        return value
    if "mask" in name:
        dims = [-1, -2] if value.dim() > 2 else [-1]
    elif value.is_floating_point():
        dims = [-2]
    else:
        dims = [-1, -2][: value.dim()]
    dims = [dim for dim in dims if value.dim() >= -dim and value.shape[dim] == tokens]
    if "mask" not in name:
        dims = dims[:1]
    for dim in dims:
        if len(index) == 1:
            value = value.index_select(dim, index[0])
            continue
        if value.dim() == -dim:
            value = value[index]
            continue
        if len(value) == 1:
            value = value.expand(len(index), *value.shape[1:])
        if value.dim() + dim == 1:
            value = gather(value, index)
            continue
        at = index.view(len(index), *[-1 if d == dim else 1 for d in range(1 - value.dim(), 0)])
        value = value.gather(dim, at.expand(*value.shape[:dim], index.shape[1], *value.shape[value.dim() + dim + 1 :]))
    return value


def _learns(module: Any) -> bool:
    """Whether a backward pass may come by a module, and gradient checkpointing replay it; code that is compiled counts as such."""
    return bool(torch.is_grad_enabled() or module.training or torch.compiler.is_compiling())


def _is_still(given: Tensor, version: int, now: Tensor) -> bool:
    """Whether `now` is what was given, and nobody has written into it."""
    return now is given and now._version == version


def _first_of(source: Tensor, count: int) -> Tensor:
    """The first of the tokens that went into each of `count` new ones, by `source` [n, T0]: [n, count]."""
    tokens = source.shape[1]
    place = torch.arange(tokens, device=source.device).expand_as(source)
    first = torch.full((source.shape[0], count), tokens, device=source.device)
    return first.scatter_reduce(1, source, place, "amin").clamp(max=tokens - 1)  # padding may be missing


def _before_others(order: Tensor, count: int) -> Tensor:
    """The numbers in `order`, and behind them all others below `count`."""
    rest = torch.ones(count, dtype=torch.bool).index_fill(0, order.cpu(), False)
    return torch.cat([order.cpu(), rest.nonzero()[:, 0]])


def _ordered(order: Tensor, index: Tensor) -> Tensor:
    """What stands in `order` [n or 1, P] at the places `index` [n, T]."""
    return order.to(index.device, non_blocking=True).expand(len(index), -1).gather(1, index)


def _in_tower_order(run: _Run, index: Tensor) -> Tensor:
    """Columns of [n, P], which stand unit after unit, as the patches of the tower stand."""
    return (
        index
        if run.from_tower is None
        else index.gather(1, run.from_tower.to(index.device, non_blocking=True).expand(len(index), -1))
    )
