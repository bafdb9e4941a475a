# SPDX-License-Identifier: Apache-2.0
"""How the attention modules of a language model work, found by trying: nothing is known by a model's name.

Signals and attention stages make queries, keys and rows of attention once more. At `compress` each module that a plan will ask
is run on a few random tokens, and what we make is compared with what it makes. Two ways lead to its queries and keys: "plain",
its projections, norms and rotation called one by one for just what is needed; and "recorded", its own forward up to the
attention function, which is exact for every form.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..ops.attention import capped_rows
from .adapter import Block
from .cache import CACHE
from .channel import BIAS, Wide
from .hooks import running
from .rotary import ROTATIONS, Rotation, Tables, rotary_tables, rotate
from .shards import whole
from .twin import As, twin
from .windows import Window, windows_of

RECORD = "mmcompress_record"
"""Name of our attention function; only copies of modules, made for one call, have it in their config."""
HEAR = "mmcompress_hear"
"""Name of another, which lets the module go on; on such copies only, too."""
TOKENS = 12
"""How many random tokens a module is tried on."""
MODEST = 4.0
"""Logits that the random tokens should not exceed, so that half precision tells forms apart."""


@dataclass(frozen=True, eq=False)
class Handed:
    """What an attention module hands to its attention function: q [B, heads, S, d], k [B, kv_heads, S, d], v [B, kv_heads, S, dv].

    sinks [heads] or None. others: names of further tensors, which we know nothing about.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scaling: float
    softcap: float | None
    sinks: Tensor | None
    window: Any
    others: tuple[str, ...]


class _Stop(Exception):
    """Ends the forward pass of a copy with what was wanted of it."""

    def __init__(self, found: Any) -> None:
        self.found = found


def _record(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **given: Any) -> None:
    scaling, others = given.get("scaling"), {n for n, x in given.items() if isinstance(x, Tensor)}
    raise _Stop(
        Handed(
            query, key, value, query.shape[-1] ** -0.5 if scaling is None else float(scaling), given.get("softcap"),
            given.get("s_aux"), given.get("sliding_window"), tuple(sorted(others - {"s_aux", "position_ids"})),
        )
    )  # fmt: skip


ALL_ATTENTION_FUNCTIONS.register(RECORD, _record)


@dataclass(frozen=True, eq=False)
class Heard:
    """One call of an attention function: q, k [n, heads, T, d], the keys once for every query head; mask [n or 1, 1, T or 1, T],
    bool or added, or None; scale."""

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float


def _hear(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any) -> Any:
    scaling, shared = given.get("scaling"), query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    module.heard.append(Heard(query, key.repeat_interleave(shared, 1), attention_mask, scale))
    return query.new_zeros(len(query), query.shape[2], query.shape[1], value.shape[-1]), None


ALL_ATTENTION_FUNCTIONS.register(HEAR, _hear)


def _forward(module: Any, like: Any, hidden: Tensor, **given: Any) -> Any:
    """The forward of `like`'s class on `module`, with those of the keywords that it takes."""
    forward = type(like).forward
    parameters = inspect.signature(forward).parameters
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        given = {name: x for name, x in given.items() if name in parameters}
    return forward(module, hidden, **given)


def _attend(
    attention: Any, config: Any, hidden: Tensor, tables: Tables | None, mask: Any, positions: Any, cache: Any,
    more: Mapping[str, Any] | None = None, **changes: Any,
) -> Any:  # fmt: skip
    other = twin(attention, config=config, **changes)
    given = {
        "position_embeddings": tables,
        "attention_mask": mask,
        "position_ids": positions,
        CACHE: cache,
        **(more or {}),
    }
    if "shared_kv_states" in inspect.signature(type(attention).forward).parameters:
        given["shared_kv_states"] = {}  # for later layers
    return _forward(other, attention, hidden, **given)


