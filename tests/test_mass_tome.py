# SPDX-License-Identifier: Apache-2.0
"""Tokens that ToMe merged in the vision encoder weigh in the language model what they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmcompress as mm

from .families import FAMILIES, build, prompts
from .test_families import close, samples


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_sizes_of_tome_come_to_every_layer(family: str) -> None:
    """The mask of each layer has the logarithms of the sizes on visual columns and nothing on text; and a step that reads the
    cache says what the whole prompt with its token says."""
    model = mm.compress(build(family), "tome(keep=0.4)", mass=True)
    inputs = prompts(model, family, samples(family))
    seen: list[Any] = []
    layers = model.model.language_model.layers
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
        )
        for layer in layers
    ]
    out = model(**inputs, use_cache=True)
    for handle in handles:
        handle.remove()
    visuals = mm.trace(model).visuals
    group, number = visuals[0].call.groups[0], torch.ones(inputs["input_ids"].shape)
    for visual in visuals:
        places = visual.span.patches[visual.kept_cells()]
        number[visual.row, places.sort().values] = visual.sizes.float().cpu()
        assert visual.sizes.sum() == visual.tokens and visual.sizes.max() > 1
    wanted, real = number.gather(1, group.source).log(), group.place >= 0
    masks = [mask for mask in seen if isinstance(mask, Tensor) and mask.dim() == 4 and mask.is_floating_point()]
    assert masks and wanted[real].max() > 0.5
    for mask in masks:
        close(mask[:, 0, -1, : real.shape[1]][real], wanted[real])

    found = model.generate(
        **inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    more = {"input_ids": found.sequences[:, -2:-1], "attention_mask": torch.ones(2, 1, dtype=torch.long)}
    whole = {name: torch.cat([inputs[name], new], 1) for name, new in more.items()}
    kinds = {n: torch.cat([x, x.new_zeros(2, 1)], 1) for n, x in inputs.items() if "type_ids" in n}
    close(found.logits[1], model(**{**inputs, **whole, **kinds}).logits[:, -1])
    mm.compress(model, "tome(keep=0.4)", mass=False)
    real = inputs["attention_mask"].bool()
    assert (model(**inputs).logits[real] - out.logits[real]).abs().max() > 1e-3


@torch.no_grad()
def test_sizes_of_tome_add_up_in_what_comes_behind() -> None:
    model = mm.compress(build("llava"), "plan(tome(keep=0.5) >> voronoi(keep=0.5), mass=True)")
    model(**prompts(model, "llava", samples("llava")))
    for visual in mm.trace(model).visuals:
        group = visual.call.groups[0]
        at = torch.isin(group.source[visual.row], visual.span.patches) & (group.place[visual.row] >= 0)
        mass = group.mass[visual.row][at]
        assert mass.sum() == visual.tokens and len(mass) == visual.kept
