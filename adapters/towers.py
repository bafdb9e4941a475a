# SPDX-License-Identifier: Apache-2.0
"""Blocks of a vision transformer found by what they are made of: two norms, attention with its projections, an MLP."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import nn

from ..runtime.adapter import Block
from ..runtime.hooks import running

FIRST = (
    "layer_norm1",
    "norm1",
    "layernorm_before",
    "attention_norm",
    "input_layernorm",
    "rms_norm1",
    "pre_attention_layer_norm",
)
ATTENTION = ("self_attn", "attn", "attention")
NORM = (
    "layer_norm2", "norm2", "layernorm_after", "ffn_norm", "pre_feedforward_layernorm", "post_attention_layernorm", "rms_norm2",
    "pre_mlp_layer_norm",
)  # fmt: skip
"""In front of the MLP; where a layer has norms on both sides of its parts, the earlier names are the right ones."""
MLP = ("mlp", "feed_forward", "ffn")
PROJECTIONS = (("q_proj", "k_proj"), ("q", "k"), ("query", "key"))


def child(module: nn.Module, names: Sequence[str]) -> Any:
    """The first child of one of the names; None if there is none."""
    return next((child for name in names if isinstance(child := getattr(module, name, None), nn.Module)), None)


def _works(module: Any) -> bool:
    return isinstance(module, nn.Module) and not isinstance(module, nn.Identity)


def _number(module: nn.Module, *names: str) -> Any:
    """The first attribute, or field of the module's config, of one of the names; None if there is none."""
    places = (module, getattr(module, "config", None))
    return next((n for place in places for name in names if (n := getattr(place, name, None)) is not None), None)


def block_of(layer: nn.Module) -> Block | None:
    """The parts of one layer of a vision transformer; None if it has none of them, or they are of no form that is known.

    What is asked of attention is made of its projections (behind their norms) where nothing rotates them, and else of what the
    module hands to its attention function.
    """
    first, attention, norm, mlp = (child(layer, names) for names in (FIRST, ATTENTION, NORM, MLP))
    if any(part is None for part in (first, attention, norm, mlp)):
        return None
    heads = _number(attention, "num_heads", "num_attention_heads")
    width = _number(attention, "head_dim")
    normed = [getattr(attention, f"{which}_norm", None) for which in "qk"]
    separate = next(
        (pair for names in PROJECTIONS if None not in (pair := [child(attention, (n,)) for n in names])), None
    )
    qkv = child(attention, ("qkv",))
    if not heads or (separate is None and qkv is None):
        return None
    groups = _number(attention, "num_key_value_groups") or 1
    scale = _number(attention, "scale", "scaling") or (width or 1) ** -0.5
    turns = {"position_embeddings", "rotary_pos_emb", "rope", "freqs_ci"} & set(
        inspect.signature(type(attention).forward).parameters
    )
    q, k = normed if all(_works(n) for n in normed) else separate or (None, None)
    return Block(
        layer, first, attention, norm, mlp, int(heads), float(scale), q, k, None if q is not None else qkv,
        int(heads) // groups, width, bool(turns),
    )  # fmt: skip


def blocks_of(tower: nn.Module) -> list[Block]:
    """The blocks of a vision transformer: the longest list of layers of which each is one. Raises NotImplementedError if there is
    none."""
    found: list[Block] = []
    for part in running(tower).modules():
        if isinstance(part, nn.ModuleList) and len(part) > len(found):
            blocks = [block_of(layer) for layer in part]
            if all(block is not None for block in blocks):
                found = [block for block in blocks if block is not None]
    if not found:
        raise NotImplementedError(f"{type(tower).__name__} has no list of layers with two norms, attention and an MLP")
    return found
