# SPDX-License-Identifier: Apache-2.0
"""Attention masks of calls whose layers hold fewer tokens than the caller believes.

Two sorts come in. A mask of padding, [B, tokens], or none: every layer gets one of its own, made by transformers for the tokens
that it holds. A mask that is ready-made, [B or 1, heads or 1, queries, keys] or a dict of them by kind of layer (static
caches, models whose pictures see themselves, prefix models, masks of the caller, samples packed into one row): nobody else
knows who sees whom, so its rows and columns are carried along. Layers with windows (see `windows`) get masks of both sorts cut to
what their window reaches.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers.cache_utils import StaticLayer
from transformers.masking_utils import create_causal_mask, find_packed_sequence_indices

from .cache import CACHE, PrunedLayer, is_pruned, ledger_of
from .call import Call
from .packing import Group
from .windows import columns_of, cuts_off, outside, reached, window_mask, window_of

RECURRENT = ("linear_attention", "conv")
"""Kinds of masks that say which tokens are real, [B, S], to layers that carry a state."""
ATTENTION_OF = {"hybrid": "full_attention", "hybrid_sliding": "sliding_attention"}
"""The kind of mask for the attention of layers that have a state as well."""
BY_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "cu_seqlens", "seq_idx")
"""Keywords that say by lengths which tokens see each other (rows packed for flash attention)."""


def check_masks(given: dict[str, Any]) -> None:
    """Raise NotImplementedError for what says who sees whom in a form that cannot be shortened."""
    masks = given.get("attention_mask")
    for mask in masks.values() if isinstance(masks, dict) else (masks,):
        if isinstance(mask, BlockMask):
            raise NotImplementedError(
                "a BlockMask of flex attention cannot be shortened with the tokens: load the model with "
                "attn_implementation='sdpa', or give a mask of padding [batch, tokens] and a cache that is not static"
            )
    for name in BY_LENGTHS:
        if given.get(name) is not None:
            raise NotImplementedError(
                f"{name} speaks of the tokens before compression, and packed rows of flash attention are not supported: give one "
                f"sample per row, or position_ids that start again and use_cache=False with attn_implementation='sdpa'"
            )


def ready_made(mask: Any) -> Any:
    """`mask` where it says who sees whom by itself, None where it is a mask of padding or none."""
    if isinstance(mask, dict):
        return mask if any(getattr(m, "ndim", 0) == 4 for m in mask.values()) else None
    return mask if getattr(mask, "ndim", 0) == 4 else None


def packed_samples(call: Call, given: dict[str, Any], config: Any) -> tuple[Tensor | None, Any]:
    """Where position ids start again within rows, and there is neither mask nor cache, transformers keeps the samples apart: their
    number for each token [B, S] on the host, and the mask that it would make. Waits for the device."""
    positions = given.get("position_ids")
    if positions is None or call.caches or given.get("attention_mask") is not None:
        return None, None  # with a cache it looks at no positions
    counted = positions if positions.dim() == 2 else positions[0] if len(positions) == 4 else None
    samples = None if counted is None else find_packed_sequence_indices(counted)
    if samples is None:
        return None, None
    embeds = given["inputs_embeds"]
    mask = create_causal_mask(config, embeds, None, **{CACHE: None}, position_ids=counted)
    check_masks({"attention_mask": mask})
    if ready_made(mask) is None:
        raise NotImplementedError(
            f"rows with several samples and attn_implementation={config._attn_implementation!r}: only the masks of 'sdpa' and "
            f"'eager' can be shortened; give one sample per row"
        )
    return samples.cpu().expand(call.batch, -1), mask


def _sees(mask: Tensor) -> Tensor:
    """A mask as bool: True where a query sees a key."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _past_width(call: Call, mask: Tensor, length: int, layer: int) -> int:
    """How many columns of a ready-made mask, for `layer`, come before those of the call's own tokens."""
    width = mask.shape[-1]
    if is_static(call) and width != int(call.past) + length:  # all its places, used or not
        fed = _fed(call, layer)
        return fed - outside(call, layer, fed)
    return width - length


def _fed(call: Call, layer: int) -> int:
    """How many tokens earlier calls have put into the cache of `layer`. Not as it says itself: it may have the new ones already."""
    ledger = ledger_of(call.cache, layer)
    return int(call.past) - (ledger.dropped if ledger is not None else 0)


def _kinds(config: Any) -> list[str]:
    """What the masks of each layer's attention are called; nothing where layers have no types."""
    return [ATTENTION_OF.get(kind, kind) for kind in getattr(config, "layer_types", None) or ()]


def _layer_of(call: Call, kind: str) -> int:
    """The first layer of a kind; 0 where the kinds of layers are not known by that name."""
    kinds = _kinds(call.config)
    return kinds.index(kind) if kind in kinds else 0


def is_static(call: Call) -> bool:
    return call.cache is not None and any(isinstance(layer, StaticLayer) for layer in call.cache.layers)


