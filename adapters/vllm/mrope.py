# SPDX-License-Identifier: Apache-2.0
"""Positions of several axes (M-RoPE) in a prompt with fewer tokens.

The text behind an image has the positions that it has in the full prompt, whatever is kept: those are final when a request comes.
Rows and columns of what is kept are known when it is encoded. They travel with the tokens, as columns behind the embedding, and are
put in their place when these enter the language model. Done again, nothing changes: preemption and caches of prefixes do no harm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...visuals import Layout
from .memo import Kept

AXES = 4
"""Columns behind an embedding: row and column, each as two numbers below 256, which every number format holds exactly."""
BASE = 256


def marked(rows: Tensor, kept: Kept | None, layout: Layout | None) -> Tensor:
    """Tokens [m, D] with their places in the grid of their picture: [m, D + AXES]; -1: leave the positions as they are."""
    if layout is None:
        return torch.cat([rows, rows.new_full((len(rows), AXES), -1)], 1)
    # each keeps the position of its own token, also where tokens do not stand in the order of the picture
    slots = kept.source if kept is not None else torch.arange(len(rows), device=rows.device)
    y, x = slots // layout.views[0].grid[1], slots % layout.views[0].grid[1]
    return torch.cat([rows, torch.stack([y // BASE, y % BASE, x // BASE, x % BASE], 1).to(rows.dtype)], 1)


class Positions:
    """Those of one model."""

    def __init__(self, model: Any) -> None:
        self.config = model.config

    @staticmethod
    def open(vllm_config: Any) -> None:
        """Let vLLM ask for positions again when tokens are encoded."""
        object.__setattr__(vllm_config.model_config.multimodal_config, "is_multimodal_pruning_enabled", _true)
        from vllm.platforms import current_platform

        if current_platform.is_cpu():
            _open_on_cpu()

    def given(self, original: Callable[..., Any], tokens: list[int], features: Any) -> tuple[Tensor, int]:
        """Positions [3, S] of a prompt, and what a number of tokens is short of the next position. Rows and columns of images come
        later."""
        side, full, moved, images, start = self.config.vision_config.spatial_merge_size, [], [], [], 0
        for feature in sorted(features, key=lambda f: f.mm_position.offset):
            place = feature.mm_position
            full += tokens[start : place.offset]
            new = dataclasses.replace(place, offset=len(full))
            moved.append(dataclasses.replace(feature, mm_position=new))
            start = place.offset + place.length
            if feature.modality == "image":
                count = int(feature.data["image_grid_thw"].data.prod()) // side**2
                images.append((len(full), place.length, count))
                full += [self.config.image_token_id] * count
            else:
                full += tokens[place.offset : start]
        full += tokens[start:]
        positions, _ = original(full, moved)
        here = torch.ones(len(full), dtype=torch.bool)
        for first, kept, count in images:
            here[first + kept : first + count] = False
            positions[1:, first : first + count] = positions[0, first]
        positions = positions[:, here].contiguous()
        return positions, int(positions[:, -1].max()) + 1 - len(tokens) if len(tokens) else 0

    def repaired(
        self, ids: Any, embeds: Sequence[Tensor], positions: Tensor, computed: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """The tokens `embeds` of images and videos behind the first `computed` ones, without the columns for their places; and the
        positions with these places."""
        delta = int(positions[:, -1].max()) + 1 - positions.shape[1]
        if not len(embeds):
            return [], positions, delta
        ids = torch.as_tensor(ids).to(positions.device)
        media = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
        places = torch.cat([x[:, -AXES:] for x in embeds]).to(positions.device).long()
        slots = media[computed:].nonzero()[: len(places), 0] + computed
        places = places[: len(slots)]
        of_image = places[:, 0] >= 0
        slots, places = slots[of_image], places[of_image]
        positions = positions.clone()
        positions[1:, slots] = positions[0, slots] + (places[:, 0::2] * BASE + places[:, 1::2]).T
        return [x[:, :-AXES] for x in embeds], positions, delta


def _true() -> bool:
    return True


def _open_on_cpu() -> None:
    """The runner on the CPU does not look whether a model wants to be asked (vLLM 0.32): it looks now."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def asked(runner: Any) -> bool:
        of_model = getattr(runner.get_model(), "supports_multimodal_pruning", False)
        return bool(of_model and runner.model_config.multimodal_config.is_multimodal_pruning_enabled())

    CPUModelRunner.is_multimodal_pruning_enabled = property(asked, lambda runner, value: None)
