# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding in the half-split form."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from .cache import Ledger, ledger_of
from .call import Call
from .packing import Group, take

Tables: TypeAlias = "tuple[Tensor, ...]"
"""Cosines and sines of the rotary embedding, [B or 1, S, d] each."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn `x` [B, heads, S, d] by tables [B, S, d]."""
    half = x.shape[-1] // 2
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * cos[:, None] + turned * sin[:, None]


def shifted(positions: Tensor, ledger: Ledger | None) -> Tensor:
    """Position ids less what earlier calls have taken from them in the layers of `ledger`."""
    if ledger is None or ledger.shift is None:
        return positions
    return positions - ledger.shift.to(positions.device)[:, None]


def layer_tables(rotary: Any, call: Call, group: Group, ledger: Ledger | None, hidden: Tensor, given: Tables) -> Tables:
    """Rotary tables of the tokens of `group` in a layer with `ledger`; `given` are those of the first layer, `rotary` the module of
    the language model that makes them."""
    first, before = call.groups[0], ledger_of(call.cache, 0)
    moved = ledger is not before and ledger is not None and before is not None and ledger.shift is not before.shift
    if group.gone is first.gone and not moved:
        return given if group.from_base is None else tuple(take(given, group.from_base))
    key = (id(group), id(ledger))
    if key not in call.tables:
        assert group.positions is not None
        positions = shifted(group.positions, ledger).to(hidden.device)
        call.tables[key] = rotary(hidden, positions)
    return call.tables[key]