def validity(call: Call, length: int) -> tuple[Tensor | None, Tensor | None]:
    """Which of the `length` new tokens are real, and which of the past in an unpruned cache, [B, ...] bool or None for all.

    From the mask that the caller gave; in a ready-made one a token is padding if nobody sees it. A decode step on a pruned
    cache is always real: no mask is read, nothing waits.
    """
    mask, pruned = call.mask, is_pruned(call.cache)
    layer = 0
    if isinstance(mask, dict):
        made = [kind for kind, m in mask.items() if getattr(m, "ndim", 0) == 4] or [*mask]
        kind = min(
            made, key=lambda k: window_of(call, _layer_of(call, k)) is not None
        )  # what a window hides is no padding
        mask, layer = mask[kind], _layer_of(call, kind)
    if not isinstance(mask, Tensor) or (pruned and length == 1):
        return None, None
    if mask.dim() == 4:
        begin, seen = _past_width(call, mask, length, layer), _sees(mask).any(2).any(1).expand(call.batch, -1)
        new, past = seen[:, begin : begin + length], seen[:, :begin]
        if not is_static(call) or begin < _fed(call, layer):
            past = past[:, :0]  # later tokens may see what these do not
    else:
        new, past = mask[:, -length:].bool(), mask[:, :-length].bool()
    if pruned or not past.shape[1]:
        return new, None
    return new, past


def logical_mask(call: Call, group: Group, layer: int, device: torch.device) -> Tensor | None:
    """2-D mask of logical width for a layer: [zeros for what its cache dropped | what it holds | the new tokens].

    None where all are real.
    """
    ledger = ledger_of(call.cache, layer)
    past = ledger.valid if ledger is not None else call.past_valid

    def ones(count: int) -> Tensor:
        return torch.ones(call.batch, count, dtype=torch.bool, device=device)

    if past is None and group.valid is None:
        return None
    dropped = ledger.dropped if ledger is not None else 0
    if ledger is not None and group.valid is None:  # a static layer tells its width without waiting for its length
        assert call.cache is not None
        cached: Any = call.cache.layers[layer]
        if not isinstance(cached, PrunedLayer):
            cached = next(other for other in call.cache.layers if isinstance(other, PrunedLayer))
        length = sum(cached.get_mask_sizes(group.physical)) - dropped  # with what its window has left behind
    else:
        length = int(call.past) - dropped + group.physical
    past = past.to(device) if past is not None else ones(0)
    new = group.valid.to(device) if group.valid is not None else ones(0)
    between = length - past.shape[1] - new.shape[1]  # decoded tokens, all real
    return torch.cat([~ones(dropped), past, ones(between), new], 1)


def carried(config: Any, call: Call, group: Group, layer: int, mask: Any, embeds: Tensor) -> Any:
    """A ready-made mask over the tokens that the caller passed, for those that `layer` holds (`embeds` [B, M, H]): its rows and
    columns of what is left."""
    if isinstance(mask, dict):
        rest = {kind: m for kind, m in mask.items() if kind not in RECURRENT}
        made = {
            kind: carried(config, call, group, _layer_of(call, kind) or layer, m, embeds) for kind, m in rest.items()
        }
        return {**{kind: group.valid for kind in mask if kind in RECURRENT}, **made}
    if getattr(mask, "ndim", 0) != 4:  # beside ready-made ones: plainly causal, as the kernel does it by itself
        windowed = cuts_off(call, layer, group.logical)
        return None if group.valid is None and not windowed else layer_mask(config, call, group, layer, embeds)
    key = (id(group), id(ledger_of(call.cache, layer)), id(mask))
    if key not in call.masks:  # with its group: an id lasts as long as what it names
        call.masks[key] = group, _carried(call, group, layer, mask, embeds.device)
    return call.masks[key][1]


def _carried(call: Call, group: Group, layer: int, mask: Tensor, device: torch.device) -> Tensor:
    length = group.logical
    # one mask for all layers of a kind is as wide as the first of them
    kinds = getattr(call.config, "layer_types", None) if isinstance(call.ready, dict) else None
    begin = _past_width(call, mask, length, _layer_of(call, kinds[layer]) if kinds else 0)
    mask = mask.to(device).expand(call.batch, -1, -1, -1)
    rows = torch.arange(length, device=device).expand(call.batch, -1)
    rows = rows if group.place is None else group.place.to(device).clamp_min(0)  # a mask speaks of places
    past, real = _past_columns(call, layer, begin, device)
    new = rows + begin
    if group.valid is not None:
        new = new.masked_fill(~group.valid.to(device), -1)
    left = outside(call, layer, past.shape[1])
    past, real = past[:, left:], real[:, left:] if real is not None else None
    columns = torch.cat([past, new], 1)
    spare = _stored_width(call, layer, group) - columns.shape[1]
    columns = torch.nn.functional.pad(columns, (0, max(spare, 0)), value=-1)
    made = mask.take_along_dim(rows[:, None, :, None], 2).take_along_dim(columns.clamp_min(0)[:, None, None], 3)
    low = False if made.dtype == torch.bool else torch.finfo(made.dtype).min
    if real is not None:  # made for what the cache holds, where columns of padding have moved: all that is real is seen
        high = True if made.dtype == torch.bool else 0.0
        seen = torch.where(real, high, low).to(made.dtype)[:, None, None]
        made = torch.cat([seen.expand(*made.shape[:3], -1), made[..., real.shape[1] :]], 3)
    made = made.masked_fill(columns[:, None, None] < 0, low)
    if not cuts_off(call, layer, length):
        return made
    return made.masked_fill(~reached(call, group, layer, columns_of(call, group, layer, device))[:, None], low)


