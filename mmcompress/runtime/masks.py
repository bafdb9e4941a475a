# SPDX-License-Identifier: Apache-2.0
"""Attention masks of calls whose layers hold fewer tokens than the caller believes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from .cache import CACHE, PrunedLayer, is_pruned, ledger_of
from .call import Call
from .packing import Group


def validity(call: Call, mask: Any, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Which of the `length` new tokens are real, and which of the past in an unpruned cache, [B, ...] bool or None for all.

    From whatever mask the caller gave. A decode step on a pruned cache is always real: no mask is read, nothing waits.
    """
    pruned = is_pruned(call.cache)
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if mask is None or (pruned and length == 1):
        return None, None
    if mask.dim() == 4:  # static caches: generate() has made the full mask already
        if pruned:
            return None, None
        row = mask[:, 0, -1]
        row = row if row.dtype == torch.bool else row == 0
        new, past = row[:, call.past : call.past + length], row[:, : call.past]
    else:
        new, past = mask[:, -length:].bool(), mask[:, :-length].bool()
    if pruned or not past.shape[1] or bool(past.all()):
        return new, None
    return new, past


def logical_mask(call: Call, group: Group, layer: int, device: torch.device) -> Tensor | None:
    """2-D mask of logical width for a layer: [zeros for what its cache dropped | what it holds | the new tokens].

    None where all are real, except without a cache: with neither mask nor cache, transformers takes gaps in position ids
    for packed sequences.
    """
    ledger = ledger_of(call.cache, layer)
    past = ledger.valid if ledger is not None else call.past_valid

    def ones(count: int) -> Tensor:
        return torch.ones(call.batch, count, dtype=torch.bool, device=device)

    if past is None and group.valid is None:
        return None if call.cache is not None else ones(group.physical)
    dropped = ledger.dropped if ledger is not None else 0
    if ledger is not None and group.valid is None:  # a static layer tells its width without waiting for its length
        assert call.cache is not None
        cached: Any = call.cache.layers[layer]
        if not isinstance(cached, PrunedLayer):
            cached = next(other for other in call.cache.layers if isinstance(other, PrunedLayer))
        length = cached.get_mask_sizes(group.physical)[0]
    else:
        length = int(call.past) - dropped + group.physical
    past = past.to(device) if past is not None else ones(0)
    new = group.valid.to(device) if group.valid is not None else ones(0)
    between = length - past.shape[1] - new.shape[1]  # decoded tokens, all real
    return torch.cat([~ones(dropped), past, ones(between), new], 1)


def layers_differ(call: Call, length: int, attention: str | None) -> bool:
    """Whether layers need masks or rotary tables of their own in a call that drops nothing: not if all share one ledger, and
    no mask for a single query without padding, except where `attention` is "eager", which always gets one."""
    assert call.cache is not None
    leaders: list[Any] = [layer for layer in call.cache.layers if getattr(layer, "leads", False)]
    if len(leaders) == 1:
        return False
    first = leaders[0].ledger.shift
    return (length > 1 or attention == "eager") or any(
        leader.ledger.shift is not first or leader.ledger.valid is not None or leader.is_compileable
        for leader in leaders
    )


def layer_mask(config: Any, call: Call, group: Group, index: int, hidden: Tensor) -> Any:
    """The mask of layer `index`, which holds other tokens than the first one, as transformers makes it."""
    ledger = ledger_of(call.cache, index)
    key = (id(group), id(ledger))
    if key not in call.masks:
        call.masks[key] = create_causal_mask(
            config=config,
            inputs_embeds=hidden,
            attention_mask=logical_mask(call, group, index, hidden.device),
            position_ids=None,
            layer_idx=index,
            **{CACHE: call.cache},
        )
    return call.masks[key]
