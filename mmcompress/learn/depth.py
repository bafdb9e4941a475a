# SPDX-License-Identifier: Apache-2.0
"""Mixture of depths: in some layers of a language model only a part of the tokens is processed, the others pass by.

Between layers nothing is shorter. Around a converted layer the tokens that run it are gathered, with their rotary tables and a
mask of their own, so that every attention implementation and batches with padding work, and put back behind it; each layer has
its own, shorter KV cache. Everything is done by hooks, as in `mmcompress.runtime.engine`.
"""

from __future__ import annotations

import functools
import inspect
import threading
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..runtime.adapter import Adapter
from ..runtime.cache import book, cache_of, is_pruned, ledger_of
from ..runtime.call import Call
from ..runtime.locate import placeholder_masks
from ..runtime.masks import layer_mask, layers_differ, validity
from ..runtime.needs import check_language_model
from ..runtime.packing import Group, Packed, pack, renumbered
from ..runtime.rotary import layer_tables
from ..runtime.scope import Scope, current, enter, leave
from ..runtime.windows import windows_of
from ..selection import gather

CALL = "mmcompress_depth"
"""Private keyword that carries the call to the layers; gradient checkpointing replays them with their keywords."""
FACTORS = "mmcompress_factors"
"""Private keyword that a layer hands on to its attention: what the MLP gives is multiplied by. Gradient checkpointing replays
attention and MLP, in newer transformers without the hooks of the layer."""
ROUTER = "depth_router"
"""Name under which routers are sub-modules of what they route, so that they are trained, moved and saved with it."""


@dataclass(frozen=True)
class Seen:
    """What a router knows of a call of B samples of S tokens.

    visual, valid  [B, S] bool: visual tokens, and real ones. visuals, counts: how many there are in each row, on the host;
                   prefixes: how many real ones up to the last visual one.
    training       whether the model is being trained. decoding: one new token behind a cache.
    """

    visual: Tensor
    valid: Tensor
    visuals: list[int]
    counts: list[int]
    prefixes: list[int]
    training: bool = False
    decoding: bool = False

    @staticmethod
    def of(visual: Tensor, valid: Tensor, training: bool = False, decoding: bool = False) -> Seen:
        """From two masks [B, S] on the host."""
        last = torch.where(visual, torch.arange(visual.shape[1]), -1).amax(1, keepdim=True)
        prefix = valid & (torch.arange(visual.shape[1]) <= last)
        visuals, counts, prefixes = (mask.sum(1).tolist() for mask in (visual, valid, prefix))
        return Seen(visual, valid, visuals, counts, prefixes, training, decoding)


@dataclass(frozen=True)
class Routed:
    """What a router decided for one layer.

    runs     [B, S] bool: the tokens that run the layer; counts: how many in each row, None: ask the device.
    mlp      [B, S]: factor of what the MLP gives a token that runs. passing: factor of the state of one that does not; None: 1.
    loss     of the router, None without one.
    """

    runs: Tensor
    mlp: Tensor
    counts: list[int] | None = None
    passing: Tensor | None = None
    loss: Tensor | None = None


@dataclass(frozen=True)
class MixtureOfDepths:
    """How a model is converted; subclasses are frozen dataclasses whose fields are the options."""

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    reindexes: ClassVar[bool] = False
    """Whether tokens that run a layer are numbered without gaps in it."""
    of_text: ClassVar[bool] = False
    """Whether tokens of text may pass by too, so that calls without visuals are routed as well."""

    def converted(self, depth: int) -> tuple[int, ...]:
        """Which of `depth` layers are converted, ascending, without the first one."""
        raise NotImplementedError

    def attach(self, language_model: Any) -> dict[int, nn.Module]:
        """Put fresh routers into the model; the one of each converted layer."""
        raise NotImplementedError

    def route(self, seen: Seen, router: nn.Module, layer: int, depth: int, hidden: Tensor, norm: nn.Module) -> Routed:
        """Decide about `layer` of `depth`, which the states hidden [B, S, D] enter; `norm` is its first norm."""
        raise NotImplementedError


def best_of(scores: Tensor, among: Tensor, k: Tensor) -> Tensor:
    """The k [B] best of the tokens `among` [B, S] bool in each row, [B, S] bool; ties to the lower place."""
    scores = scores.detach().float().masked_fill(~among, float("-inf"))
    order = scores.sort(dim=1, descending=True, stable=True).indices
    place = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter(1, order, place)
    return (rank < k.to(scores.device)[:, None]) & among


