# SPDX-License-Identifier: Apache-2.0
"""Pictures of several sizes in one packed row (Pixtral, MiniCPM-V) or in padded rows (Gemma 4, LFM2-VL), and row breaks."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from mmcompress.adapters import adapter_for
from torch import Tensor
from transformers import PixtralVisionConfig

import mmcompress as mm
from mmcompress.budget import resolve

from .architectures import CLASSES, IMAGE, OLDEST, config, pictures_of, randomised
from .test_signals import SEEN

BREAK, END = 152, 153
PIXTRAL = ("mistral3", "pixtral", "lighton_ocr")
KINDS = (*PIXTRAL, "lfm2_vl", "gemma4", "minicpmv4_6")
SIZES = [(6, 12), (6, 6), (12, 6)]
"""Of the pictures of a prompt, in patches (of MiniCPM-V: behind the merger in its encoder)."""


def build(kind: str, attention: str | None = None) -> Any:
    """Mistral 3 without a window, as it is released; Pixtral-12B; LightOnOCR."""
    name = "llava" if kind == "pixtral" else kind
    if name not in CLASSES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    if OLDEST and kind == "minicpmv4_6":
        pytest.skip("transformers 5.17 encodes pictures of one size only")
    made = config(name)
    if kind == "mistral3":
        made.text_config.sliding_window = None
    if kind == "minicpmv4_6":
        made.vision_config.insert_layer_id = 0
    if kind == "pixtral":
        made.vision_config = PixtralVisionConfig(**config("mistral3").vision_config.to_dict())
        made.vision_feature_layer, made.vision_feature_select_strategy = -1, "full"
    torch.manual_seed(0)
    wanted = {} if attention is None else {"attn_implementation": attention}
    return randomised(getattr(transformers, CLASSES[name])._from_config(made, **wanted).eval())


def given(model: Any, numbers: list[int], padding: int = 0) -> dict[str, Tensor]:
    """Pictures of the sizes of SIZES; Pixtral: padded to one square, else to the patches of the largest and `padding` more."""
    patch, sizes = model.config.vision_config.patch_size, [SIZES[n] for n in numbers]
    if hasattr(adapter_for(model).tower, "patch_conv"):
        side = max(map(max, SIZES)) * patch
        return {"pixel_values": pictures_of(numbers, 3, side, side), "image_sizes": torch.tensor(sizes) * patch}
    if model.config.model_type == "minicpmv4_6":
        sizes = [(2 * h, 2 * w) for h, w in sizes]
        strips = [
            pictures_of([n], 3, patch, 300 * patch)[0, ..., : h * w * patch]
            for n, (h, w) in zip(numbers, sizes, strict=True)
        ]
        return {"pixel_values": torch.cat(strips, -1)[None], "target_sizes": torch.tensor(sizes).int()}
    longest = max(h * w for h, w in sizes) + padding
    pixels = torch.zeros(len(numbers), longest, 3 * patch**2)
    places = torch.full((len(numbers), longest, 2), -1)
    for row, (n, (h, w)) in enumerate(zip(numbers, sizes, strict=True)):
        pixels[row, : h * w] = pictures_of([n], 200, 3 * patch**2)[0, : h * w]
        grid = torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")
        places[row, : h * w] = torch.stack(grid, -1).flatten(0, 1)
    if "image_position_ids" in inspect.signature(model.model.get_image_features).parameters:
        return {"pixel_values": pixels, "image_position_ids": places}
    mask = (places[..., 0] >= 0).long()
    return {"pixel_values": pixels, "spatial_shapes": torch.tensor(sizes), "pixel_attention_mask": mask}


def prompt(model: Any, parts: list[int | str]) -> dict[str, Tensor]:
    """An int is so many words, a string the picture of that number, with row breaks where the model has them."""
    side = adapter_for(model).side
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
@pytest.mark.parametrize("kind", PIXTRAL)
def test_a_picture_is_one_visual_and_its_row_breaks_are_no_words(kind: str) -> None:
    model = build(kind)
    side = adapter_for(model).side
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
@pytest.mark.parametrize("kind", PIXTRAL[:2])
def test_a_question_in_front_of_its_picture_is_whole(kind: str) -> None:
    """Nothing opens a picture, so the word in front of it is one; the token that ends it is none."""
    model = mm.compress(build(kind), "text_spy(keep=0.5)")
    model(**prompt(model, [5, "0"]))
    words = model.get_input_embeddings()(torch.arange(5, 10))
    torch.testing.assert_close(SEEN["visuals"]["text_embeddings"][0], words)


def tokens(model: Any, numbers: list[int], padding: int = 0) -> tuple[Tensor, ...]:
    """What the encoder makes of pictures."""
    return tuple(model.model.get_image_features(**given(model, numbers, padding), return_dict=True).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("proportional", [True, False])
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_merge_each_by_itself(kind: str, attention: str | None, proportional: bool) -> None:
    """Together, with padding and without, as alone; blocks run on what is left of the longest row, or of all in one row."""
    model = build(kind, attention)
    stock, side = tokens(model, [0, 1, 2]), adapter_for(model).side
    if proportional and adapter_for(model).bias_argument is None:
        with pytest.raises(NotImplementedError, match="adds a bias per key"):
            mm.compress(model, "tome", keep=0.5, proportional=True)
        return
    with mm.compressed(model, "tome", r=0, proportional=proportional):
        assert all(map(torch.equal, tokens(model, [0, 1, 2]), stock))
    mm.compress(model, "tome", keep=0.5, proportional=proportional)
    lengths: list[int] = []
    for block in adapter_for(model).blocks:
        block.mlp.register_forward_pre_hook(lambda m, args: lengths.append(args[0].shape[1]))
    together = tokens(model, [0, 1, 2])
    left = [resolve(0.5, h * w // side**2) for h, w in SIZES]
    assert lengths == sorted(lengths, reverse=True)
    last = lengths[-1] // side**2
    assert last == sum(left) if adapter_for(model).packed else last in (max(left), max(left) + 1)  # a place for padding
    padded = tokens(model, [0, 1, 2], padding=side**2 * 3)
    for n, found in enumerate(together):
        (alone,) = tokens(model, [n])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(padded[n], alone, rtol=1e-4, atol=1e-4)
        distinct = torch.unique((found / 1e-4).round(), dim=0)  # a cluster shows at all its members
        assert len(distinct) == left[n]
        assert (found - stock[n]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("minicpm")])
def test_merging_what_is_the_same_leaves_no_trace_if_sizes_count(kind: str) -> None:
    """Patches of two kinds and no positions: tokens stay as they were with proportional attention only."""
    model = build(kind)
    for name, part in (*model.named_parameters(), *model.named_buffers()):
        if "vision" in name and ("position_embedding" in name or "inv_freq" in name):
            part.zero_()
    inputs, side = given(model, [0, 1]), adapter_for(model).side
    pixels = inputs["pixel_values"].fill_(0.3)
    if pixels.dim() == 4:
        pixels[..., : pixels.shape[-1] // 2] = -1.0
    else:
        pixels[:, : 2 * 12 * side // 2] = -1.0  # rows of tokens
    stock = torch.cat(list(model.model.get_image_features(**inputs, return_dict=True).pooler_output))
    for proportional in (True, False):
        with mm.compressed(model, "tome", r=1, proportional=proportional):
            merged = torch.cat(list(model.model.get_image_features(**inputs, return_dict=True).pooler_output))
        assert ((merged - stock).abs().max() < 1e-4 * stock.abs().max()) == proportional


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_signals_behind_merged_patches_are_those_of_their_clusters(kind: str) -> None:
    model = build(kind)
    mm.compress(model, "tome(r=(2, 1, 0)) >> visionzip(keep=2)")
    encoded = model.model.get_image_features(**given(model, [0, 1, 2]), return_dict=True).mmcompress
    assert encoded.left == [h * w // adapter_for(model).unit - 3 for h, w in SIZES]
    for cluster, values in zip(encoded.clusters, encoded.signals["received_attention"], strict=True):
        assert len(cluster.unique()) == len(values) - 3
        same = cluster[:, None] == cluster[None]
        torch.testing.assert_close((values[:, None] - values[None])[same], torch.zeros(int(same.sum())))
    assert len((encoded.signals["received_attention"][0] / 1e-5).round().unique()) > 1


@torch.no_grad()
def test_patches_that_make_no_token_are_refused_where_units_merge() -> None:
    model = build("mistral3")
    patch = model.config.vision_config.patch_size
    inputs = {"pixel_values": torch.randn(1, 3, 6 * patch, 5 * patch), "image_sizes": torch.tensor([[6, 5]]) * patch}
    mm.compress(model, "visionzip(keep=3)")
    output = model.model.get_image_features(**inputs, return_dict=True)
    assert output.mmcompress.layouts[0].cells == len(output.mmcompress.signals["received_attention"][0]) == 6
    mm.compress(model, "tome(keep=0.5)")
    with pytest.raises(NotImplementedError, match="6 patches make no visual token"):
        model.model.get_image_features(**inputs, return_dict=True)


@torch.no_grad()
def test_pictures_without_sizes_are_refused() -> None:
    model = mm.compress(build("pixtral"), "divprune(keep=0.5)")
    with pytest.raises(ValueError, match="pass image_sizes"):
        model.model.get_image_features(pixel_values=torch.randn(1, 3, 32, 32))


@torch.no_grad()
def test_without_an_encoder_every_patch_is_a_token_in_its_place() -> None:
    """Gemma 4 unified: rows and columns are those of the places, without padding; a film is its frames."""
    model = mm.compress(build("gemma4_unified"), "divprune(keep=0.5)")
    side = model.config.vision_config.model_patch_size
    places = torch.full((2, 20, 2), -1)
    for row, (h, w) in enumerate([(4, 5), (2, 3)]):
        grid = torch.meshgrid(torch.arange(w), torch.arange(h), indexing="xy")
        places[row, : h * w] = torch.stack(grid, -1).flatten(0, 1)
    pixels = pictures_of([1, 2], 20, 3 * side**2)
    output = model.model.get_image_features(pixels, places, return_dict=True)
    assert [layout.views[0].grid for layout in output.mmcompress.layouts] == [(4, 5), (2, 3)]
    at = int((places[1] == torch.tensor([2, 1])).all(-1).nonzero())
    pixels[1, at] += 1
    again = model.model.get_image_features(pixels, places, return_dict=True).pooler_output
    changed = [(new - old).abs().amax(-1) > 0 for new, old in zip(again, output.pooler_output, strict=True)]
    assert not changed[0].any() and changed[1].view(2, 3).nonzero().tolist() == [[1, 2]]
