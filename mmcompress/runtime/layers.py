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

from ..ops import attention_received
from ..ops.attention import capped_rows
from ..ops.pagerank import attention_pagerank
from ..ops.transitions import transition, transition_value
from .cache import PrunedLayer, cache_of, is_plain, ledger_of
from .call import Call
from .masks import who_sees
from .mass import mass_of
from .probe import Form, recorded, states_of
from .rotary import Tables
from .scope import current
from .shards import whole


class LayerTap:
    """Keeps the input of one LLM attention module, in each call of `owner` that listens."""

    def __init__(self, owner: Any, attention: Any) -> None:
        self.owner, self.attention = owner, attention

    def install(self) -> list[RemovableHandle]:
        return [self.attention.register_forward_pre_hook(self._record, with_kwargs=True)]

    def _record(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        scope = current(self.owner)
        if scope is not None and scope.state.get(LISTENS):
            scope.state[self] = states_of(args, kwargs), kwargs["position_embeddings"], cache_of(kwargs)

    @property
    def seen(self) -> tuple[Tensor, Tables | None, Any]:
        """What came in this call, [B, S, D], its rotary tables and the cache where it put its keys, if any."""
        return _noted(self.owner, self, self.attention)


class TransitionTap:
    """Notes how much attention and MLP of one LLM layer change each token, as they do it, in each call of `owner` that listens."""

    def __init__(self, owner: Any, attention: Any, mlp: Any) -> None:
        self.owner, self.modules = owner, (attention, mlp)

    def install(self) -> list[RemovableHandle]:
        handles: list[RemovableHandle] = []
        for part, module in enumerate(self.modules):
            before, after = functools.partial(self._before, part), functools.partial(self._after, part)
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(module.register_forward_hook(after))
        return handles

    def _before(self, part: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        scope = current(self.owner)
        if scope is not None and scope.state.get(LISTENS):
            scope.state[self, part] = states_of(args, kwargs)

    @torch.no_grad()
    def _after(self, part: int, module: Any, args: tuple, output: Any) -> None:
        scope = current(self.owner)
        entered = None if scope is None else scope.state.pop((self, part), None)
        if scope is not None and entered is not None:
            left = output[0] if isinstance(output, tuple) else output
            scope.state.setdefault(self, {})[part] = transition(entered, left)

    def value(self, valid: Tensor | None, absolute: bool) -> Tensor:
        """Token transition variation of this layer, [B, S]."""
        seen = _noted(self.owner, self, self.modules[0])
        lengths, cosines = (torch.stack(parts) for parts in zip(*(seen[part] for part in sorted(seen)), strict=True))
        return transition_value(lengths, cosines, valid, absolute).sum(0)


LISTENS = "layer taps listen"
"""Whether the taps of a scope's owner record: its key in the scope's state."""


def _noted(owner: Any, tap: Any, module: Any) -> Any:
    scope = current(owner)
    found = None if scope is None else scope.state.get(tap)
    if found is None:
        raise RuntimeError(
            f"nothing came by {type(module).__name__}, which a stage of the plan reads: the module was replaced after compress(); "
            f"call mmcompress.compress again"
        )
    return found


class Heads:
    """Queries and keys of one LLM attention module, for the tokens of a call and what its cache held before.

    form       how the module makes them.
    hidden     [B, S, D]: what enters the module; tables: its rotary tables, [B or 1, S, d], None where it is given none.
    valid      [B, S] bool or None; the last token of every row is its last prompt token (rows are right-aligned).
    index      number of its cache layer, and `ran`: whether the module has put the keys of this call there already.
    positions  [..., B or 1, S], for modules that read them beside their tables; of several axes the first.
    cache      where the keys are; by default the cache that the call was given.
    """

    def __init__(
        self, form: Form, hidden: Tensor, tables: Tables | None, valid: Tensor | None, call: Call, index: int, ran: bool,
        positions: Tensor | None = None, cache: Any = None,
    ) -> None:  # fmt: skip
        self.form, self.hidden, self.valid, self._positions = form, hidden, valid, positions
        batch = len(hidden)
        self.tables = tuple(t if len(t) == batch else t.expand(batch, -1, -1) for t in tables or ())
        self.call, self.index, self.ran, self.cache = call, index, ran, call.cache if cache is None else cache
        self.sinks: Tensor | None = None
        """Logits of the module's attention sinks, once queries have been made."""

    @functools.cached_property
    def positions(self) -> Tensor | None:
        """[B, S], None where none are known."""
        if self._positions is None:
            return None
        positions = self._positions.to(self.hidden.device)
        positions = positions.flatten(0, -3)[0] if positions.dim() > 2 else positions
        return positions.expand(len(self.hidden), -1)

    def project(self, which: str, take: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """Queries, keys or values ("q", "k", "v") of the tokens that `take` picks from tensors [B, S, ...]: [B, heads, S, d]."""
        hidden, *tables = (take(x) for x in (self.hidden, *self.tables))
        with whole(self.form.root, self.form.attention):
            if self.form.plain:
                return self.form.project(which, hidden, tables)
            positions = None if self.positions is None else take(self.positions)
            handed = recorded(self.form.attention, hidden, tuple(tables) or None, positions)
        self.sinks = handed.sinks
        return getattr(handed, which)

    def queries(self, rows: Tensor, at: Tensor) -> Tensor:
        """Queries of the tokens `at` [U, Q] of the batch rows `rows` [U, 1], [U, heads, Q, d]."""
        return self.project("q", lambda x: x[rows, at])

    @functools.cached_property
    def new_keys(self) -> Tensor:
        """Keys of this call, [B, kv_heads, S, d]; from the cache where they are there already."""
        length = self.hidden.shape[1]
        layer: Any = self._cache_layer
        if self.ran and layer is not None and is_plain(layer):
            if not self.form.cached:
                return self._expanded[:, :, self.past :]
            stored = self._stored
            return layer.keys[:, :, stored - length : stored].to(self.hidden.device)
        return self.project("k")

    @functools.cached_property
    def keys(self) -> Tensor:
        """Keys of past and this call, [B, kv_heads, P + S, d]."""
        if not self.past:
            return self.new_keys
        layer: Any = self._cache_layer
        if getattr(layer, "is_sliding", False):
            raise NotImplementedError(
                "attention in a later turn of a layer that looks back only so far: its cache has let keys go; start again from the "
                "whole prompt"
            )
        if not is_plain(layer):
            raise NotImplementedError(
                f"attention over a cache of type {type(layer).__name__} in a later turn: its keys are not stored as they are; use "
                f"a DynamicCache or a StaticCache"
            )
        if not self.form.cached:
            return self._expanded
        return torch.cat([layer.keys[:, :, : self.past].to(self.new_keys), self.new_keys], 2)

    @functools.cached_property
    def _expanded(self) -> Tensor:
        """Keys of past and this call as the module itself makes them of what its cache holds."""
        last = slice(-1, None) if self.ran else slice(None)  # what is stored is read whatever comes
        positions = None if self.positions is None else self.positions[:, last]
        hidden, *tables = (x[:, last] for x in (self.hidden, *self.tables))
        with whole(self.form.root, self.form.attention):
            stored = _Stored(self._cache_layer, self._stored, self.ran)
            return recorded(self.form.attention, hidden, tuple(tables) or None, positions, stored).k

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
    def real(self) -> Tensor | None:
        """`visible`; None: all are."""
        return None if self.valid is None and not self.past else self.visible

    @property
    def _cache_layer(self) -> Any:
        return None if self.cache is None else self.cache.layers[self.index]

    @property
    def _stored(self) -> int:
        return self.past + (self.hidden.shape[1] if self.ran else 0)

    @functools.cached_property
    def past(self) -> int:
        """How many keys the cache held before this call."""
        ledger = ledger_of(self.call.cache, self.index)
        return int(self.call.past) - (0 if ledger is None else ledger.dropped)

    def attention_of(self, rows: Tensor, at: Tensor, last: bool = False) -> Tensor:
        """Causal softmax attention of the tokens `at` [U, Q] of the batch rows `rows` [U, 1] over everything before them, as
        far as it falls on tokens of this call: [U, heads, Q, S] float32. `last`: they are the last ones, which see all that is
        there."""
        rows, at = rows.to(self.hidden.device), at.to(self.hidden.device)
        sees = who_sees(self.call, self.index, at.device)
        if last and sees is None and self.valid is None and not self.past and self.bias is None:
            return self.rows(self.queries(rows, at), self._of_rows(self.keys, rows), None)
        if sees is None:
            place, last_seen = torch.arange(self.keys.shape[2], device=at.device), at[:, None, :, None]
            mask = place <= (last_seen + self.past if self.past else last_seen)
        else:
            mask = sees[rows[:, 0], ..., : self.keys.shape[2]].take_along_dim(at[:, None, :, None], 2)
        if self.real is not None:
            mask = self._of_rows(self.real, rows)[:, None, None] & mask
        bias = None if self.bias is None else self.bias[rows[:, 0]][:, None, None]
        weights = self.rows(self.queries(rows, at), self._of_rows(self.keys, rows), mask, bias)
        return weights[..., self.past :] if self.past else weights

    @staticmethod
    def _of_rows(x: Tensor, rows: Tensor) -> Tensor:
        """The rows `rows` [U, 1] of x [B, ...]."""
        return x if len(rows) == len(x) == 1 else x[rows[:, 0]]

    @property
    def bias(self) -> Tensor | None:
        """What the masses of the keys add to their logits, [B, P + S]; None: nothing."""
        if not self.call.groups:  # a prompt that is asked before anything is merged
            return None
        return mass_of(self.call, self.call.group_of(self.index), self.index, self.past, self.hidden.device)

    def rows(self, q: Tensor, k: Tensor, mask: Tensor | None, bias: Tensor | None = None) -> Tensor:
        """Attention of queries that were just made on keys, [n, heads, Q, K] float32."""
        return capped_rows(q, k, self.form.scaling, mask, self.form.softcap, self.sinks, bias)

    def square(self, signal: str) -> tuple[Tensor, Tensor]:
        """Queries and keys of all tokens, for signals that need every row."""
        if self.call.ready is not None:
            raise NotImplementedError(
                f"{signal} (fastv query='all', aim) under a ready-made mask, by which some tokens see later ones: choose a "
                f"method that reads the last or the text tokens"
            )
        if self.bias is not None:
            raise NotImplementedError(
                f"{signal} (fastv query='all', aim) behind merged tokens that weigh what they stand for: choose a method that "
                f"reads the last or the text tokens, or plan(..., mass=False)"
            )
        if self.past:
            raise NotImplementedError(
                f"{signal} (fastv query='all', aim) in a later turn on a cache: start again from the whole prompt, or choose a "
                f"method that reads the last or the text tokens"
            )
        return self.project("q"), self.keys


class _Stored:
    """What a cache layer holds, read only: stands for the cache of a module that is asked once more."""

    def __init__(self, layer: Any, length: int, ran: bool) -> None:
        self.layer, self.length, self.ran = layer, length, ran

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        held = (x[:, :, : self.length].to(keys.device) for x in (self.layer.keys, self.layer.values))
        return tuple(held if self.ran else (torch.cat(pair, 2) for pair in zip(held, (keys, values), strict=True)))


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
    weights = _of_last(cut, where)
    return weights.mean(1)[:, 0].gather(1, cut.at.to(weights.device))


def _last_attention_heads(cut: Cut, where: str) -> Tensor:
    return _on_visuals(cut, _of_last(cut, where))


def _of_last(cut: Cut, where: str) -> Tensor:
    """Attention of the last token, [U, heads, 1, S]."""
    return cut.heads(where).attention_of(cut.rows, torch.full_like(cut.rows, cut.hidden.shape[1] - 1), last=True)


def _mean_attention(cut: Cut, where: str) -> Tensor:
    heads = cut.heads(where)
    q, k = heads.square("mean_attention")
    real = heads.real
    received = attention_received(q, k, heads.form.scaling, query_weight=real, key_mask=real, causal=True)
    return cut._of(received, cut.at)


def _pagerank(cut: Cut, where: str) -> Tensor:
    heads = cut.heads(where)
    q, k = heads.square("pagerank")
    return cut._of(attention_pagerank(q, k, heads.form.scaling, heads.real), cut.at)


def _text_attention_heads(cut: Cut, where: str) -> Tensor:
    return _on_visuals(cut, cut.heads(where).attention_of(cut.rows, cut.text))


def _on_visuals(cut: Cut, weights: Tensor) -> Tensor:
    """Of attention [U, heads, T, S] what falls on the visual tokens, [U, heads, T, N]."""
    columns = cut.at.to(weights.device)[:, None, None].expand(*weights.shape[:3], -1)
    return weights.gather(3, columns)


def _text_attention(cut: Cut, where: str) -> Tensor:
    weights = cut.heads(where).attention_of(cut.rows, cut.text).mean(1)
    return weights.gather(2, cut.at.to(weights.device)[:, None].expand(-1, weights.shape[1], -1))


def _key_norms(cut: Cut, where: str) -> Tensor:
    return cut._of(cut.heads(where).new_keys.float().abs().sum((1, 3)), cut.at)


def _text_key_norms(cut: Cut, where: str) -> Tensor:
    return cut._of(cut.heads(where).new_keys.float().abs().sum((1, 3)), cut.text)


def _rotary_gain(cut: Cut, where: str) -> Tensor:
    heads = cut.heads(where)
    tables = tuple(t.float() for t in heads.tables)
    rotation, keys = heads.form.rotation, heads.new_keys
    assert rotation is not None
    ones = torch.ones_like(keys[:, 0], dtype=torch.float)
    if tables:
        ones = rotation(ones[:, None], *tables)[:, 0]
    text, visual = cut._of(ones, cut.text), cut._of(ones, cut.at)
    return text @ visual.transpose(1, 2) * heads.form.scaling


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
WANTS = {"mean_attention": ("simple", "boundless"), "pagerank": ("simple", "boundless"), "rotary_gain": ("rotation",)}
"""What a signal needs the form of the module to have."""
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
