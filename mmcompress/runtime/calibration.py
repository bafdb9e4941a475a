# SPDX-License-Identifier: Apache-2.0
"""RESTORE's own calibration: what attention adds to the logits of the prompt that is compressed, and only of that.

A key gets the logarithm of the tokens that it stands for, in the first layer that of the mean of its visual; and a pair of tokens
what their distance gives (`ops.calibration`). Unlike mass, all of it ends with the call: later tokens see plain keys. It belongs to
pairs, so it can only come in a mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops.calibration import distance_bias
from ..stage import Pipeline
from .cache import ledger_of
from .call import Call
from .masks import mask_of
from .mass import TAKE, takes_mask
from .packing import Group
from .windows import columns_of, cuts_off, in_sight


def check_calibration(language_model: Any, plan: Pipeline) -> None:
    """Raise where the prompt cannot be calibrated as the plan says."""
    if plan.weighs:
        raise ValueError(
            f"{plan!r}: calibrate=True gives merged tokens weights of its own, in the prompt alone: use it without mass=True and "
            f"without other methods that merge"
        )
    if inside := (*plan.layer_stages, *plan.exit_stages, *plan.attention_stages):
        raise NotImplementedError(
            f"{inside[0]!r} in a plan with calibrate=True: what is added to attention would have to follow it; leave calibrate "
            f"out, then merged tokens weigh what they stand for in all layers"
        )
    if not takes_mask(language_model.config):
        attention = language_model.config._attn_implementation
        raise NotImplementedError(
            f"{plan!r}: calibrate=True adds numbers to pairs of tokens, which attn_implementation={attention!r} does not take: "
            f"use one of {', '.join(map(repr, TAKE))}"
        )


def calibrated_mask(config: Any, call: Call, group: Group, index: int, hidden: Tensor, tables: Any) -> Tensor:
    """The mask of layer `index` with what is added to the logits of `hidden` [B, M, H], [B, heads or 1, M, K]. tables: the rotary
    tables that the layer is given; without any there are no distances."""
    window = call.windows.index(call.windows[index]) if call.windows and cuts_off(call, index, group.logical) else -1
    key = (id(group), id(ledger_of(call.cache, index)), window, id(tables), -3 - (index == 0))
    if key not in call.masks:  # with what its key names
        call.masks[key] = (group, tables), _made(config, call, group, index, hidden, tables)
    return call.masks[key][1]


def _made(config: Any, call: Call, group: Group, index: int, hidden: Tensor, tables: Any) -> Tensor:
    assert group.calibration is not None
    columns, length = columns_of(call, group, index, hidden.device), hidden.shape[1]
    bias = group.calibration[:, int(index > 0)].to(hidden.device).log()[:, None].expand(-1, length, -1)
    if isinstance(tables, tuple) and len(tables) == 2:
        bias = bias + distance_bias(*tables).to(bias.device)
    at = columns.number - columns.past
    bias = bias[..., at.clamp(0, length - 1)].masked_fill((at < 0) | (at >= length), 0)[:, None].to(hidden.dtype)
    fits = config._attn_implementation != "flex_attention" or call.ready is not None
    seen = mask_of(config, call, group, index, hidden) if fits else None
    if seen is None:
        seen = in_sight(call, group, index, columns)[:, None]
    return torch.where(seen, bias, torch.finfo(hidden.dtype).min) if seen.dtype == torch.bool else seen + bias
