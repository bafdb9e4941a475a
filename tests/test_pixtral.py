# SPDX-License-Identifier: Apache-2.0
"""Pixtral towers: row breaks, pictures of several sizes in one packed row, and Pixtral-12B, which is a LLaVA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from mmcompress.adapters import adapter_for
from torch import Tensor
from transformers import PixtralVisionConfig

import mmcompress as mm
from mmcompress.budget import resolve

from .architectures import CLASSES, IMAGE, config, pictures_of, randomised
from .test_signals import SEEN

BREAK, END = 152, 153
KINDS = ("mistral3", "pixtral", "lighton_ocr")
SIZES = [(8, 12), (4, 8), (12, 4)]
"""Of the pictures of a prompt, in patches."""


def build(kind: str, attention: str = "sdpa") -> Any:
    """Mistral 3 without a window, as it is released; Pixtral-12B; LightOnOCR."""
    name = "llava" if kind == "pixtral" else kind
    if name not in CLASSES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    made = config(name)
    if kind == "mistral3":
        made.text_config.sliding_window = None
    if kind == "pixtral":
        made.vision_config = PixtralVisionConfig(**config("mistral3").vision_config.to_dict())
        made.vision_feature_layer, made.vision_feature_select_strategy = -1, "full"
    torch.manual_seed(0)
    return randomised(getattr(transformers, CLASSES[name])._from_config(made, attn_implementation=attention).eval())


def given(model: Any, numbers: list[int]) -> dict[str, Tensor]:
    """Pictures of the sizes of SIZES, padded to one square."""
    patch, sizes = model.config.vision_config.patch_size, [SIZES[n] for n in numbers]
    side = max(map(max, SIZES)) * patch
    return {
        "pixel_values": pictures_of(numbers, 3, side, side),
        "image_sizes": torch.tensor(sizes) * patch,
    }


def prompt(model: Any, parts: list[int | str]) -> dict[str, Tensor]:
    """An int is so many words, a string the picture of that number, with row breaks where the model has them."""
    side = getattr(model.config, "spatial_merge_size", 1)
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += list(range(5, 5 + part))
            continue
        rows, columns = (n // side for n in SIZES[int(part)])
        if not adapter_for(model).delimited:
            ids += [IMAGE] * rows * columns
            continue
        ids += ([IMAGE] * columns + [BREAK]) * rows
        ids[-1] = END
    return {"input_ids": torch.tensor([ids]), **given(model, [int(p) for p in parts if isinstance(p, str)])}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_one_visual_and_its_row_breaks_are_no_words(kind: str) -> None:
    model = build(kind)
    side = getattr(model.config, "spatial_merge_size", 1)
    mm.compress(model, "divprune(keep=0.5) >> text_spy(keep=0.5)")
    inputs = prompt(model, [3, "0", 2, "1", 4])
    model(**inputs)
    shown = mm.trace(model).visuals
    cells = [SIZES[n][0] * SIZES[n][1] // side**2 for n in (0, 1)]
    assert [visual.tokens for visual in shown] == cells
    assert [visual.layout.views[0].grid for visual in shown] == [tuple(n // side for n in SIZES[i]) for i in (0, 1)]
    kept = mm.trace(model).call.groups[-1].source[0]
    ids = inputs["input_ids"][0]
    gone = torch.ones(len(ids), dtype=torch.bool).index_fill(0, kept, False)
    assert bool((ids[gone] == IMAGE).all()) and int(gone.sum()) == sum(n - resolve(0.5, resolve(0.5, n)) for n in cells)
    words = model.get_input_embeddings()(torch.arange(5, 9))
    torch.testing.assert_close(SEEN["visuals"]["text_embeddings"][0], words)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_question_in_front_of_its_picture_is_whole(kind: str) -> None:
    """Nothing opens a picture, so the word in front of it is one; the token that ends it is none."""
    model = mm.compress(build(kind), "text_spy(keep=0.5)")
    model(**prompt(model, [5, "0"]))
    words = model.get_input_embeddings()(torch.arange(5, 10))
    torch.testing.assert_close(SEEN["visuals"]["text_embeddings"][0], words)


def tokens(model: Any, numbers: list[int]) -> tuple[Tensor, ...]:
    """What the encoder makes of pictures."""
    features = model.model.get_image_features(**given(model, numbers), return_dict=True).pooler_output
    return tuple(features)


@torch.no_grad()
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_of_one_row_merge_each_by_itself(kind: str, attention: str, proportional: bool) -> None:
    model = build(kind, attention)
    stock = tokens(model, [0, 1, 2])
    with mm.compressed(model, "tome", r=0, proportional=proportional):
        assert all(map(torch.equal, tokens(model, [0, 1, 2]), stock))
    mm.compress(model, "tome", keep=0.5, proportional=proportional)
    lengths: list[int] = []
    for block in adapter_for(model).blocks:
        block.mlp.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    together = tokens(model, [0, 1, 2])
    side = getattr(model.config, "spatial_merge_size", 1)
    assert lengths == sorted(lengths, reverse=True) and lengths[-1] == sum(h * w for h, w in SIZES) // 2
    for n, found in enumerate(together):
        (alone,) = tokens(model, [n])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        distinct = torch.unique((found / 1e-4).round(), dim=0)  # a cluster shows at all its members
        assert len(distinct) == SIZES[n][0] * SIZES[n][1] // side**2 // 2
        assert (found - stock[n]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_merging_what_is_the_same_leaves_no_trace_if_sizes_count(kind: str) -> None:
    """Patches of two kinds and no positions: tokens stay as they were with proportional attention only."""
    model = build(kind)
    adapter_for(model).tower.patch_positional_embedding.inv_freq.zero_()
    inputs = given(model, [0])
    inputs["pixel_values"] = torch.full_like(inputs["pixel_values"], 0.3)
    inputs["pixel_values"][..., : inputs["pixel_values"].shape[-1] // 3] = -1.0
    stock = model.model.get_image_features(**inputs, return_dict=True).pooler_output[0]
    for proportional in (True, False):
        with mm.compressed(model, "tome", r=3, proportional=proportional):
            merged = model.model.get_image_features(**inputs, return_dict=True).pooler_output[0]
        assert ((merged - stock).abs().max() < 1e-4) == proportional


@torch.no_grad()
def test_patches_that_make_no_token_are_refused_where_units_merge() -> None:
    model = build("mistral3")
    patch = model.config.vision_config.patch_size
    inputs = {"pixel_values": torch.randn(1, 3, 6 * patch, 5 * patch), "image_sizes": torch.tensor([[6, 5]]) * patch}
    mm.compress(model, "visionzip(keep=3)")
    output = model.model.get_image_features(**inputs, return_dict=True)
    assert output.mmcompress.layouts[0].cells == len(output.mmcompress.signals["received_attention"][0]) == 6
    mm.compress(model, "tome(keep=0.5)")
    with pytest.raises(NotImplementedError, match="6 of the 30 patches make no visual token"):
        model.model.get_image_features(**inputs, return_dict=True)


@torch.no_grad()
def test_pictures_without_sizes_are_refused() -> None:
    model = mm.compress(build("pixtral"), "divprune(keep=0.5)")
    with pytest.raises(ValueError, match="pass image_sizes"):
        model.model.get_image_features(pixel_values=torch.randn(1, 3, 32, 32))
