# SPDX-License-Identifier: Apache-2.0
"""DeepStack: features that a language model adds to the visual tokens in some of its layers."""

from __future__ import annotations

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


def levels_of(kwargs: dict[str, Any], embeds: Tensor) -> dict[int, Tensor]:
    """By layer: what is added to its input, as full sequences [B, S, H], zero where there is no visual token."""
    form = form_of(kwargs)
    if form is None:
        return {}
    where = _mask(kwargs, form).to(embeds.device)[..., None].expand_as(embeds)
    given = kwargs[form.levels]
    levels = given if isinstance(given, dict) else dict(enumerate(given, start=1))
    return {i: torch.zeros_like(embeds).masked_scatter(where, level.to(embeds)) for i, level in sorted(levels.items())}


def leading(kwargs: dict[str, Any]) -> int | None:
    """The layer whose level a method is shown with the embeddings, where those are zero; else None."""
    form = form_of(kwargs)
    levels = kwargs[form.levels] if form is not None else None
    return min(levels) if isinstance(levels, dict) and levels else None


def give_levels(call: Call, kwargs: dict[str, Any], levels: dict[int, Tensor], visual: Tensor, cut: int | None) -> None:
    """Give the model the levels [B, M, H] of the packed tokens: those up to layer `cut`, the first that drops tokens, in its
    own form; the others are added by the hooks of the layers. visual [B, M] bool: which tokens are visual, structural ones too."""
    form = form_of(kwargs)
    assert form is not None
    call.deepstack = {i: level for i, level in levels.items() if cut is not None and i > cut}
    count = sum(call.patch_counts(call.pool_counts)) + call.structural
    order = visual.flatten().to(torch.uint8).sort(descending=True, stable=True).indices[:count]
    given = {i: level.flatten(0, 1)[order] for i, level in levels.items() if i not in call.deepstack}
    kwargs[form.levels] = given if isinstance(kwargs[form.levels], dict) else list(given.values())
    kwargs[form.mask] = visual if kwargs[form.mask].dim() == 2 else visual[..., None]


def _mask(kwargs: dict[str, Any], form: Keywords) -> Tensor:
    mask: Tensor = kwargs[form.mask]
    return mask if mask.dim() == 2 else mask[..., 0]
