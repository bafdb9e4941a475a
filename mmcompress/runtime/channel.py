# SPDX-License-Identifier: Apache-2.0
"""Mass without a mask of numbers: more channels of queries and keys bring it to attention functions that take none.

    [q, 1, 1] . [k, b / scale, rest] * scale  =  q . k * scale + b

The bias b of a key goes into two channels, what half precision holds of it and the rest, so that it is added as exactly as
the function sums. Values are padded to the same width, which is a multiple of 8, and the output is cut again. What the cache
holds stays as it is: keys get the channels when they are read. That copies them, so the single query of a decode step goes
through torch's own attention with a mask instead, where a mask is one row.

The attention modules of the language model get a view of their config, by which they find the function here. It is the one
of their implementation wherever the keyword BIAS does not come with the call.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .twin import twin

BIAS = "mmcompress_bias"
"""Private keyword of attention: [B, 1, 1, K], added to the logits of the keys."""
CHANNELS, WIDTH = 2, 8
"""How many channels are added, and what widths are multiples of."""
MOST = 3e4
"""No channel is larger: half precision holds it."""
BY_NAME = (None, "eager", "flex_attention")
"""Implementations that stay: eager attention is a function of each model's own, and flex attention takes masks."""


def widened(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, heads, M, d], keys [B, kv_heads, K, d] and values [B, kv_heads, K, dv], all with the same channels, a multiple
    of 8, whose logits with `scale` are those of q and k and bias [B, 1, 1, K]; keys beyond its last have none. O(K d) memory."""
    width = -(-max(q.shape[-1] + CHANNELS, v.shape[-1]) // WIDTH) * WIDTH
    bias = F.pad(bias, (0, k.shape[2] - bias.shape[-1])) / scale
    bias = bias.clamp(-MOST, MOST)[:, 0, 0, :, None]
    parts = [bias.to(k.dtype)]
    parts.append((bias - parts[0]).to(k.dtype))
    rest = width - q.shape[-1] - CHANNELS
    channels = F.pad(torch.cat(parts, -1), (0, rest))[:, None].expand(-1, k.shape[1], -1, -1)
    ones = F.pad(q.new_ones(CHANNELS), (0, rest)).expand(*q.shape[:3], -1)
    return torch.cat([q, ones], -1), torch.cat([k, channels], -1), F.pad(v, (0, width - v.shape[-1]))


def one_row(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, dropout: float) -> Tensor:
    """Attention of one query per row [B, heads, 1, d] on all keys, plus bias [B, 1, 1, K]: [B, 1, heads, dv]."""
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # the queries that share a key head, in one product
    out = F.scaled_dot_product_attention(grouped, k, v, bias.to(q.dtype), dropout, scale=scale)
    return out.flatten(1, 2)[:, None]


def _attend(
    real: str, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **given: Any
) -> Any:
    """The attention function `real` of transformers; with BIAS among the keywords, plus that."""
    bias, run = given.pop(BIAS, None), ALL_ATTENTION_FUNCTIONS[real]
    if real != "sdpa":  # flash attention asks the module for the name of its kernels
        module = twin(module, config=module.config.stock)
    if bias is None:
        return run(module, query, key, value, attention_mask, **given)
    scale = given.pop("scaling", None) or query.shape[-1] ** -0.5
    if query.shape[2] == 1 and given.get("s_aux") is None:
        return one_row(query, key, value, bias, scale, given.get("dropout", 0.0)), None
    size = value.shape[-1]
    query, key, value = widened(query, key, value, bias, scale)
    output, *others = run(module, query, key, value, attention_mask, scaling=scale, **given)
    return (output[..., :size], *others)


_NAMES: dict[str | None, str | None] = {name: name for name in BY_NAME}


def name_of(implementation: str | None) -> str | None:
    """The name under which the function here that stands for an attention implementation is registered."""
    if implementation is not None and implementation not in _NAMES:
        name = f"mmcompress_wide_{implementation}"
        ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(_attend, implementation))
        _NAMES[implementation] = name
    return _NAMES[implementation]


class Wide:
    """A view of the config of attention modules, by which they find the functions here; everything else is the config's."""

    def __init__(self, config: Any) -> None:
        self.__dict__["stock"] = config.stock if isinstance(config, Wide) else config

    @property
    def _attn_implementation(self) -> str | None:
        return name_of(self.stock._attn_implementation)

    def __getattr__(self, name: str) -> Any:
        if name == "stock":  # of a copy that is being made
            raise AttributeError(name)
        return getattr(self.stock, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.stock, name, value)
