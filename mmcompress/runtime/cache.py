# SPDX-License-Identifier: Apache-2.0
"""KV-cache layers that know that some tokens were dropped.

A layer has two lengths. Logical: the tokens that the caller has fed, which `generate` counts (`get_seq_length`).
Physical: the rows that are really stored. Mask builders are told (physical + new, dropped), which is the contract of a
sliding-window layer: `dropped` tokens are gone from the front. The layers of a cache are replaced in place, so that the
user's cache object keeps its identity, and all state lives in the cache: several conversations can be open at once.

A cache stands on its own. It pickles, and a model that is not compressed reads it right where a mask of logical width says
all that there is to say; elsewhere its layers raise.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.masking_utils import create_causal_mask

from .scope import running

if TYPE_CHECKING:
    from .packing import Group

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""What transformers calls a cache in keywords and on outputs: "cache" from 5.24 on."""


GROWTH = 256
"""How many tokens a row of masks has room for more; a multiple of what attention kernels align."""


@dataclass(eq=False)
class Ledger:
    """What consecutive layers that hold the same tokens have dropped. Constant while decoding: nothing here counts
    steps, so that a compiled decode step is not compiled again.

    dropped  logical minus physical length.
    valid    [B, P] bool for the first P physical rows, later ones are valid; None: all are.
    floor    logical position behind the last dropped token; the cache cannot be cropped below it.
    shift    [B] int64: what position ids are ahead of those in use (stages that reindex); None: nothing.
    mass     [B, P] float32: how many tokens each of the first P physical rows stands for, later ones one each; None: all one.
    place    [B, P] logical place of the first P physical rows, ascending, -1 in padding; later ones follow on; None: nothing was
             dropped.
    bound    why a model that is not compressed would read the layers wrong; "": it reads them right.
    """

    dropped: int = 0
    valid: Tensor | None = None
    floor: int = 0
    shift: Tensor | None = None
    place: Tensor | None = None
    bound: str = ""
    mass: Tensor | None = None
    row: Tensor | None = None
    """What `step` has made so far."""

    def step(self, keys: int, dtype: torch.dtype) -> Tensor:
        """What a query behind all of the first `keys` rows adds to its logits, [B, 1, 1, keys]: the logarithms of masses, and the
        least number for padding. A part of a longer row that is made once: later tokens are real and weigh one."""
        assert self.mass is not None
        if self.row is None or self.row.shape[3] < keys or self.row.dtype != dtype:
            row = self.mass.new_zeros(len(self.mass), 1, 1, (keys // GROWTH + 1) * GROWTH, dtype=dtype)
            row[:, 0, 0, : self.mass.shape[1]] = self.mass.log()
            if self.valid is not None:
                hidden = row[:, 0, 0, : self.valid.shape[1]]
                hidden.masked_fill_(~self.valid.to(row.device), torch.finfo(dtype).min)
            self.row = row
        return self.row[..., :keys]

    def places(self, stored: int, batch: int, device: Any) -> Tensor:
        """Logical place of all `stored` physical rows, [batch, stored]."""
        known = torch.empty(batch, 0, dtype=torch.int64) if self.place is None else self.place[:, :stored]
        more = torch.arange(known.shape[1], stored, device=device) + self.dropped
        return torch.cat([known.to(device), more.expand(batch, -1)], 1)

    def rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to everything that has one row per sequence of the batch."""
        self.valid = change(self.valid) if self.valid is not None else None
        self.shift = change(self.shift) if self.shift is not None else None
        self.place = change(self.place) if self.place is not None else None
        self.mass, self.row = change(self.mass) if self.mass is not None else None, None

    def clear(self) -> None:
        self.dropped, self.floor, self.bound = 0, 0, ""
        self.valid = self.shift = self.place = self.mass = self.row = None


class PrunedLayer:
    """Mixed into the class of a cache layer. One layer of those that share a ledger `leads`: it alone changes the
    ledger when rows of the batch are reordered, repeated or selected."""

    _layer_type = None  # keeps the class out of transformers' registries of layer types
    ledger: Ledger
    leads: bool
    state: dict[str, Tensor]
    """What stages that rewrite attention noted in this layer, by name; one row per sequence of the batch."""

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply `change` to everything that has one row per sequence of the batch."""
        self.state = {name: change(values) for name, values in self.state.items()}
        if self.leads:
            self.ledger.rows(change)

    def __reduce__(self) -> Any:
        return _blank, (_stock_class(self),), self.__dict__  # the class is made when it is needed, in every process

    @property
    def physical(self) -> Any:
        return super().get_seq_length()  # type: ignore[misc]

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._check()
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def _check(self) -> None:
        """Refuse a model that would read this layer wrong."""
        if self.ledger.bound and not running():
            raise RuntimeError(
                f"this cache was made by a compressed model, and the one that reads it is not compressed: {self.ledger.bound}. "
                f"Call mmcompress.compress(model, plan) again before its next turn, or start again from the prompt without a cache"
            )

    def get_seq_length(self) -> Any:
        return super().get_seq_length() + self.ledger.dropped  # type: ignore[misc]

    def get_mask_sizes(self, query_length: int) -> tuple[Any, Any]:
        if not self.is_compileable:  # type: ignore[attr-defined]  # else generate() may ask before the model runs
            self._check()  # before any layer has changed its state
        if _stock_class(self).get_mask_sizes is DynamicLayer.get_mask_sizes:  # by the length, which is logical here
            return self.physical + query_length, self.ledger.dropped
        length, offset = super().get_mask_sizes(query_length)  # type: ignore[misc]
        return length, offset + self.ledger.dropped

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._rows(lambda t: t[indices.to(t.device)])

    def crop(self, max_length: int) -> None:
        if max_length > 0:  # 5.17: an absolute logical length
            max_length = min(0, max_length - int(self.get_seq_length()))
        if max_length and self.get_seq_length() + max_length < self.ledger.floor:
            raise ValueError(
                f"cannot crop a compressed cache to {self.get_seq_length() + max_length} tokens: some of the first "
                f"{self.ledger.floor} were dropped; start again from the prompt"
            )
        dropped = self.ledger.dropped
        self.ledger.dropped = 0  # the stock class compares its window with what it was given
        try:
            super().crop(max_length)  # type: ignore[misc]
        finally:
            self.ledger.dropped = dropped
        self.state = {name: values[:, : self.physical] for name, values in self.state.items()}
        if self.ledger.valid is not None:
            self.ledger.valid = self.ledger.valid[:, : self.physical]
        if self.ledger.mass is not None:
            self.ledger.mass = self.ledger.mass[:, : self.physical]
        self.ledger.row = None

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.state = {}
        if self.leads:
            self.ledger.clear()


@functools.cache
def _pruned_class(cls: type) -> type:
    made: Any = type(f"Pruned{cls.__name__}", (PrunedLayer, cls), {})
    made._layer_type = getattr(
        cls, "_layer_type", None
    )  # by which a model finds its own; after the fact: it is not registered
    return made


def _blank(cls: type) -> Any:
    """A pruned layer of class `cls`, still without any state."""
    made: Any = _pruned_class(cls)
    return made.__new__(made)


def _stock_class(layer: Any) -> Any:
    """The class that a cache layer has in transformers."""
    return type(layer).__bases__[1] if isinstance(layer, PrunedLayer) else type(layer)


def cache_of(given: Any) -> Any:
    """The cache among the keywords of a call, or on an output; None if there is none."""
    return given.get(CACHE) if type(given) is dict else getattr(given, CACHE, None)


def is_pruned(cache: Cache | None) -> bool:
    """Whether tokens of a cache were dropped, by its first attention layer: all of them change together."""
    for layer in () if cache is None else cache.layers:
        if isinstance(layer, CacheLayerMixin):
            return isinstance(layer, PrunedLayer)
    return False


def is_plain(layer: Any) -> bool:
    """Whether `layer.keys` holds all keys as they are (a quantised cache has only the newest there)."""
    return _stock_class(layer).update in (DynamicLayer.update, StaticLayer.update)


def ledger_of(cache: Cache | None, index: int) -> Ledger | None:
    """The ledger that speaks for layer `index`; recurrent layers have none and follow the first attention layer."""
    if cache is None:
        return None
    layer = cache.layers[index] if index < len(cache.layers) else None
    if not isinstance(layer, PrunedLayer):
        if not is_pruned(cache):
            return None
        layer = next(other for other in cache.layers if isinstance(other, PrunedLayer))
    return layer.ledger


STATES = ("conv_states", "recurrent_states")
"""Tensors of a cache that are as large for any number of tokens."""


HOLDERS = (Tensor, dict, tuple, list)


@dataclass(frozen=True)
class Held:
    """Bytes of a cache in use: keys and values `now`, and `full`, had nothing been dropped; `states` of recurrent layers."""

    now: int = 0
    full: int = 0
    states: int = 0


def held_bytes(cache: Cache | None, fed: int | None = None) -> Held:
    """What a cache holds, from its tensors. Of a static one, the part that is filled; without `fed`, how many tokens all calls have
    passed, that waits for the device."""
    now = full = states = 0
    layers: list[Any] = [] if cache is None else cache.layers
    for layer in layers:
        whole = 0
        for name, value in layer.__dict__.items():
            if name in STATES:
                states += _bytes(value)
            elif isinstance(value, HOLDERS) and name not in ("ledger", "state"):
                whole += _bytes(value)
        stored, logical = _lengths(layer, fed)
        if not stored:
            continue
        if isinstance(layer, StaticLayer):
            most = layer.max_cache_len
            columns, stored, logical = most, min(stored, most), min(logical, most) if layer.is_sliding else logical
        elif layer.is_sliding:
            gone, rows = logical - stored, (layer.keys, getattr(layer, "prefill_keys", None))
            columns = stored = sum(x.shape[-2] for x in rows if x is not None and x.dim() > 1)
            logical = max(stored, min(logical, reach(layer, logical) + (gone if rows[1] is not None else 0)))
        else:
            columns = stored
        now += whole * stored // columns
        full += whole * logical // columns
    return Held(now, full, states)


def lengths(cache: Cache, layers: int) -> list[tuple[int, int]]:
    """Of each of the model's `layers`, how many tokens its cache layer will give to a new one, and how many it would, had nothing
    been dropped; 0 for states."""
    found = [cache.layers[i] if i < len(cache.layers) else None for i in range(layers)]
    return [tuple(min(n, reach(layer, n)) for n in _lengths(layer)) for layer in found]  # type: ignore[misc]


def reach(layer: Any, most: int) -> int:
    """How many tokens a cache layer keeps for those to come, of `most` or more."""
    if not getattr(layer, "is_sliding", False):
        return most
    size = layer.max_cache_len if isinstance(layer, StaticLayer) else layer.sliding_window
    return size - 1 + (getattr(layer, "prefill_length", None) or 0)  # some keep their first call for ever


def _lengths(layer: Any, fed: int | None = None) -> tuple[int, int]:
    """How many tokens a cache layer holds, and how many it was passed."""
    if not isinstance(layer, CacheLayerMixin):
        return 0, 0
    logical = int(layer.get_seq_length()) if fed is None or not isinstance(layer, StaticLayer) else fed
    return logical - (layer.ledger.dropped if isinstance(layer, PrunedLayer) else 0), logical


def _bytes(value: Any) -> int:
    """Of all tensors in `value`, however they are packed; numbers and empty ones count nothing."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
            return sum(_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.itemsize if value.dim() else 0
    if isinstance(value, dict):
        return sum(map(_bytes, value.values()))
    return sum(map(_bytes, value)) if isinstance(value, (tuple, list)) else 0


def book(
    cache: Cache,
    group_of: Callable[[int], Group],
    past_valid: Tensor | None,
    batch: int,
    hidden: int = 0,
    windowed: bool = False,
    fed: int | None = None,
) -> None:
    """Write down, after a forward pass that dropped or padded tokens, what each layer now holds.

    group_of(i): the tokens of this call that layer i received. past_valid [B, P]: validity of what an unpruned cache held
    before. hidden: how many tokens of the call there are up to the last one that the caller's mask hides in any row.
    windowed: whether the model has layers that look back only so far. fed: how many tokens all calls have passed; without it the
    layers are asked, and a static one waits for the device.
    """
    books: dict[tuple[int, int], Ledger] = {}
    shifts: dict[tuple[int, int], Tensor | None] = {}
    previous: list[Ledger | None] = []  # keeps old ledgers alive, so that ids stay unique
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, CacheLayerMixin):
            continue  # the state of linear attention has no length
        group = group_of(i)
        old = layer.ledger if isinstance(layer, PrunedLayer) else None
        previous.append(old)
        key = (id(old), id(group))
        leads = key not in books
        if leads:
            if fed is None:
                stored = int(layer.physical if isinstance(layer, PrunedLayer) else layer.get_seq_length())
            else:
                stored = fed - group.logical - (old.dropped if old is not None else 0) + group.physical
            before = old.shift if old is not None else None
            pair = (id(before), id(group.gone))
            if pair not in shifts:  # layers that are shifted alike share the tensor, and so rotary tables
                shifts[pair] = before if group.gone is None else group.gone if before is None else before + group.gone
            books[key] = _updated(old or Ledger(valid=past_valid), group, stored, batch, shifts[pair], hidden)
        if old is None:  # same state, new type: assigning __class__ fails where the object layouts differ
            pruned = _blank(type(layer))
            pruned.__dict__.update(layer.__dict__, state={})
            cache.layers[i] = layer = pruned
        layer.ledger, layer.leads = books[key], leads  # type: ignore[attr-defined]
    if len(books) > 1:
        for ledger in books.values():
            ledger.bound = "its layers hold different tokens"
    for ledger in books.values():
        if windowed and ledger.dropped:
            ledger.bound = ledger.bound or "its windows count tokens that were dropped"


def _updated(old: Ledger, group: Group, stored: int, batch: int, shift: Tensor | None, hidden: int) -> Ledger:
    """The ledger after `group`; `stored` rows are in the layer, this call's included."""
    new = Ledger(old.dropped, old.valid, old.floor, shift, old.place, old.bound, old.mass)
    if old.valid is not None or group.valid is not None:
        device = (group.valid if group.valid is not None else old.valid).device  # type: ignore[union-attr]

        def ones(count: int) -> Tensor:
            return torch.ones(batch, count, dtype=torch.bool, device=device)

        past = old.valid.to(device) if old.valid is not None else ones(0)
        past = torch.cat([past, ones(stored - group.physical - past.shape[1])], 1) if stored > group.physical else past
        new.valid = past if group.valid is None else torch.cat([past, group.valid], 1) if past.shape[1] else group.valid
    gone = group.logical - group.physical
    fed = stored - group.physical + old.dropped
    if gone:
        assert group.place is not None
        new.place = group.place
        if fed:
            before = old.places(stored - group.physical, batch, group.place.device)
            new.place = torch.cat([before, (group.place + fed).masked_fill(group.place < 0, -1)], 1)
        new.floor = fed + group.logical - group.tail
        new.dropped = old.dropped + gone
    if group.mass is not None:
        new.mass = group.mass
        if stored > group.physical:
            past = torch.ones(batch, stored - group.physical, device=group.mass.device)
            if old.mass is not None:
                past[:, : old.mass.shape[1]] = old.mass.to(past)
            new.mass = torch.cat([past, group.mass], 1)
    if new.mass is not None:
        new.bound = "its tokens weigh what they stand for"
    elif new.shift is not None:
        new.bound = "its position ids are numbered anew"
    elif new.dropped and (new.valid is not None or (hidden and fed + hidden > new.dropped)):
        new.bound = "there is padding among its tokens"
    return new
