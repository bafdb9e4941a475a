# SPDX-License-Identifier: Apache-2.0
"""Signals of the LLM layers around a cut, recomputed for just the rows that are needed.

Projections are called, never their weights used: LoRA, quantisation and offloading live in the call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..ops import attention_received, attention_rows
from ..ops.pagerank import attention_pagerank
from ..ops.transitions import transition, transition_value
from .cache import PrunedLayer, is_plain
from .call import Call
from .rotary import Tables, rotate


class LayerTap:
    """Keeps the input of one LLM attention module."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self.armed = False
        self.seen: tuple[Tensor, Tables] | None = None

    def install(self) -> list[RemovableHandle]:
        return [self.attention.register_forward_pre_hook(self._record, with_kwargs=True)]

    def _record(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.armed:
            self.seen = (_states(args, kwargs), kwargs["position_embeddings"])

    def clear(self) -> None:
        self.armed, self.seen = False, None


class TransitionTap:
    """Notes how much attention and MLP of one LLM layer change each token, as they do it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.armed = False
        self.seen: list[tuple[Tensor, Tensor]] = []
        self.entered: dict[str, Tensor] = {}

    def install(self) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = []
        for name, module in (("attention", self.layer.self_attn), ("mlp", self.layer.mlp)):
            before, after = functools.partial(self._before, name), functools.partial(self._after, name)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        return handles

    def _before(self, name: str, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.armed:
            self.entered[name] = _states(args, kwargs)

    @torch.no_grad()
    def _after(self, name: str, module: Any, args: tuple, output: Any) -> None:
        if self.armed:
            self.seen.append(transition(self.entered.pop(name), output[0] if isinstance(output, tuple) else output))

    def value(self, valid: Tensor | None, absolute: bool) -> Tensor:
        """Token transition variation of this layer, [B, S]."""
        return torch.stack([transition_value(*seen, valid, absolute) for seen in self.seen]).sum(0)

    def clear(self) -> None:
        self.armed, self.seen, self.entered = False, [], {}


def _states(args: tuple, kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "x"]


class Heads:
    """Queries and keys of one LLM attention module, for the tokens of a call and what its cache held before.

    hidden   [B, S, D]: what enters the module.
    valid    [B, S] bool or None; the last token of every row is its last prompt token (rows are right-aligned).
    index    number of its cache layer, and `ran`: whether the module has put the keys of this call there already.
    """

    def __init__(
        self, attention: Any, hidden: Tensor, tables: Tables, valid: Tensor | None, call: Call, index: int, ran: bool
    ) -> None:
        self.attention, self.hidden, self.valid = attention, hidden, valid
        batch = len(hidden)
        self.tables = tuple(t.expand(batch, -1, -1) for t in tables)
        self.call, self.index, self.ran = call, index, ran

    def _project(self, which: str, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys after norm and rotation, [B, heads, S, d]."""
        x = getattr(self.attention, f"{which}_proj")(hidden).unflatten(-1, (-1, self.attention.head_dim))
        norm = getattr(self.attention, f"{which}_norm", None)
        x = norm(x) if norm is not None else x
        return rotate(x.transpose(1, 2), cos, sin)

    def queries(self, rows: Tensor, at: Tensor) -> Tensor:
        """Queries of the tokens `at` [U, Q] of the batch rows `rows` [U, 1], [U, heads, Q, d]."""
        return self._project("q", *(t[rows, at] for t in (self.hidden, *self.tables)))

    @functools.cached_property
    def new_keys(self) -> Tensor:
        """Keys of this call, [B, kv_heads, S, d]; from the cache where they are there already."""
        length = self.hidden.shape[1]
        layer: Any = self._cache_layer
        if self.ran and layer is not None and is_plain(layer):
            stored = self._stored
            return layer.keys[:, :, stored - length : stored].to(self.hidden.device)
        return self._project("k", self.hidden, *self.tables)

    @functools.cached_property
    def keys(self) -> Tensor:
        """Keys of past and this call, [B, kv_heads, P + S, d]."""
        if not self.past:
            return self.new_keys
        layer: Any = self._cache_layer
        if not is_plain(layer):
            raise NotImplementedError(
                f"attention over a cache of type {type(layer).__name__} in a later turn: its keys are not stored as they are; use "
                f"a DynamicCache or a StaticCache"
            )
        return torch.cat([layer.keys[:, :, : self.past].to(self.new_keys), self.new_keys], 2)

    @functools.cached_property
    def visible(self) -> Tensor:
        """Which keys are real, [B, P + S]."""
        batch, length, _ = self.hidden.shape
        device = self.hidden.device
        new = (
            torch.ones(batch, length, dtype=torch.bool, device=device) if self.valid is None else self.valid.to(device)
        )
        if not self.past:
            return new
        layer = self._cache_layer
        known = layer.ledger.valid if isinstance(layer, PrunedLayer) else self.call.past_valid
        if known is None:
            known = torch.ones(1, 0, dtype=torch.bool)
        past = torch.cat([known, known.new_ones(known.shape[0], self.past - known.shape[1])], 1)
        return torch.cat([past.to(device).expand(batch, -1), new], 1)

    @property
    def _cache_layer(self) -> Any:
        return None if self.call.cache is None else self.call.cache.layers[self.index]

    @property
    def _stored(self) -> int:
        layer = self._cache_layer
        return int(layer.physical if isinstance(layer, PrunedLayer) else layer.get_seq_length())

    @functools.cached_property
    def past(self) -> int:
        """How many keys the cache held before this call."""
        if self.call.cache is None:
            return 0
        return self._stored - (self.hidden.shape[1] if self.ran else 0)

    def attention_of(self, rows: Tensor, at: Tensor) -> Tensor:
        """Causal softmax attention of the tokens `at` [U, Q] of the batch rows `rows` [U, 1] over everything before them, as
        far as it falls on tokens of this call: [U, heads, Q, S] float32."""
        rows, at = rows.to(self.hidden.device), at.to(self.hidden.device)
        place = torch.arange(self.keys.shape[2], device=at.device)
        mask = self.visible[rows[:, 0]][:, None, None] & (place <= at[:, None, :, None] + self.past)
        weights = attention_rows(self.queries(rows, at), self.keys[rows[:, 0]], self.attention.scaling, mask)
        return weights[..., self.past :]

    def square(self, signal: str) -> tuple[Tensor, Tensor]:
        """Queries and keys of all tokens, for signals that need every row."""
        if self.past:
            raise NotImplementedError(
                f"{signal} (fastv query='all', aim) in a later turn on a cache: start again from the whole prompt, or choose a "
                f"method that reads the last or the text tokens"
            )
        return self._project("q", self.hidden, *self.tables), self.keys


@dataclass
class Cut:
    """One cut, for a batch of rows with the same numbers of visual and of text tokens.

    rows    [U, 1]: rows of the batch; at [U, N], text [U, T]: places of their visual tokens and of their instruction.
    hidden  [B, S, D]: the residual stream at the cut; norm: the final norm of the language model.
    before, behind  the attention modules on both sides, made when asked for.
    """

    rows: Tensor
    at: Tensor
    text: Tensor
    hidden: Tensor
    norm: Any
    before: Callable[[], Heads]
    behind: Callable[[], Heads]
    transitions: Callable[[str, bool], Tensor]
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Signals from earlier in the call, of all tokens [B, S] or of rows."""

    def signal(self, name: str) -> Tensor:
        kind, _, where = name.partition("@")
        return SIGNALS[kind](self, where)

    def heads(self, where: str) -> Heads:
        return self.behind() if where == "next" else self.before()

    def _of(self, values: Tensor, at: Tensor) -> Tensor:
        """Values [B, S, ...] of the tokens `at` [U, N]."""
        return values[self.rows.to(values.device), at.to(values.device)]


def _last_attention(cut: Cut, where: str) -> Tensor:
    last = torch.full_like(cut.rows, cut.hidden.shape[1] - 1)
    weights = cut.heads(where).attention_of(cut.rows, last)
    return weights.mean(1)[:, 0].gather(1, cut.at.to(weights.device))


def _last_attention_heads(cut: Cut, where: str) -> Tensor:
    return _heads_on_visuals(cut, where, torch.full_like(cut.rows, cut.hidden.shape[1] - 1))


def _mean_attention(cut: Cut, where: str) -> Tensor:
    heads = cut.heads(where)
    q, k = heads.square("mean_attention")
    real = heads.visible
    received = attention_received(q, k, heads.attention.scaling, query_weight=real, key_mask=real, causal=True)
    return cut._of(received, cut.at)


def _pagerank(cut: Cut, where: str) -> Tensor:
    heads = cut.heads(where)
    q, k = heads.square("pagerank")
    return cut._of(attention_pagerank(q, k, heads.attention.scaling, heads.visible), cut.at)


def _text_attention_heads(cut: Cut, where: str) -> Tensor:
    return _heads_on_visuals(cut, where, cut.text)


def _heads_on_visuals(cut: Cut, where: str, at: Tensor) -> Tensor:
    """Attention of the tokens `at` [U, T] on the visual tokens, [U, heads, T, N]."""
    weights = cut.heads(where).attention_of(cut.rows, at)
    columns = cut.at.to(weights.device)[:, None, None].expand(*weights.shape[:3], -1)
    return weights.gather(3, columns)


def _text_attention(cut: Cut, where: str) -> Tensor:
    return _text_attention_heads(cut, where).mean(1)


def _key_norms(cut: Cut, where: str) -> Tensor:
    return cut._of(cut.heads(where).new_keys.float().abs().sum((1, 3)), cut.at)


def _text_key_norms(cut: Cut, where: str) -> Tensor:
    return cut._of(cut.heads(where).new_keys.float().abs().sum((1, 3)), cut.text)


def _rotary_gain(cut: Cut, where: str) -> Tensor:
    heads = cut.heads(where)
    cos, sin = (t.float() for t in heads.tables)
    ones = rotate(torch.ones_like(cos)[:, None], cos, sin)[:, 0]
    text, visual = cut._of(ones, cut.text), cut._of(ones, cut.at)
    return text @ visual.transpose(1, 2) * heads.attention.scaling


SIGNALS: dict[str, Callable[[Cut, str], Tensor]] = {
    "last_attention": _last_attention,
    "last_attention_heads": _last_attention_heads,
    "mean_attention": _mean_attention,
    "pagerank": _pagerank,
    "text_attention": _text_attention,
    "text_attention_heads": _text_attention_heads,
    "key_norms": _key_norms,
    "text_key_norms": _text_key_norms,
    "rotary_gain": _rotary_gain,
    "final_states": lambda cut, _: cut.norm(cut._of(cut.hidden, cut.at)),
    "text_final_states": lambda cut, _: cut.norm(cut._of(cut.hidden, cut.text)),
    "text_states": lambda cut, _: cut._of(cut.hidden, cut.text),
    "text_relevance": lambda cut, _: cut.kept["text_relevance"][cut.rows.to(cut.text.device), cut.text],
    "input_scores": lambda cut, _: cut._of(cut.kept["input_scores"], cut.at),
    "transitions": lambda cut, start: cut._of(cut.transitions(start, False), cut.at),
    "absolute_transitions": lambda cut, start: cut._of(cut.transitions(start, True), cut.at),
}
"""How each signal of a cut is made; see `Visuals` for what they are."""

CHANGES = frozenset({"transitions", "absolute_transitions"})
"""Those that add up what layers do to each token."""
AROUND = (
    frozenset(SIGNALS)
    - CHANGES
    - {"final_states", "text_final_states", "text_states", "text_relevance", "input_scores"}
)
"""Those that read an attention module: of the layer before the cut, with "@next" of the layer behind it."""
OF_TEXT = frozenset(
    {
        "text_attention",
        "text_attention_heads",
        "text_key_norms",
        "text_final_states",
        "text_states",
        "text_relevance",
        "rotary_gain",
    }
)
"""Those that need to know where the instruction is."""
