# SPDX-License-Identifier: Apache-2.0
"""Layers that look only so far: sliding windows.

Distances are those of places in the prompt as the caller gave it, dropped tokens counted, whatever numbers the position ids have.
So a compressed layer sees what the stock layer sees, less the tokens that are gone, and ready-made masks, decoding and later
turns mean the same. The other reading, to count kept tokens, would be the stock model on a shorter prompt. It reaches farther
back than the stock layer, so the model is less itself: on a small one trained with windows (48 tokens, in 4 of 6 layers; 144 per
picture, half and a quarter kept by divprune and random, 140 questions), the KL divergence of the first word of the answer from
that without compression is 0.77 for kept tokens and 0.38 for places, with positions kept (numbered anew: 0.83 and 0.44), and 73 %
and 80 % of the words are the same. More of the answers are right with kept tokens (78 and 68 %): what was cut off helps there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .cache import PrunedLayer, ledger_of, reach
from .call import Call
from .packing import Group

SLIDING = frozenset({"sliding_attention", "hybrid_sliding"})


@dataclass(frozen=True)
class Window:
    """How far the queries of a layer look: a query sees itself and the `size` - 1 places before it; with `both` (in encoders),
    `size` places to both sides."""

    size: int
    both: bool = False

    def reaches(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Whether queries at places [B, M] are near enough to keys at places [B, K], [B, M, K]."""
        distance = queries[:, :, None] - keys[:, None]
        return distance.abs() <= self.size if self.both else distance < self.size


def windows_of(config: Any, both: bool = False) -> tuple[Window | None, ...]:
    """The window of each layer of a language model, None where all is seen; by what transformers makes masks and caches from.
    Without types of layers a model has one window for all. both: its tokens see those behind them."""
    size = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * getattr(config, "num_hidden_layers", 0)
    return tuple(Window(size, both) if size and kind in SLIDING else None for kind in kinds)


def window_of(call: Call, index: int) -> Window | None:
    """The window of layer `index`."""
    return call.windows[index] if call.windows else None


def cuts_off(call: Call, index: int, length: int) -> bool:
    """Whether the window of layer `index` may hide anything from the `length` tokens that the caller passed. True for static
    caches, which are not waited for."""
    window = window_of(call, index)
    if window is None:
        return False
    return isinstance(call.past, Tensor) or call.past + length > window.size


@dataclass(frozen=True)
class Columns:
    """The keys that a layer attends to in a call, K of them, as its cache has them and before it has taken in the M new ones.

    number  [K] of each among all that were ever put there.
    past    how many of these were there before the call.
    place   [B or 1, K] in the prompt; real [B or 1, K]: which are no padding.
    """

    number: Tensor
    past: Any
    place: Tensor
    real: Tensor | None


def columns_of(call: Call, group: Group, index: int, device: torch.device) -> Columns:
    """The keys of layer `index`, which is about to run, or of a layer with the same window that will give it its keys."""
    ledger, layer = ledger_of(call.cache, index), _cached(call, index)
    dropped, past, first, width = ledger.dropped if ledger is not None else 0, 0, 0, group.physical
    if layer is not None:
        past = layer.physical if isinstance(layer, PrunedLayer) else layer.get_seq_length()
        width, first = layer.get_mask_sizes(group.physical)
        first = first - (dropped if isinstance(layer, PrunedLayer) else 0)
    number = torch.arange(width, device=device)
    if isinstance(first, Tensor) or first:
        number = number + first
    valid = ledger.valid if ledger is not None else call.past_valid

    def place_before() -> Tensor:
        return spread(None if ledger is None else ledger.place, number, number + dropped if dropped else number)

    def real_before() -> Tensor:
        return spread(valid, number, torch.ones_like(number, dtype=torch.bool))

    if group.place is None:
        place = place_before()
    else:
        new = group.place.to(device)
        place = with_new(
            number, past, place_before, new if isinstance(call.past, int) and not call.past else new + call.past
        )
    real = None
    if group.valid is not None:
        real = with_new(number, past, real_before, group.valid)
    elif valid is not None:
        real = real_before()
    return Columns(number, past, place, real)


def with_new(number: Tensor, past: Any, before: Callable[[], Tensor], new: Tensor) -> Tensor:
    """Values `before` () -> [B or 1, K] of the keys `number` [K], with `new` [B, M] for those from `past` on: [B, K]."""
    if not isinstance(past, Tensor) and not past and len(number) == new.shape[1]:  # there are no others
        return new.to(number.device)
    at = (number - past).clamp(0, new.shape[1] - 1)
    return torch.where(number >= past, new.to(number.device)[:, at], before())


def spread(known: Tensor | None, number: Tensor, later: Tensor) -> Tensor:
    """Values [B, P] of the first P keys at those of `number` [K], and `later` [K] for the others: [B or 1, K]."""
    if known is None or not known.shape[1]:
        return later[None]
    known = known.to(number.device)
    return torch.where(number < known.shape[1], known[:, number.clamp(max=known.shape[1] - 1)], later)


def _cached(call: Call, index: int) -> Any:
    """The cache layer that has the keys of layer `index`; of layers that share keys with others, one with the same window."""
    layers = call.cache.layers if call.cache is not None else []
    if index >= len(layers):
        return None  # made when it runs
    alike = [i for i in range(len(layers)) if call.windows[i : i + 1] == (window_of(call, index),)]
    return next((layers[i] for i in (index, *alike) if isinstance(layers[i], CacheLayerMixin)), None)


def outside(call: Call, index: int, fed: int) -> int:
    """How many of the `fed` tokens of earlier calls the cache of layer `index` has let go, since no window reaches them."""
    return max(fed - reach(_cached(call, index), fed), 0)


def reached(call: Call, group: Group, index: int, columns: Columns) -> Tensor:
    """Which keys are near enough to each new token, [B or 1, M, K]."""
    window, device = window_of(call, index), columns.number.device
    assert window is not None
    place = torch.arange(group.logical, device=device)[None] if group.place is None else group.place.to(device)
    return window.reaches(place + call.past, columns.place)


def in_sight(call: Call, group: Group, index: int, columns: Columns) -> Tensor:
    """Which keys each new token sees where nothing is ready-made: real ones, not behind it, and near enough; [B or 1, M, K]."""
    seen, window = None if columns.real is None else columns.real[:, None], window_of(call, index)
    if window is None or not window.both:
        row = torch.arange(group.physical, device=columns.number.device)[:, None]
        row = row if type(columns.past) is int and not columns.past else row + columns.past
        before = (columns.number <= row)[None]
        seen = before if seen is None else seen & before
    if seen is None:
        seen = torch.ones(1, 1, len(columns.number), dtype=torch.bool, device=columns.number.device)
    return seen & reached(call, group, index, columns) if cuts_off(call, index, group.logical) else seen


def window_mask(config: Any, call: Call, group: Group, index: int, hidden: Tensor) -> Tensor:
    """The mask of a layer with a window where nothing else hides a token, [B, 1, M, K], in the form that its attention takes."""
    seen = in_sight(call, group, index, columns_of(call, group, index, hidden.device))
    return as_given(config, seen.expand(call.batch, -1, -1)[:, None], hidden.dtype)


def as_given(config: Any, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of bool in the form that the attention of the model takes."""
    if config._attn_implementation != "eager":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
