# SPDX-License-Identifier: Apache-2.0
"""RESTORE's calibration of a prompt: what is added to the logits of its tokens, and only while they are read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmcompress as mm
from mmcompress.ops.calibration import distance_bias
from mmcompress.plan import as_pipeline

from .families import build, prompts
from .reference import captured
from .test_families import GREEDY, close, samples, visual_places

PLAN = "restore(host='divprune', keep=0.4, calibrate=True)"


def angles(model: Any, positions: Tensor) -> Tensor:
    """Of the dimensions that turn in pairs, [..., S, d / 2], by the formula."""
    config = model.model.language_model.config
    width = config.hidden_size // config.num_attention_heads
    return positions[..., None] * config.rope_parameters["rope_theta"] ** -(torch.arange(0, width, 2) / width)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_equals_stock_with_the_bias_of_the_paper(attention: str) -> None:
    """Merged embeddings at kept positions, masks of numbers put into every layer by hand."""
    model = build("llava", attention=attention)
    inputs = prompts(model, "llava", samples("llava")[:1])
    with captured(model) as seen:
        stock = model(**inputs).logits
    mm.compress(model, PLAN)
    logits = model(**inputs).logits
    embeds, live = seen["inputs_embeds"][0].clone(), ~visual_places(model, inputs["input_ids"].shape)[0]
    number = torch.ones(2, len(live))
    for visual in mm.trace(model).visuals:
        places, assign = visual.span.patches, visual.selection.assignment(visual.tokens)[visual.span.selection_row]
        for output, cell in enumerate(visual.kept_cells().tolist()):
            members, at = places[assign == output], places[cell]
            embeds[at] = seen["inputs_embeds"][0, members].mean(0)
            live[at], number[1, at] = True, len(members)
            number[0, at] = visual.tokens / visual.kept
    mm.uncompress(model)
    assert number[1].max() > 2
    turn = angles(model, torch.arange(len(live))[live])
    apart = (2 - (turn[:, None] - turn[None]).cos().mean(-1)).log()
    bias = number[:, live].log()[:, None] + apart
    least = torch.finfo(torch.float32).min
    masks = torch.where(torch.ones_like(apart, dtype=torch.bool).tril(), bias, least)
    language_model, depth = model.model.language_model, len(model.model.language_model.layers)
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask[None, None]}),
            with_kwargs=True,
        )
        for layer, mask in zip(language_model.layers, [masks[0], *[masks[1]] * (depth - 1)], strict=True)
    ]
    found = language_model(
        inputs_embeds=embeds[live][None], position_ids=torch.arange(len(live))[live][None]
    ).last_hidden_state
    for handle in handles:
        handle.remove()
    close(logits[:, live], model.lm_head(found))
    assert (logits[:, live] - stock[:, live]).abs().max() > 0.1


def test_distances_of_rotary_tables() -> None:
    """As large as the card says for 128 dimensions, whatever the tables are multiplied by."""
    place = torch.tensor([0, 1, 10, 100, 576, 2000])
    for base, wanted in ((1e4, [0, 0.03, 0.29, 0.42, 0.57, 0.68]), (1e6, [0, 0.02, 0.20, 0.35, 0.43, 0.52])):
        turn = (place[:, None] * base ** -(torch.arange(0, 128, 2) / 128))[None]
        bias = distance_bias(0.8 * turn.cos(), 0.8 * turn.sin())[0]
        torch.testing.assert_close(bias[0], torch.tensor(wanted), atol=0.006, rtol=0)
        assert torch.equal(bias, bias.T) or (bias - bias.T).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_nothing_is_left_of_it_when_the_prompt_is_read(family: str) -> None:
    """The cache decodes as if it had no masses; padded batches, positions on several axes; keep=1.0 is the stock model."""
    model = mm.compress(build(family), PLAN)
    inputs = prompts(model, family, samples(family))
    out = model(**inputs, use_cache=True)
    assert all(layer.ledger.mass is None for layer in out.past_key_values.layers)
    assert all(visual.sizes.sum() == visual.tokens for visual in mm.trace(model).visuals)
    tokens = model.generate(**inputs, **GREEDY)
    assert tokens.shape[1] > inputs["input_ids"].shape[1]
    mm.compress(model, "plan(restore(host='divprune', keep=0.4), mass=False)")
    plain = model(**inputs).logits
    mm.compress(model, "restore(host='divprune', keep=0.4)")
    weighed = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    for other in (plain, weighed):
        assert (out.logits[real] - other[real]).abs().max() > 1e-2
    mm.compress(model, "restore(host='divprune', keep=1.0, calibrate=True)")
    whole = model(**inputs).logits
    assert torch.equal(whole, mm.uncompress(model)(**inputs).logits)


def test_what_cannot_be_calibrated_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate='yes': give True"):
        mm.Restore(calibrate="yes")  # type: ignore[arg-type]
    assert as_pipeline(repr(as_pipeline(PLAN))) == as_pipeline(PLAN) and not as_pipeline(PLAN).weighs
    model = build("llava")
    for plan, error, message in (
        (f"plan({PLAN}, mass=True)", ValueError, "weights of its own"),
        (f"voronoi(keep=0.5) >> {PLAN}", ValueError, "weights of its own"),
        (f"{PLAN} >> fastv(layer=2, keep=0.5)", NotImplementedError, "would have to follow it"),
    ):
        with pytest.raises(error, match=message):
            mm.compress(model, plan)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(NotImplementedError, match="'flash_attention_2' does not take"):
        mm.compress(model, PLAN)
