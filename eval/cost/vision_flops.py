# SPDX-License-Identifier: Apache-2.0
"""FLOPs (2 per multiply-add) of vision towers and projectors from their configs, as torch's FLOP counter counts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def vit_flops(config: Any, layers: int | None = None) -> int:
    """One square crop through a vision transformer with CLS token and a plain MLP (CLIP, InternViT), patch embedding included.

    config: hidden_size, intermediate_size, num_hidden_layers, image_size, patch_size. layers: how many run, all by default
    (transformers runs all; 23 of 24 are enough for the features of LLaVA).
    """
    d, m = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    n = patches + 1
    embed = 2 * patches * 3 * config.patch_size**2 * d
    blocks = config.num_hidden_layers if layers is None else layers
    return embed + 2 * blocks * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)


def mlp_projector_flops(tokens: int, vision_hidden: int, text_hidden: int) -> int:
    """The projector of LLaVA: two matrices."""
    return 2 * tokens * (vision_hidden * text_hidden + text_hidden**2)


def qwen2_5_vl_vision_flops(config: Any, grid: Sequence[int]) -> int:
    """One image or video of `grid` (t, h, w) patches through the vision tower of Qwen2.5-VL with its merger.

    Blocks in config.fullatt_block_indexes attend within a frame, the others within windows (smaller at the border).
    """
    t, h, w = grid
    d, m = config.hidden_size, config.intermediate_size
    merge = getattr(config, "spatial_merge_size", 2)
    channels = getattr(config, "in_channels", 3) * getattr(config, "temporal_patch_size", 2)
    patches = t * h * w
    side = config.window_size // config.patch_size
    heights = [min(side, h - top) for top in range(0, h, side)]
    widths = [min(side, w - left) for left in range(0, w, side)]
    windowed = t * sum((high * wide) ** 2 for high in heights for wide in widths)
    total = 2 * patches * channels * config.patch_size**2 * d
    for block in range(config.depth):
        pairs = t * (h * w) ** 2 if block in config.fullatt_block_indexes else windowed
        total += 2 * (patches * (4 * d * d + 3 * d * m) + 2 * d * pairs)
    wide = merge**2 * d
    return total + 2 * (patches // merge**2) * (wide * wide + wide * config.out_hidden_size)
