# SPDX-License-Identifier: Apache-2.0
"""Mass: a merged token weighs in attention as much as the tokens that it stands for.

The logarithm of their number is added to the logit of its key, in every attention layer and for every query: what s equal tokens
at one place would get, one token of mass s gets. Masses lie in the group of a call and in the ledger of a cache layer, and come to
a layer in one of two ways: in its mask, or, where an attention function takes none, in more channels of its keys (see `channel`).
Layers that carry a state instead of attending (linear attention, convolutions) see every token once.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from .cache import PrunedLayer, ledger_of
from .call import Call
from .channel import BIAS
from .masks import mask_of
from .packing import Group
from .windows import Columns, columns_of, cuts_off, in_sight, spread, with_new

TAKE = ("sdpa", "eager", "flex_attention")
"""Attention implementations that take a mask of numbers."""
ALIGNED = 8


def takes_mask(config: Any) -> bool:
    """Whether the attention of a language model takes a mask of numbers."""
    return "mask" in ways(getattr(config, "_attn_implementation", None))


def ways(attention: str | None) -> tuple[str, ...]:
    """How masses can come to an attention implementation, "mask" or "channel"; the first is the default."""
    if attention in (None, *TAKE):
        return ("mask", "channel") if attention == "sdpa" else ("mask",)
    return ("channel",)


def way_of(config: Any, asked: bool | str | None) -> str:
    """The way for a language model; raises NotImplementedError where it does not go in the one that is `asked` for."""
    attention = getattr(config, "_attn_implementation", None)
    possible = ways(attention)
    if isinstance(asked, str) and asked not in possible:
        raise NotImplementedError(
            f"mass={asked!r}: attn_implementation={attention!r} takes masses in the way {possible[0]!r}, which mass=True chooses"
        )
    return asked if isinstance(asked, str) else possible[0]


def weighs(call: Call, group: Group, index: int) -> bool:
    """Whether any key that layer `index` attends to has another mass than one."""
    ledger = ledger_of(call.cache, index)
    return group.mass is not None or (ledger is not None and ledger.mass is not None)


def has_masses(cache: Cache | None) -> bool:
    """Whether any token of a cache has another mass than one."""
    layers: list[Any] = [] if cache is None else cache.layers
    return any(layer.ledger.mass is not None for layer in layers if getattr(layer, "leads", False))


def is_step(call: Call, length: int) -> bool:
    """Whether a call of `length` new tokens is a step of decoding in which one query per row sees all that is real in a cache that
    grows: what masses add is then a part of a row that each ledger has already."""
    if length != 1 or call.encoded or call.ready is not None or any(call.windows) or call.cache is None:
        return False
    return not any(getattr(layer, "is_compileable", False) for layer in call.cache.layers)


def row_of(call: Call, index: int, dtype: torch.dtype) -> Tensor | None:
    """What layer `index` adds to the logits of its keys in a step (see `is_step`), [B, 1, 1, K]; None: nothing."""
    assert call.cache is not None
    layers: list[Any] = call.cache.layers
    layer = layers[index] if index < len(layers) and isinstance(layers[index], PrunedLayer) else None
    if layer is None:  # of layers that share keys
        layer = next(layer for layer in layers if isinstance(layer, PrunedLayer))
    return None if layer.ledger.mass is None else layer.ledger.step(layer.physical + 1, dtype)


def weigh(
    kwargs: dict[str, Any], config: Any, wide: bool, call: Call, group: Group, index: int, hidden: Tensor
) -> None:
    """Put the masses of the keys of layer `index` into its keywords. hidden [B, M, H]; wide: by channels, where nothing else
    needs a mask."""
    if call.step:
        row = row_of(call, index, hidden.dtype)
        if row is not None:
            kwargs["attention_mask" if takes_mask(config) else BIAS] = row
            return
    by_mask = takes_mask(config)
    if hidden.shape[1] > 1 and (wide or not by_mask):
        mask = mask_of(config, call, group, index, hidden)
        if not by_mask or mask is None:
            kwargs["attention_mask"] = mask
            kwargs[BIAS] = _once(call, group, index, -2, lambda: bias_of(call, group, index, hidden.device))
            return
    kwargs["attention_mask" if by_mask else BIAS] = weighed_mask(config, call, group, index, hidden)


def _once(call: Call, group: Group, index: int, what: int, make: Any) -> Tensor:
    """What layers with the same keys share."""
    window = call.windows.index(call.windows[index]) if call.windows and cuts_off(call, index, group.logical) else -1
    entry = 0 if call.ready is None else id(call.ready)
    key = (id(group), id(ledger_of(call.cache, index)), window, entry, what)
    if key not in call.masks:
        call.masks[key] = group, make()
    return call.masks[key][1]


def bias_of(call: Call, group: Group, index: int, device: torch.device, columns: Columns | None = None) -> Tensor:
    """Logarithms of the masses of the keys of layer `index`, which is about to run, [B, 1, 1, K] float32; `columns`: those keys."""
    ledger, columns = ledger_of(call.cache, index), columns or columns_of(call, group, index, device)
    number = columns.number

    def before() -> Tensor:
        return spread(None if ledger is None else ledger.mass, number, torch.ones_like(number, dtype=torch.float32))

    mass = before() if group.mass is None else with_new(number, columns.past, before, group.mass)
    return mass.log()[:, None, None]


def weighed_mask(config: Any, call: Call, group: Group, index: int, hidden: Tensor) -> Tensor:
    """The mask of layer `index` with the masses of its keys, [B, heads or 1, M, K]: added to the logits of `hidden` [B, M, H]."""
    return _once(call, group, index, -1, lambda: _weighed(config, call, group, index, hidden))


def _weighed(config: Any, call: Call, group: Group, index: int, hidden: Tensor) -> Tensor:
    columns = columns_of(call, group, index, hidden.device)
    bias = bias_of(call, group, index, hidden.device, columns).to(hidden.dtype)
    fits = config._attn_implementation in ("sdpa", "eager") or call.ready is not None
    seen = mask_of(config, call, group, index, hidden) if fits else None
    if seen is None:
        seen = in_sight(call, group, index, columns)[:, None]
    made = torch.where(seen, bias, torch.finfo(hidden.dtype).min) if seen.dtype == torch.bool else seen + bias
    keys = made.shape[3]  # kernels want rows to begin at multiples, and would copy the mask in every layer
    if keys % ALIGNED:
        made = F.pad(made, (0, -keys % ALIGNED))[..., :keys]
    return made.expand(call.batch, -1, -1, -1)


def mass_of(call: Call, group: Group, index: int, past: int, device: torch.device) -> Tensor | None:
    """Logarithms of the masses of the `past` keys that layer `index` held before the call and of those of the call, [B, past + M];
    None where all are 0."""
    if not weighs(call, group, index):
        return None
    ledger = ledger_of(call.cache, index)
    known = None if ledger is None else ledger.mass
    before = torch.ones(call.batch, past, device=device)
    if known is not None:
        before[:, : known.shape[1]] = known[:, :past].to(device)
    new = torch.ones(call.batch, group.physical, device=device) if group.mass is None else group.mass.to(device)
    return torch.cat([before, new], 1).log()
