# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: its forms, and the tables of the tokens that are left."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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


def _leading(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The two halves of the first dimensions turn, as many as the tables have; the rest passes."""
    width = cos.shape[-1]
    return torch.cat([rotate(x[..., :width], cos, sin), x[..., width:]], -1)


def _narrow(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `_leading`, with tables that have each angle once."""
    return _leading(x, *(torch.cat([t, t], -1) for t in (cos, sin)))


def _paired(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours of the first dimensions turn together, by tables that have each angle twice in a row."""
    width = cos.shape[-1]
    some = x[..., :width].unflatten(-1, (-1, 2))
    turned = torch.stack([-some[..., 1], some[..., 0]], -1).flatten(-2)
    return torch.cat([some.flatten(-2) * cos[:, None] + turned * sin[:, None], x[..., width:]], -1)


def _paired_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours turn together, by tables whose halves are equal."""
    return _paired(x, *(t[..., : t.shape[-1] // 2].repeat_interleave(2, -1) for t in (cos, sin)))


def _paired_narrow(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Neighbours turn together, by tables that have each angle once."""
    return _paired(x, *(t.repeat_interleave(2, -1) for t in (cos, sin)))


def _still(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Nothing turns."""
    return x


Rotation: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
ROTATIONS: tuple[Rotation, ...] = (rotate, _leading, _paired, _paired_halves, _narrow, _paired_narrow, _still)
"""Forms of rotary embedding that a probe tries; each turns `x` [B, heads, S, d] by tables [B, S, ...]."""


def shifted(positions: Tensor, ledger: Ledger | None) -> Tensor:
    """Position ids less what earlier calls have taken from them in the layers of `ledger`."""
    if ledger is None or ledger.shift is None:
        return positions
    return positions - ledger.shift.to(positions.device)[:, None]


def rotary_tables(language_model: Any, hidden: Tensor, positions: Tensor, index: int = 0) -> Any:
    """What the rotary module makes of `positions` for layer `index`; some have tables for each type of layer."""
    rotary = language_model.rotary_emb
    if "layer_type" not in inspect.signature(type(rotary).forward).parameters:
        return rotary(hidden, positions)
    return rotary(hidden, positions, language_model.config.layer_types[index])


def layer_tables(
    language_model: Any, index: int, call: Call, group: Group, ledger: Ledger | None, hidden: Tensor, given: Tables
) -> Tables:
    """Rotary tables of the tokens of `group` in layer `index`, which has `ledger`; `given` are those of its first tokens."""
    first, before = call.groups[0], ledger_of(call.cache, 0)
    moved = ledger is not before and ledger is not None and before is not None and ledger.shift is not before.shift
    if group.gone is first.gone and not moved:
        if group.from_base is None:
            return given
        taken = (id(group), id(given[0]))
        if taken not in call.taken:  # with what it was taken from: an id lasts as long as what it names
            call.taken[taken] = group, given, tuple(take(given, group.from_base))
        return call.taken[taken][2]
    kinds = getattr(language_model.config, "layer_types", None)
    key = (id(group), id(ledger), hash(kinds[index] if kinds else None))
    if key not in call.tables:
        assert group.positions is not None
        positions = shifted(group.positions, ledger).to(hidden.device)
        call.tables[key] = rotary_tables(language_model, hidden, positions, index)
    return call.tables[key]
