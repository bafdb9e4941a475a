# SPDX-License-Identifier: Apache-2.0
"""downsample: smaller pictures for the encoder, against the stock model's own features of pictures made smaller by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm

from .families import FAMILIES, QWEN, VIDEO_FAMILIES, build, image, prompts, video


def entering(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The embeddings [B, S, D] that the language model is given."""
    seen: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        hook.remove()
    return seen[0]


def smaller(pictures: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(pictures, (height, width), mode="bicubic", antialias=True)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "internvl", "internvl_qwen3"])
def test_fixed_size_towers_see_the_smaller_picture(family: str) -> None:
    model = build(family)
    picture = ("image", 28, 28) if family == "llava" else ("image", 1, 1)
    inputs = prompts(model, family, [[3, picture, 4]], mask=False)
    pixels = inputs["pixel_values"]
    small = smaller(pixels, pixels.shape[-2] // 2, pixels.shape[-1] // 2)
    if family == "llava":
        states = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states
        wanted = model.model.multi_modal_projector(states[-2][:, 1:])[0]
    else:
        states = model.model.vision_tower(small).last_hidden_state[:, 1:]
        side = math.isqrt(states.shape[1])
        shuffled = model.model.pixel_shuffle(states.view(len(states), side, side, -1), scale_factor=0.5)
        wanted = model.model.multi_modal_projector(shuffled.flatten(1, 2))[0]
    embeds = entering(mm.compress(model, "downsample", keep=0.25), inputs)
    tokens = mm.trace(model).visuals[0].tokens
    first = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0, 0])
    assert embeds.shape[1] == inputs["input_ids"].shape[1] - tokens + tokens // 4
    torch.testing.assert_close(embeds[0, first : first + tokens // 4], wanted)


@torch.no_grad()
@pytest.mark.parametrize("family", QWEN)
@pytest.mark.parametrize("kind", ["image", "video"])
def test_native_resolution_towers_see_the_smaller_picture(family: str, kind: str) -> None:
    model = build(family)
    part = ("image", 8, 12) if kind == "image" else ("video", 2, 8, 12)
    inputs = prompts(model, family, [[3, part, 4]], mask=False)
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    frames = 1 if kind == "image" else 2
    patches = inputs[name]
    # [frames, rows, columns, rows in unit, columns in unit, colour, time, y, x] of a patch, put together the slow way
    cells = patches.view(frames, 4, 6, 2, 2, 3, 2, 4, 4)
    whole = torch.zeros(frames, 2, 3, 32, 48)
    for f in range(frames):
        for y in range(8):
            for x in range(12):
                patch = cells[f, y // 2, x // 2, y % 2, x % 2]
                whole[f, :, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4] = patch.transpose(0, 1)
    small = smaller(whole.flatten(0, 1), 16, 24).view(frames, 2, 3, 16, 24)
    flat = []
    for f in range(frames):
        for unit_y in range(2):
            for unit_x in range(3):
                for y in range(2 * unit_y, 2 * unit_y + 2):
                    for x in range(2 * unit_x, 2 * unit_x + 2):
                        flat.append(small[f, :, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].transpose(0, 1).flatten())
    wanted = model.model.visual(torch.stack(flat), grid_thw=torch.tensor([[frames, 4, 6]])).pooler_output
    embeds = entering(mm.compress(model, "downsample", keep=0.25), inputs)
    token = model.config.image_token_id if kind == "image" else model.config.video_token_id
    source = mm.trace(model).call.groups[0].source
    assert source is not None
    visual = inputs["input_ids"][0, source[0]] == token  # Qwen3-VL writes a time between frames
    torch.testing.assert_close(embeds[0, visual], wanted, atol=2e-5, rtol=2e-5)
    assert [visual.kept for visual in mm.trace(model).visuals] == [len(wanted)]


@torch.no_grad()
@pytest.mark.parametrize("keep", [0.2, 0.37, 0.5, 0.9])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_budget_in_ragged_batches(family: str, keep: float) -> None:
    model = build(family)
    samples = [[2, image(family), 3], [1, image(family, other=True), 2, image(family), 4]]
    inputs = prompts(model, family, samples)
    with mm.compressed(model, "downsample", keep=keep):
        together = model(**inputs).logits[:, -1]
        for visual in mm.trace(model).visuals:
            tiles = 1 if family != "internvl" and family != "internvl_qwen3" else len(visual.layout.views)
            assert visual.kept == tiles * max(1, round(keep * visual.tokens / tiles))
        alone = [model(**prompts(model, family, [s], seed=0)).logits[:, -1] for s in samples]
    assert together.shape == torch.cat(alone).shape
    assert together.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_keep_all_is_bit_identical(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, [[2, image(family), 3]])
    stock = model(**inputs).logits
    with mm.compressed(model, "downsample", keep=1.0):
        assert torch.equal(model(**inputs).logits, stock)


@torch.no_grad()
@pytest.mark.parametrize("family", [*VIDEO_FAMILIES])
def test_videos(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, [[2, video(family), 3]])
    with mm.compressed(model, "downsample(keep=0.25) >> divprune(keep=0.5) >> fastv(layer=2, keep=0.5)"):
        assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
        (visual,) = mm.trace(model).visuals
    assert visual.kept == max(1, round(0.5 * round(0.25 * visual.tokens)))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="a float in"):
        mm.Downsample(keep=16)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one pixel stage or one encoder stage"):
        mm.as_pipeline("downsample >> tome")
    with pytest.raises(NotImplementedError, match="gives smaller pictures"):
        mm.compress(build("llava"), "downsample(keep=0.5) >> visionzip(keep=0.5)")
    with pytest.raises(NotImplementedError, match="encoder_features"):
        mm.compress(build("qwen3_vl"), "downsample(keep=0.5) >> mmtok(keep=0.5)")


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None)
def test_the_grid_is_near_the_wanted_size(rows: int, columns: int, keep: float) -> None:
    r, c = mm.Downsample(keep=keep).grid(rows, columns)
    assert 1 <= r <= rows and 1 <= c <= columns
    longest = max(1, math.ceil(max(rows, columns) * keep**0.5))
    assert abs(r * c - keep * rows * columns) <= max(1, longest)