def gathered(runs: Tensor, counts: list[int]) -> Packed:
    """The tokens `runs` [B, S] bool, `counts` of them per row, right-aligned; one slot of padding where there are none at all."""
    places = torch.where(runs, torch.arange(runs.shape[1], device=runs.device), -1)
    if max(counts):
        return pack(places, counts)
    return Packed(torch.zeros_like(places[:, :1]), places[:, :1].fill_(-1), torch.zeros_like(runs[:, :1]))


def put_back(hidden: Tensor, made: Tensor, packed: Packed | None, passing: Tensor | None) -> Tensor:
    """States [B, S, D] behind a layer: `made` [B, M, D] where a token ran it; the others keep what they had in `hidden`, times
    `passing` [B, S]."""
    if packed is None:
        return made
    rest = hidden if passing is None else hidden * passing[..., None].to(hidden.dtype)
    index = packed.source.to(hidden.device)
    if packed.valid is not None:  # padding goes to a spare row that is cut off
        index = index.masked_fill(~packed.valid.to(hidden.device), hidden.shape[1])
        made = made.masked_fill(~packed.valid.to(hidden.device)[..., None], 0)
    spare = torch.cat([rest, rest.new_zeros(len(rest), 1, rest.shape[-1])], 1)
    return spare.scatter(1, index[..., None].expand_as(made), made.to(rest.dtype))[:, :-1]


@dataclass(eq=False)
class DepthCall(Scope):
    """A call of the base model: what the runtime keeps of it, what routers see (None: nothing to route), the tokens of layers."""

    owner: Any
    call: Call
    pixels: bool
    seen: Seen | None = None
    groups: dict[int, Group] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.owner)

    def group_of(self, layer: int) -> Group:
        return self.groups.get(layer, self.call.groups[0])


class _Running(threading.local):
    """What layers that are running in this thread keep from their beginning to their end: by engine and layer, the states that
    entered with what was decided, and factors of the MLP. Not in the scope of the call: gradient checkpointing replays layers."""

    def __init__(self) -> None:
        self.now: dict[tuple[int, int], tuple[Tensor, Routed, Packed | None]] = {}
        self.factors: dict[tuple[int, int], Tensor] = {}

    def clear(self) -> None:
        self.now.clear()
        self.factors.clear()


_RUNNING = _Running()


