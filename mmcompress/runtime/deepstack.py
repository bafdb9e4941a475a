# SPDX-License-Identifier: Apache-2.0
"""DeepStack: features that a language model adds to the visual tokens in some of its layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .call import Call


@dataclass(frozen=True)
class Keywords:
    """What a language model calls them.

    mask    where the visual tokens are: [B, S] or [B, S, 1] bool.
    levels  one [T, H] per layer, row after row of the batch: a list (level j is added behind layer j), or a dict by the layer
            before which they are added. In a dict they are all there is: the embeddings at the placeholders are zero.
    """

    mask: str
    levels: str


FORMS = (Keywords("visual_pos_masks", "deepstack_visual_embeds"), Keywords("vision_mask", "deepstack_features"))
NAMES = frozenset(name for form in FORMS for name in (form.mask, form.levels))


def form_of(kwargs: dict[str, Any]) -> Keywords | None:
    """The keywords by which a call brings levels; None if it brings none."""
    return next((form for form in FORMS if kwargs.get(form.levels) is not None), None)


@dataclass(frozen=True)
class Levels:
    """What layers add to their inputs, all levels side by side: what happens to tokens happens to them at once.

    layers  before which they are added, ascending. rows [B, S, levels * H]: zero where there is no visual token.
    """

    layers: tuple[int, ...]
    rows: Tensor

    def of(self, layer: int) -> Tensor:
        """The level of a layer, [B, S, H]."""
        return self.rows.chunk(len(self.layers), -1)[self.layers.index(layer)]

    def put(self, at: tuple[Tensor, Tensor], rows: Tensor, layer: int | None = None) -> Levels:
        """With `rows` at some places: of all levels [U, k, levels * H], or of that of one layer [U, k, H]."""
        if layer is None:
            return Levels(self.layers, self.rows.index_put(at, rows.to(self.rows.dtype)))
        parts = list(self.rows.chunk(len(self.layers), -1))
        number = self.layers.index(layer)
        parts[number] = parts[number].index_put(at, rows.to(self.rows.dtype))
        return Levels(self.layers, torch.cat(parts, -1))


def levels_of(kwargs: dict[str, Any], embeds: Tensor) -> Levels | None:
    """The levels that a call brings, as full sequences; None if it brings none."""
    form = form_of(kwargs)
    if form is None:
        return None
    given = kwargs[form.levels]
    levels = given if isinstance(given, dict) else dict(enumerate(given, start=1))
    layers = tuple(sorted(levels))
    if not layers:
        return None
    beside = torch.cat([levels[i].to(embeds) for i in layers], -1)
    rows = embeds.new_zeros(*embeds.shape[:2], beside.shape[-1])
    return Levels(layers, rows.masked_scatter(_mask(kwargs, form).to(embeds.device)[..., None].expand_as(rows), beside))


def leading(kwargs: dict[str, Any]) -> int | None:
    """The layer whose level a method is shown with the embeddings, where those are zero; else None."""
    form = form_of(kwargs)
    levels = kwargs[form.levels] if form is not None else None
    return min(levels) if isinstance(levels, dict) and levels else None


def give_levels(call: Call, kwargs: dict[str, Any], levels: Levels, visual: Tensor, cut: int | None) -> None:
    """Give the model the levels of the packed tokens: those up to layer `cut`, the first that drops tokens, in its
    own form; the others are added by the hooks of the layers. visual [B, M] bool: which tokens are visual, structural ones too."""
    form = form_of(kwargs)
    assert form is not None
    late = {i for i in levels.layers if cut is not None and i > cut}
    if late:
        call.deepstack = {i: level for i, level in _apart(levels, levels.rows) if i in late}
    count = sum(call.patch_counts(call.pool_counts)) + call.structural
    order = visual.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:count]
    given = {i: level for i, level in _apart(levels, levels.rows.flatten(0, 1)[order]) if i not in late}
    kwargs[form.levels] = given if isinstance(kwargs[form.levels], dict) else list(given.values())
    kwargs[form.mask] = visual if kwargs[form.mask].dim() == 2 else visual[..., None]


def _apart(levels: Levels, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
    return zip(levels.layers, rows.chunk(len(levels.layers), -1), strict=True)


def _mask(kwargs: dict[str, Any], form: Keywords) -> Tensor:
    mask: Tensor = kwargs[form.mask]
    return mask if mask.dim() == 2 else mask[..., 0]