def entry_of(call: Call, layer: int, config: Any) -> Any:
    """The ready-made mask of `layer`."""
    if not isinstance(call.ready, dict):
        return call.ready
    kinds = _kinds(config) or [*call.ready] * (layer + 1)
    if kinds[layer] not in call.ready or (len(call.ready) > 1 and not hasattr(config, "layer_types")):
        raise NotImplementedError(
            f"which of the ready-made masks ({', '.join(call.ready)}) is that of layer {layer} is not known: only stages before "
            f"the language model are supported"
        )
    return call.ready[kinds[layer]]


def who_sees(call: Call, layer: int, device: torch.device) -> Tensor | None:
    """By a ready-made mask or a window: which keys of cache and call each token that comes to `layer` sees, [B, heads or 1, M, K]
    bool; None where masks are of padding and everything is causal."""
    mask = entry_of(call, layer, call.config) if call.ready is not None else None
    if mask is None and not call.windows:
        return None
    before = call.visual  # of a prompt that is asked before it is packed
    length = call.groups[0].logical if call.groups else before.shape[1] if before is not None else 0
    if mask is None and not cuts_off(call, layer, length):
        return None
    group = call.group_of(layer) if call.groups else Group(0, length, length, [])
    like = torch.empty(call.batch, group.physical, 0, device=device)
    make = layer_mask if mask is None else functools.partial(carried, mask=mask)
    return _sees(make(call.config, call, group, layer, embeds=like))


def _past_columns(call: Call, layer: int, begin: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The column of a ready-made mask for each row that the cache of `layer` holds, [B, P], -1 for padding. If the mask was made
    for what the cache holds, and not for what the caller passed: also which of those rows are real, [B, P]."""
    ledger = ledger_of(call.cache, layer)
    if ledger is None:
        return torch.arange(begin, device=device).expand(call.batch, -1), None
    stored = int(call.past) - ledger.dropped  # not as the layer has it: that may hold the new tokens already
    if begin == int(call.past):
        return ledger.places(stored, call.batch, device), None
    real = torch.ones(call.batch, stored, dtype=torch.bool, device=device)
    if ledger.valid is not None:
        real[:, : ledger.valid.shape[1]] = ledger.valid.to(device)
    return torch.zeros(call.batch, stored, dtype=torch.int64, device=device), real


def _stored_width(call: Call, layer: int, group: Group) -> int:
    """How many columns the attention of `layer` has: all places of a static cache, used or not."""
    cached = call.cache.layers[layer] if call.cache is not None and layer < len(call.cache.layers) else None
    return cached.get_mask_sizes(group.physical)[0] if isinstance(cached, StaticLayer) else 0


def mask_of(config: Any, call: Call, group: Group, layer: int, embeds: Tensor) -> Any:
    """A mask for `layer` alone; `embeds` [B, M, H]."""
    if call.ready is None:
        return layer_mask(config, call, group, layer, embeds)
    return carried(config, call, group, layer, entry_of(call, layer, config), embeds)


def layers_differ(call: Call, length: int, attention: str | None) -> bool:
    """Whether layers need masks or rotary tables of their own in a call that drops nothing: not if all share one ledger, and
    no mask for a single query without padding, except where `attention` is "eager", which always gets one, or masks are
    ready-made."""
    assert call.cache is not None
    leaders: list[Any] = [layer for layer in call.cache.layers if getattr(layer, "leads", False)]
    if len(leaders) == 1:
        return False
    first = leaders[0].ledger.shift
    return (
        length > 1
        or attention == "eager"
        or call.ready is not None
        or any(
            leader.ledger.shift is not first or leader.ledger.valid is not None or leader.is_compileable
            for leader in leaders
        )
    )


def layer_mask(config: Any, call: Call, group: Group, layer: int, embeds: Tensor) -> Any:
    """The mask of `layer` where it holds other tokens than the first one, or has a window that hides some; `embeds` [B, M, H]."""
    window = window_of(call, layer) if cuts_off(call, layer, group.logical) else None
    kind = -1 if window is None else call.windows.index(window)
    key = (id(group), id(ledger_of(call.cache, layer)), kind)
    if key not in call.masks:  # with its group, as above
        padding = None if window is not None else logical_mask(call, group, layer, embeds.device)
        if window is not None or (padding is not None and config._attn_implementation == "sdpa"):
            made = window_mask(
                config, call, group, layer, embeds
            )  # transformers would look whether any padding is there
        else:
            made = create_causal_mask(
                config=config,
                inputs_embeds=embeds,
                attention_mask=padding,
                position_ids=None,
                layer_idx=layer,
                **{CACHE: call.cache},
            )
        call.masks[key] = group, made
    return call.masks[key][1]