@torch.compiler.disable
def recorded(
    attention: Any, hidden: Tensor, tables: Tables | None, positions: Tensor | None = None, cache: Any = None
) -> Handed:
    """What `attention` hands to its attention function for `hidden` [B, S, D]; nothing behind that runs.

    positions [B or 1, S]: for modules that read them. cache: something with the `update` of a cache. Threads do not meet: the copy
    that runs is made for the call. Raises LookupError if the module ends without one.
    """
    try:
        _attend(attention, As(attention.config, RECORD), hidden, tables, None, positions, cache)
    except _Stop as stop:
        return stop.found
    raise LookupError("it does not call an attention function of transformers")


@torch.compiler.disable
def heard(attention: Any, args: tuple, kwargs: dict[str, Any]) -> list[Heard]:
    """What an attention module hands to its attention function for the arguments of a call: one part after the other, where it
    attends within parts. Costs its projections. Raises LookupError if it calls neither an attention function of transformers nor
    that of torch."""
    found: list[Heard] = []
    config = {"config": As(attention.config, HEAR)} if hasattr(attention, "config") else {"fused_attn": True}  # timm's
    other = twin(attention, **config, heard=found)
    with torch.no_grad(), _Hearing(other):
        type(attention).forward(other, *args, **kwargs)
    if not found:
        raise LookupError(f"{type(attention).__name__} calls no attention function of transformers or torch")
    return found


