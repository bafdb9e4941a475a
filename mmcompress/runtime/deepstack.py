# SPDX-License-Identifier: Apache-2.0
"""DeepStack: features of deeper vision layers that Qwen3-VL adds to the visual tokens behind its first LLM layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .call import Call


def levels_of(kwargs: dict[str, Any], embeds: Tensor) -> list[Tensor]:
    """The levels as full sequences [B, S, H], zero where there is no visual token; none where the family has none."""
    levels = kwargs.get("deepstack_visual_embeds")
    if levels is None:
        return []
    mask = kwargs["visual_pos_masks"].to(embeds.device)
    where = mask[..., None].expand_as(embeds)
    return [torch.zeros_like(embeds).masked_scatter(where, level.to(embeds)) for level in levels]


def give_levels(call: Call, kwargs: dict[str, Any], levels: list[Tensor], cut: int | None) -> None:
    """Give the model the levels [B, M, H] of the packed tokens: those before layer `cut`, the first that drops tokens, in its
    own form; the others are added by the hooks of the layers."""
    assert call.patches is not None
    before = len(levels) if cut is None else cut
    call.deepstack = {j + 1: level for j, level in enumerate(levels) if j >= before}
    count = sum(call.patch_counts)
    order = call.patches.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:count]
    kwargs["visual_pos_masks"] = call.patches
    kwargs["deepstack_visual_embeds"] = [level.flatten(0, 1)[order] for level in levels[:before]]
