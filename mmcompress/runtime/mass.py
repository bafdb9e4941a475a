# SPDX-License-Identifier: Apache-2.0
"""Mass: a merged token weighs in attention as much as the tokens that it stands for.

The logarithm of their number is added to the logit of its key, in every attention layer and for every query: what s equal tokens
at one place would get, one token of mass s gets. Masses lie in the group of a call and in the ledger of a cache layer, and come to
a layer in its mask, the one thing that all attention implementations but flash take from outside. Layers that carry a state instead
of attending (linear attention, convolutions) see every token once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cache import ledger_of
from .call import Call
from .masks import mask_of
from .packing import Group
from .windows import columns_of, cuts_off, in_sight, spread, with_new

TAKE = ("sdpa", "eager", "flex_attention")
"""Attention implementations that take a mask of numbers."""


def weighs(call: Call, group: Group, index: int) -> bool:
    """Whether any key that layer `index` attends to has another mass than one."""
    ledger = ledger_of(call.cache, index)
    return group.mass is not None or (ledger is not None and ledger.mass is not None)


def weighed_mask(config: Any, call: Call, group: Group, index: int, hidden: Tensor) -> Tensor:
    """The mask of layer `index` with the masses of its keys, [B, heads or 1, M, K]: added to the logits of `hidden` [B, M, H]."""
    ledger = ledger_of(call.cache, index)
    window = call.windows.index(call.windows[index]) if call.windows and cuts_off(call, index, group.logical) else -1
    entry = 0 if call.ready is None else id(call.ready)
    key = (id(group), id(ledger), window, entry, -1)
    if key not in call.masks:
        call.masks[key] = group, _weighed(config, call, group, index, hidden)
    return call.masks[key][1]


def _weighed(config: Any, call: Call, group: Group, index: int, hidden: Tensor) -> Tensor:
    ledger, columns = ledger_of(call.cache, index), columns_of(call, group, index, hidden.device)
    number = columns.number
    mass = spread(None if ledger is None else ledger.mass, number, torch.ones_like(number, dtype=torch.float32))
    if group.mass is not None:
        mass = with_new(number, columns.past, mass, group.mass)
    bias = mass.log().to(hidden.dtype)[:, None, None]
    seen = (
        None
        if config._attn_implementation == "flex_attention" and call.ready is None
        else mask_of(config, call, group, index, hidden)
    )
    if seen is None:
        seen = in_sight(call, group, index, columns)[:, None]
    if seen.dtype != torch.bool:
        return seen + bias
    return torch.where(seen, bias, torch.finfo(hidden.dtype).min).expand(call.batch, -1, -1, -1)


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