class _Hearing(TorchFunctionMode):
    """Meanwhile torch's own attention function tells what it is given."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v, mask = (*args, None)[:4]
        given = {"scaling": (kwargs or {}).get("scale")}
        return _hear(self.module, q, k, v, (kwargs or {}).get("attn_mask", mask), **given)[0].transpose(1, 2)


@torch.no_grad()
def plainly_rotated(block: Block) -> bool:
    """Whether an attention module that is given rotary tables and segments hands on what its projections make, turned by `rotate`:
    tried on a few random tokens. False where that cannot be tried, and where tables of fewer dimensions would do."""
    attention = running(block.attention)
    device, taken = _device(attention), inspect.signature(type(attention).forward).parameters
    if device.type == "meta" or not {"position_embeddings", "cu_seqlens"} <= set(taken):
        return False
    size, dtype = (norm := next(block.first.parameters())).shape[-1], norm.dtype
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, size, generator=generator).to(device, dtype)
    angles = torch.randn(TOKENS, block.width or size // block.heads, generator=generator).to(device)
    tables, bounds = (angles.cos(), angles.sin()), torch.tensor([0, TOKENS], dtype=torch.int32, device=device)

    def hear(tables: Tables) -> list[Heard]:
        return heard(attention, (hidden,), {"cu_seqlens": bounds, "position_embeddings": tables})

    made: dict[str, Tensor] = {}
    handles = block.tap(made.__setitem__)
    parts = _tried(lambda: hear(tables))
    for handle in handles:
        handle.remove()
    if parts is None or len(parts) > 1 or _tried(lambda: hear(tuple(t[:, ::2] for t in tables))) is not None:
        return False
    turned = (rotate(made[n].float().transpose(-3, -2)[None], *(t[None] for t in tables)).to(dtype) for n in "qk")
    return parts[0].scale == block.scale and all(map(_close, turned, (parts[0].q, parts[0].k)))


@dataclass(frozen=True, eq=False)
class Form:
    """How the attention module of one decoder layer works.

    plain    whether q and k are `{q,k}_proj`, an optional `{q,k}_norm` per head, and `rotation`, and v is `v_proj`.
    rotation what the rotary tables do to a query or key; None: none of ROTATIONS.
    cached   whether a cache holds the keys and values as they are handed to the attention function.
    norm     name of the child of the layer whose output enters attention, "" where the residual stream does; None: neither.
    out      name of the child of the attention module that gives its output from the heads, side by side; None: there is none.
    boundless  whether a query may see everything before it.
    """

    root: nn.Module
    layer: nn.Module
    name: str
    plain: bool = True
    rotation: Rotation | None = rotate
    scaling: float = 1.0
    softcap: float | None = None
    sinks: bool = False
    cached: bool = True
    norm: str | None = "input_layernorm"
    out: str | None = "o_proj"
    boundless: bool = True

    @property
    def attention(self) -> Any:
        return running(getattr(self.layer, self.name))

    @property
    def simple(self) -> bool:
        """Whether rows are softmax(q k^T scaling) and nothing else."""
        return self.softcap is None and not self.sinks

    def project(self, which: str, hidden: Tensor, tables: Sequence[Tensor]) -> Tensor:
        """The plain way: "q", "k" or "v" of `hidden` [B, S, D], [B, heads, S, d]; nothing turns without tables."""
        x = getattr(self.attention, f"{which}_proj")(hidden).unflatten(-1, (-1, self.attention.head_dim))
        norm = getattr(self.attention, f"{which}_norm", None)
        x = (norm(x) if norm is not None else x).transpose(1, 2)
        assert self.rotation is not None
        return x if which == "v" or not tables else self.rotation(x, *tables)

    def entering(self, stream: Tensor) -> Tensor:
        """What enters the attention module where `stream` enters the layer."""
        assert self.norm is not None
        if not self.norm:
            return stream
        norm = getattr(self.layer, self.norm)
        with whole(self.root, norm):
            return norm(stream)

    def mix(self, heads: Tensor) -> Tensor:
        """The output of the attention module from that of its heads side by side, [B, S, heads * dv]."""
        assert self.out is not None
        with whole(self.root, self.attention):
            return getattr(self.attention, self.out)(heads)


class Forms:
    """Forms of the attention modules of one language model; each is probed when it is asked for first."""

    def __init__(self, language_model: Any, root: nn.Module | None = None) -> None:
        self.language_model, self.root = language_model, language_model if root is None else root
        self.found: dict[int, Form] = {}
        self.windows = windows_of(language_model.config)

    def of(self, index: int, asked: object, *wants: str) -> Form:
        """The form of layer `index`. `asked`: who wants it; `wants`: attributes of it that must not be None or False. Raises
        NotImplementedError with what differs."""
        if index not in self.found:
            try:
                form, real = self._probed(running(self.language_model.layers[index]))
            except (LookupError, ValueError) as error:
                raise self._refusal(index, asked, str(error)) from error
            if not real:
                return form
            self.found[index] = form
        for want in wants:
            if getattr(self.found[index], want) in (None, False):
                raise self._refusal(index, asked, UNFIT[want])
        return self.found[index]

    def _refusal(self, index: int, asked: object, reason: str) -> NotImplementedError:
        kind = self.kind_of(index)[0].__name__
        return NotImplementedError(
            f"{asked!s} makes attention of layer {index} of the language model ({kind}) once more, which was compared with the "
            f"module's own: {reason}. Choose a method that acts before the language model"
        )

    def kind_of(self, index: int) -> tuple[type, Any]:
        """What attends in layer `index`, and what its config calls the layer."""
        layer = running(self.language_model.layers[index])
        kinds = getattr(self.language_model.config, "layer_types", None)
        return type(getattr(layer, attention_name(layer) or "", layer)), kinds[index] if kinds else None

    def check_wide(self, index: int, asked: object, implementation: str) -> None:
        """Raise NotImplementedError unless layer `index` with a bias in more channels (see `channel`) gives what its eager
        attention gives with a mask; parameters without values (meta) are not tried."""
        try:
            self._tried(running(self.language_model.layers[index]), lambda probe: probe.check_wide(implementation))
        except (LookupError, ValueError) as error:
            raise NotImplementedError(
                f"{asked!s}: in layer {index} of the language model ({self.kind_of(index)[0].__name__}) merged tokens that weigh "
                f"what they stand for do not come to attn_implementation={implementation!r}: {error}. Load the model with 'sdpa' "
                f"or 'eager', or use plan(..., mass=False)"
            ) from error

    def _probed(self, layer: Any) -> tuple[Form, bool]:
        """Its form, and whether that was tried: parameters without values (meta) give the usual form, untried."""
        form = self._tried(layer, lambda probe: probe.form())
        if form is None:
            name = attention_name(layer) or ""
            attention = running(getattr(layer, name))
            width = getattr(attention, "head_dim", 1)
            scaling = getattr(attention, "scaling", width**-0.5)
            return Form(
                self.root, layer, name, scaling=scaling, boundless=window_at(self.windows, attention) is None
            ), False
        return form, True

    def _tried(self, layer: Any, use: Callable[[_Probe], Any]) -> Any:
        """What `use` makes of a layer on a few random tokens; None where its parameters have no values (meta)."""
        name = attention_name(layer)
        if name is None:
            raise ValueError("the layer has no attention module, or several")
        attention = running(getattr(layer, name))
        device = _device(attention)
        if device.type == "meta":
            return None
        with torch.no_grad(), torch.autocast(device.type, enabled=False), whole(self.root, layer), _still(layer):
            try:
                window = window_at(self.windows, attention)
                return use(_Probe(self.root, layer, name, self.language_model, device, window))
            except (LookupError, ValueError):
                raise
            except Exception as error:  # of modules that we do not know
                raise ValueError(f"it cannot be run by itself ({type(error).__name__}: {error})") from error


UNFIT = {
    "simple": "it caps its logits or has sinks, and statistics of all rows are made from plain logits",
    "boundless": "it looks back only so far (a sliding window or chunks)",
    "rotation": "its rotary embedding is of no form that we know",
    "cached": "its cache holds neither keys nor values as they are (latent attention)",
    "norm": "what enters it is not one norm of the residual stream",
    "out": "its output is not a projection of its heads",
}
"""Why a form is not enough, by the attribute that is wanted."""


def window_at(windows: Sequence[Window | None], attention: Any) -> Window | None:
    """That of the layer of an attention module."""
    return windows[attention.layer_idx] if attention.layer_idx < len(windows) else None


def attention_name(layer: Any) -> str | None:
    """The child of a decoder layer that writes to the cache, and so knows the number of its layer. None: none or several do."""
    found = {name: child for name, child in running(layer).named_children() if hasattr(child, "layer_idx")}
    if len(found) > 1:
        found = {n: child for n, child in found.items() if CACHE in inspect.signature(type(child).forward).parameters}
    return next(iter(found)) if len(found) == 1 else None


def attention_in(layer: Any, asked: object) -> Any:
    """The attention module of a decoder layer; raises NotImplementedError if there is none."""
    name = attention_name(layer)
    if name is None:
        raise NotImplementedError(f"{asked!s}: {type(layer).__name__} has no attention module, or several")
    return running(getattr(running(layer), name))


def mlp_in(layer: Any, asked: object) -> Any:
    """The child beside the attention module that has matrices; raises NotImplementedError unless there is one."""
    rest = [child for name, child in running(layer).named_children() if name != attention_name(layer)]
    found = [child for child in rest if any(p.dim() > 1 for p in child.parameters())]
    if len(found) != 1:
        raise NotImplementedError(
            f"{asked!s} reads how attention and MLP change each token, and {type(layer).__name__} has {len(found)} modules "
            f"beside its attention"
        )
    return found[0]


def final_norm(language_model: Any, asked: object) -> Any:
    """The norm behind the last layer; raises NotImplementedError unless one child can only be that."""
    found = [
        child
        for child in language_model.children()
        if not isinstance(child, nn.Embedding | nn.ModuleList | nn.Dropout | nn.Identity)
        and next(child.children(), None) is None
        and not any(True for _ in child.buffers())
        and all(p.dim() == 1 for p in child.parameters())
    ]
    if len(found) != 1:
        raise NotImplementedError(
            f"{asked!s} reads tokens behind the final norm of the language model; {type(language_model).__name__} has "
            f"{len(found)} modules that may be that"
        )
    return found[0]


def _device(module: nn.Module) -> torch.device:
    """Where a module computes; of one that accelerate has offloaded, where its hooks bring it."""
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            return parameter.device
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    brought = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in brought if device is not None), "meta"))


@contextmanager
def _still(module: nn.Module) -> Iterator[None]:
    """Without dropout meanwhile."""
    training = [m for m in module.modules() if m.training]
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _close(a: Any, b: Tensor, loose: float = 1.0) -> bool:
    """Whether `a` is `b` but for rounding; of lists, one after the other."""
    if not isinstance(a, Tensor) or a.shape != b.shape:
        return False
    rounding = max(1e-5, 4 * torch.finfo(b.dtype).eps) * loose
    a, b = a.to(b.device).double(), b.double()
    return bool(((a - b).abs().amax() <= rounding * b.abs().amax()).item())


def _tried(make: Callable[[], Any]) -> Any:
    """What `make` gives, None where it fails: a guess that does not fit may fail anyhow."""
    try:
        return make()
    except Exception:
        return None


class _Written:
    """Stands for a cache and keeps what is written to it."""

    def __init__(self) -> None:
        self.seen: tuple[Any, ...] = ()

    def update(self, *states: Any, **_: Any) -> tuple[Any, Any]:
        self.seen = states[:2]
        return states[0], states[1]


class _Door(nn.Module):
    """Stands for an attention module and gives what comes to it."""

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise _Stop(states_of(args, kwargs))


class _Spy(nn.Module):
    """Stands for a norm and keeps what it is given and makes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.called = (module,)  # in a tuple: not a child, so it keeps its name
        self.given: Any = None
        self.made: Any = None

    def forward(self, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.given, self.made = states, self.called[0](states, *args, **kwargs)
        return self.made


def states_of(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module is given."""
    return args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "x"]


class _Probe:
    """One layer on a few random tokens."""

    def __init__(
        self, root: nn.Module, layer: Any, name: str, language_model: Any, device: torch.device, window: Window | None
    ) -> None:
        self.root, self.layer, self.name, self.attention = root, layer, name, running(getattr(layer, name))
        self.window = window
        config = language_model.config
        self.stream = torch.randn(1, TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(0))
        self.stream = self.stream.to(device, language_model.dtype)
        longest = max(getattr(config, "max_position_embeddings", None) or 4096, TOKENS)
        self.tables = self._tables(language_model, 5 * torch.arange(TOKENS, device=device))
        self.positions = torch.linspace(0, longest - 1, TOKENS, device=device).long()[None]
        """For modules that read them: also large ones."""
        self.mask = torch.ones(TOKENS, TOKENS, dtype=torch.bool, device=device).tril()[None, None]

    def _tables(self, model: Any, positions: Tensor) -> Tables:
        """Rotary tables of the tokens; the module may want positions of three or four axes."""
        for shape in ((1, TOKENS), (3, 1, TOKENS), (4, 1, TOKENS)):
            made = _tried(
                functools.partial(rotary_tables, model, self.stream, positions.expand(shape), self.attention.layer_idx)
            )
            if isinstance(made, tuple) and all(t.dim() == 3 and t.shape[:2] == (1, TOKENS) for t in made):
                return made
        raise ValueError(f"{type(model.rotary_emb).__name__} does not make cosines and sines [B, S, d] from positions")

    def _handed(self, tables: Tables | None = None, cache: Any = None) -> Handed:
        return recorded(self.attention, self.stream, tables or self.tables, self.positions, cache)

    def form(self) -> Form:
        handed = self._handed()
        if handed.window is not None and (self.window is None or self.window.size != handed.window):
            raise ValueError(f"it has a sliding window of {handed.window} tokens, of which its config does not tell")
        if handed.others:
            raise ValueError(f"it hands {', '.join(handed.others)} to its attention function, which we do not know")
        most = self._largest(handed)
        if most > MODEST:
            self.stream = self.stream * (MODEST / most) ** 0.5
            handed = self._handed()
        weights, output = self._compare_rows(handed)
        rotation = self._rotation(handed)
        written = _Written()
        kept = _tried(lambda: self._handed(cache=written))
        cached = kept is not None and all(_close(a, b) for a, b in zip(written.seen, (kept.k, kept.v), strict=True))
        form = Form(
            self.root, self.layer, self.name, False, rotation, handed.scaling, handed.softcap, handed.sinks is not None,
            cached, self._norm(), self._out(weights, handed.v, output), self.window is None,
        )  # fmt: skip
        plain = form.simple and all(
            _close(_tried(functools.partial(form.project, which, self.stream, self.tables)), getattr(handed, which))
            for which in "qkv"
        )
        return Form(**{**form.__dict__, "plain": plain})

    @staticmethod
    def _largest(handed: Handed) -> float:
        """The largest logit."""
        grouped = handed.q.float().unflatten(1, (handed.k.shape[1], -1)).flatten(2, 3)
        return (grouped @ handed.k.float().transpose(2, 3) * handed.scaling).abs().max().item()

    def _compare_rows(self, handed: Handed) -> tuple[Tensor, Tensor]:
        """Our rows of attention, and the output of the module; raises unless its own rows are the same."""
        output, own = self._eager(self.positions)
        if own is None:
            raise ValueError("its eager attention does not return its weights, so nothing can be compared")
        rows = capped_rows(handed.q, handed.k, handed.scaling, self.mask, handed.softcap, handed.sinks)
        if not _close(rows.to(own), own, loose=4.0):
            gap = (rows.to(own) - own).abs().max().item() if rows.shape == own.shape else float("nan")
            raise ValueError(f"its weights differ from softmax(q k^T * {handed.scaling:.4g}) by up to {gap:.2g}")
        return rows, output

    def _eager(self, positions: Any, bias: Tensor | float = 0.0) -> tuple[Tensor, Tensor | None]:
        """Output and weights of the module's own eager attention, with a bias on its keys."""
        mask = torch.zeros(self.mask.shape, dtype=self.stream.dtype, device=self.mask.device) + bias
        mask = mask.masked_fill(~self.mask, torch.finfo(mask.dtype).min)
        given = (As(self.attention.config, "eager"), self.stream, self.tables, mask, positions, None)
        return _attend(self.attention, *given, training=False)[:2]

    def check_wide(self, implementation: str) -> None:
        """Raise ValueError unless the attention function `implementation`, with a bias in more channels, gives what eager attention
        gives with it in its mask."""
        handed = self._handed()
        if handed.softcap is not None:
            raise ValueError(
                f"it caps its logits at {handed.softcap:g}, and what is added in channels would be capped too"
            )
        most = self._largest(handed)
        if most > MODEST:
            self.stream = self.stream * (MODEST / most) ** 0.5
        # flash attention would take positions with gaps for several sequences
        positions = self.positions if implementation == "sdpa" else None
        bias = torch.linspace(0, MODEST, TOKENS, device=self.stream.device)[None, None, None]
        expected = self._eager(positions, bias.to(self.stream.dtype))[0]
        config = Wide(self.attention.config)
        given = (config, self.stream, self.tables, None, positions, None, {BIAS: bias})
        made = _attend(self.attention, *given, training=False)[0]
        if not _close(made, expected, loose=4.0):
            gap = (made - expected).abs().max().item()
            raise ValueError(
                f"with a bias on its keys its output differs from that of eager attention by up to {gap:.2g}"
            )

    def _rotation(self, handed: Handed) -> Rotation | None:
        cos, sin = self.tables
        straight = self._handed((torch.ones_like(cos), torch.zeros_like(sin)))
        for rotation in ROTATIONS:
            pairs = ((straight.q, handed.q), (straight.k, handed.k))
            if all(_close(_tried(functools.partial(rotation, x, cos, sin)), y) for x, y in pairs):
                return rotation
        return None

    def _norm(self) -> str | None:
        """The child of the layer whose output for the stream is what comes to attention."""
        spies = {name: _Spy(child) for name, child in self.layer.named_children() if name != self.name}
        door = twin(self.layer, _modules={**spies, self.name: _Door()})
        given = {
            "position_embeddings": self.tables,
            "attention_mask": None,
            "position_ids": self.positions,
            CACHE: None,
        }
        try:
            _forward(door, self.layer, self.stream, **given, use_cache=False)
            return None
        except _Stop as stop:
            came = stop.found
        except Exception:  # of layers that we do not know
            return None
        if came is self.stream:
            return ""
        return next((name for name, spy in spies.items() if spy.given is self.stream and spy.made is came), None)

    def _out(self, weights: Tensor, v: Tensor, output: Tensor) -> str | None:
        """The child of the attention module that makes its output of the mixed values."""
        values = v.repeat_interleave(weights.shape[1] // v.shape[1], 1)
        heads = (weights.to(values) @ values).transpose(1, 2).flatten(2)
        children = self.attention.named_children()
        return next(
            (name for name, child in children if _close(_tried(functools.partial(child, heads)), output, loose=4.0)),
            None,
        )