class DepthEngine:
    """Runs one converted model, from `install` to `remove`.

    losses   of the routers in the last call, by layer. tokens: how many tokens ran each layer in the last call that was routed
             and not a decode step, by row.
    """

    def __init__(self, adapter: Adapter, config: MixtureOfDepths) -> None:
        self.adapter, self.config = adapter, config
        self.base, self.language_model = adapter.base, adapter.language_model
        text_config = self.language_model.config
        check_language_model(text_config, _plan_of(config))
        if any(windows_of(text_config)):
            raise NotImplementedError(f"{config!r}: the language model has layers that look back only so far")
        self.depth = len(self.language_model.layers)
        self.layers = config.converted(self.depth)
        wrong = [f"layer {i}" for i in self.layers if not 1 <= i < self.depth] or ["no layer"]
        if wrong[0] != "no layer" or not self.layers:
            raise ValueError(
                f"{config!r} converts {wrong[0]} of a language model of {self.depth}: give layers of 1 to {self.depth - 1}; "
                f"layer 0 stays as it is, for positions and masks are made from its cache"
            )
        for i in self.layers:
            lacking = [
                n for n in ("input_layernorm", "self_attn", "mlp") if not hasattr(self.language_model.layers[i], n)
            ]
            if lacking:
                raise NotImplementedError(
                    f"{config!r}: a layer of {type(self.language_model).__name__} has no {', '.join(lacking)}; only layers of "
                    f"attention and an MLP, each behind a norm, can be converted"
                )
        self.reindex = config.reindexes and adapter.reindexes
        self.parameters = list(inspect.signature(self.base.forward).parameters)
        self.routers: dict[int, nn.Module] = {}
        self.handles: list[RemovableHandle] = []
        self.losses: dict[int, Tensor] = {}
        self.tokens: list[list[int]] = []

    # ------------------------------------------------------------------ install, remove
    def install(self) -> None:
        """Put routers and hooks in. If anything fails half-way, everything is taken out again."""
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    def _install(self) -> None:
        add = self.handles.append
        self.routers = self.config.attach(self.language_model)
        add(self.base.register_forward_pre_hook(self._base_pre, with_kwargs=True))
        add(self.base.register_forward_hook(self._base_post, always_call=True))
        add(self.language_model.register_forward_pre_hook(self._language_pre, with_kwargs=True))
        add(self.language_model.register_forward_hook(self._language_post))
        for i, layer in enumerate(self.language_model.layers):
            add(layer.register_forward_pre_hook(functools.partial(self._layer_pre, i), with_kwargs=True))
        for i in self.layers:
            layer = self.language_model.layers[i]
            add(layer.self_attn.register_forward_pre_hook(functools.partial(self._attention_pre, i), with_kwargs=True))
            add(layer.mlp.register_forward_hook(functools.partial(self._mlp_post, i)))
            # before transformers' own hooks, which record hidden states
            add(layer.register_forward_hook(functools.partial(self._layer_post, i), prepend=True))

    def remove(self) -> None:
        """Take everything out again."""
        leave(self)
        for handle in self.handles:
            handle.remove()
        self.handles = []
        for module in (self.language_model, *self.language_model.layers):
            if hasattr(module, ROUTER):
                delattr(module, ROUTER)

    # ------------------------------------------------------------------ base model
    def _base_pre(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        pixels = [given.get(name) for name in ("pixel_values", "pixel_values_videos")]
        pixels += list((given.get("mm_encoder_outputs") or {}).values())
        call = Call(given.get("input_ids"), given.get("inputs_embeds"), [], mask=given.get("attention_mask"))
        enter(DepthCall(self, call, any(p is not None for p in pixels)))
        _RUNNING.clear()
        self.losses.clear()

    def _base_post(self, module: Any, args: tuple, output: Any) -> None:
        leave(self)
        _RUNNING.clear()

    @property
    def call(self) -> DepthCall | None:
        """The forward pass that runs in this thread."""
        call = current(self)
        return call if isinstance(call, DepthCall) else None

    # ------------------------------------------------------------------ language model
    def _language_pre(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        depth = self.call
        if depth is None:
            raise NotImplementedError(
                f"the language model was converted by {self.config!r} and has to know which tokens are visual: call the whole model"
            )
        if kwargs.get("inputs_embeds") is None:
            return None
        call = depth.call
        call.cache = cache_of(kwargs)
        pruned = is_pruned(call.cache)
        if not depth.pixels and not self.config.of_text and not pruned:
            return None
        kwargs = dict(kwargs)
        embeds: Tensor = kwargs["inputs_embeds"]
        call.batch, length, _ = embeds.shape
        call.past = call.cache.get_seq_length() + 0 if call.cache is not None else 0
        valid, call.past_valid = validity(call, length)
        counts, tail = [length] * call.batch, 0
        if depth.pixels or self.config.of_text:
            depth.seen, tail = self._look(depth, valid, embeds, length)
            counts = depth.seen.counts
        full = (
            all(count == length for count in counts) if valid is not None and depth.seen is not None else valid is None
        )
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (torch.arange(length, device=embeds.device) + call.past)[None]
        here = None if full or valid is None else valid.to(embeds.device)
        call.groups = [Group(0, length, length, counts, here, tail=tail, positions=positions)]
        if depth.seen is not None or layers_differ(call, length, self.language_model.config._attn_implementation):
            kwargs[CALL] = depth
        return args, kwargs

    def _look(self, depth: DepthCall, valid: Tensor | None, embeds: Tensor, length: int) -> tuple[Seen, int]:
        """What routers see, and how many tokens at the end no layer will pass by. The one wait for the device, but where routers
        decide how many tokens run."""
        call, device = depth.call, embeds.device
        real = torch.ones(call.batch, length, dtype=torch.bool, device=device) if valid is None else valid.to(device)
        visual = torch.zeros_like(real)
        if depth.pixels:
            for mask in placeholder_masks(call, self.adapter).values():
                visual |= mask.to(device)
        visual &= real
        host = torch.stack([visual, real]).cpu()
        decoding = length == 1 and int(call.past) > 0 and not depth.pixels
        training = self.language_model.training and int(call.past) == 0
        seen = Seen.of(host[0], host[1], training, decoding)
        last = int(torch.where(host[0], torch.arange(length), -1).amax())
        tail = length - 1 - last if bool(host[1][:, -1].all()) and not self.config.of_text else 0
        return replace(seen, visual=visual, valid=real), tail

    def _language_post(self, module: Any, args: tuple, output: Any) -> None:
        depth = self.call
        if depth is None or depth.seen is None:
            return
        groups = [depth.group_of(i) for i in range(self.depth)]
        if not depth.seen.decoding:
            self.tokens = [group.counts for group in groups]
        cache = cache_of(output)
        if cache is not None and any(group.source is not None or group.valid is not None for group in groups):
            book(cache, depth.group_of, depth.call.past_valid, depth.call.batch)

    # ------------------------------------------------------------------ layers
    def _layer_pre(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if CALL not in kwargs:
            return None
        kwargs = dict(kwargs)
        depth: DepthCall = kwargs.pop(CALL)
        call = depth.call
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        group = depth.group_of(index)
        if index in self.routers and depth.seen is not None:
            routed = self.config.route(
                depth.seen, self.routers[index], index, self.depth, hidden, module.input_layernorm
            )
            if index not in depth.groups:
                depth.groups[index] = self._group(call, index, routed)
            group = depth.groups[index]
            if routed.loss is not None:
                self.losses[index] = routed.loss
            packed = None if group.source is None else Packed(group.source, group.source, group.valid)
            kwargs[FACTORS] = (
                routed.mlp if packed is None else routed.mlp.gather(1, packed.source.to(routed.mlp.device))
            )
            _RUNNING.now[id(self), index] = (hidden, routed, packed)
            if packed is not None:
                hidden = gather(hidden, packed.source)
        mine, first = ledger_of(call.cache, index), ledger_of(call.cache, 0)
        given = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = layer_tables(self.language_model, index, call, group, mine, hidden, given)
        if group is not call.groups[0] or mine is not first:
            kwargs["attention_mask"] = layer_mask(self.language_model.config, call, group, index, hidden)
            kwargs["position_ids"] = None  # gaps would be taken for packed sequences by flash attention
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    @torch.no_grad()
    def _group(self, call: Call, index: int, routed: Routed) -> Group:
        """The tokens that run layer `index`."""
        base = call.groups[0]
        counts = routed.counts if routed.counts is not None else routed.runs.sum(1).tolist()
        if counts == base.counts:
            return base
        packed = gathered(routed.runs, counts)
        assert base.positions is not None
        places = torch.where(routed.runs, torch.arange(base.logical, device=routed.runs.device), -1)
        positions, gone = renumbered(base.positions, places, packed, base.valid, self.reindex)
        physical = packed.source.shape[1]
        return Group(
            index, base.logical, physical, counts, packed.valid, packed.source, packed.place, packed.source,
            tail=min(base.tail, physical), positions=positions, gone=gone,
        )  # fmt: skip

    def _attention_pre(self, index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple | None:
        if FACTORS not in kwargs:
            return None
        _RUNNING.factors[id(self), index] = kwargs[FACTORS]
        return args, {name: x for name, x in kwargs.items() if name != FACTORS}

    def _mlp_post(self, index: int, module: Any, args: tuple, output: Any) -> Any:
        weights = _RUNNING.factors.pop((id(self), index), None)
        if weights is None:
            return None
        weights = weights[..., None]
        if isinstance(output, tuple):
            return (output[0] * weights.to(output[0]), *output[1:])
        return output * weights.to(output)

    def _layer_post(self, index: int, module: Any, args: tuple, output: Any) -> Any:
        running = _RUNNING.now.pop((id(self), index), None)
        if running is None:
            return None
        hidden, routed, packed = running
        made = output[0] if isinstance(output, tuple) else output
        made = put_back(hidden, made, packed, routed.passing)
        return (made, *output[1:]) if isinstance(output, tuple) else made


def _plan_of(config: MixtureOfDepths) -> Any:
    """What a check of the runtime asks of a plan that drops tokens between layers."""
    return SimpleNamespace(layer_stages=(config,), exit_stages=())
