# SPDX-License-Identifier: Apache-2.0
"""Layouts against the features themselves: a picture whose colours are its coordinates goes the real road."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from mmcompress.adapters import Adapter, adapter_for
from mmcompress.adapters.layouts import AnyRes, best_resolution, tiled
from PIL import Image
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mmcompress.runtime.adapter import Run
from mmcompress.visuals import View

from .families import PINPOINTS, build

SIZES = [(50, 50), (20, 50), (50, 20), (64, 640), (640, 64), (33, 77), (301, 199), (28, 28), (5, 64), (90, 84)]
FLAT = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def coordinates(height: int, width: int) -> Image.Image:
    """Red is the horizontal, green the vertical place of a pixel, from 0 to 255; blue is 255 everywhere."""
    y, x = np.mgrid[:height, :width]
    red, green = (x + 0.5) / width * 255, (y + 0.5) / height * 255
    return Image.fromarray(np.stack([red, green, np.full_like(red, 255.0)], -1).round().astype(np.uint8))


class PatchMeans(nn.Module):
    """In place of a vision tower: the mean colour of every patch, behind a CLS token if there is one."""

    def __init__(self, patch: int, prefix: int) -> None:
        super().__init__()
        self.patch, self.prefix = patch, prefix

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        side = pixel_values.shape[-1] // self.patch * self.patch  # a convolution leaves out what is less than a patch
        means = nn.functional.avg_pool2d(pixel_values[..., :side, :side], self.patch).flatten(2).transpose(1, 2)
        hidden = torch.cat([means.new_full((len(means), self.prefix, 3), 9.0), means], 1)
        return BaseModelOutputWithPooling(last_hidden_state=hidden, hidden_states=(hidden,) * 6)


class MeanOfUnit(nn.Module):
    """In place of a projector that fuses four patches: their mean, whatever their order."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-2], -1, 4, 3).mean(-2) if x.shape[-1] == 3 else x.unflatten(-1, (4, 3)).mean(-2)


class Same(nn.Module):
    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def image_inputs(family: str, picture: Image.Image) -> dict[str, Any]:
    import transformers as t

    if family == "llava":
        made = t.CLIPImageProcessor(size={"height": 28, "width": 28}, do_center_crop=False, **FLAT)
    elif family in ("llava_next", "llava_next_video"):
        crop = {"height": 28, "width": 28}
        made = t.LlavaNextImageProcessor(
            size={"shortest_edge": 28}, crop_size=crop, image_grid_pinpoints=PINPOINTS[family], **FLAT
        )
    elif family == "llava_onevision":
        made = t.LlavaOnevisionImageProcessor(
            size={"height": 28, "width": 28}, image_grid_pinpoints=PINPOINTS[family], **FLAT
        )
    elif family.startswith("internvl"):
        made = t.GotOcr2ImageProcessor(
            size={"height": 32, "width": 32}, crop_to_patches=True, min_patches=1, max_patches=12, **FLAT
        )
    else:
        made = t.Qwen2VLImageProcessor(
            patch_size=4,
            merge_size=2,
            temporal_patch_size=2,
            size={"shortest_edge": 256, "longest_edge": 64 * 64},
            **FLAT,
        )
    return dict(made(images=picture, return_tensors="pt"))


def see_through(model: Any, family: str) -> None:
    """Replace what computes by what shows where it came from; the road of the features stays the model's own."""
    base = model.model
    if hasattr(base, "visual"):
        visual = base.visual

        class Patches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.dtype = nn.Parameter(torch.zeros(1))  # the model asks its parameters for their type

            def forward(self, x: Tensor) -> Tensor:
                return x.view(len(x), 3, -1).mean(-1)

        visual.patch_embed = Patches()
        visual.blocks = nn.ModuleList([Same() for _ in visual.blocks])
        visual.merger = MeanOfUnit()
        if hasattr(visual, "pos_embed"):
            visual.pos_embed = nn.Embedding(visual.pos_embed.num_embeddings, 3)
            visual.pos_embed.weight.data.zero_()
            visual.deepstack_merger_list = nn.ModuleList([MeanOfUnit() for _ in visual.deepstack_merger_list])
        return
    internvl = family.startswith("internvl")
    base.vision_tower = PatchMeans(4 if internvl else 7, 0 if family == "llava_onevision" else 1)
    base.multi_modal_projector = MeanOfUnit() if internvl else nn.Identity()
    if hasattr(base, "image_newline"):
        base.image_newline = nn.Parameter(torch.full((3,), 7.0))


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "family", ["llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"]
)
def test_tokens_lie_where_their_colours_say(family: str, size: tuple[int, int]) -> None:
    model = build(family)
    adapter = adapter_for(model)
    assert isinstance(adapter, Adapter)
    inputs = image_inputs(family, coordinates(*size))
    see_through(model, family)
    output = model.model.get_image_features(**inputs, return_dict=True)
    found = list(output.pooler_output)
    encoded = adapter.encoded("image", inputs, [len(f) for f in found])
    adapter.assemble(encoded, [Run(0, 0, sum(len(f) for f in found))])
    (layout,) = encoded.layouts
    tokens = torch.cat(found)
    assert len(tokens) == layout.tokens
    assert (tokens[list(layout.structural)] == 7).all()  # newlines and nothing else
    shown = tokens[layout.patch_tokens()]
    boxes = layout.boxes()
    inside = (boxes >= -1e-6).all(1) & (boxes <= 1 + 1e-6).all(1)
    if family == "llava_onevision" and layout.views[-1].role == "tiles":
        inside &= shown[:, 2] > 0.999  # shrinking blurs the black border into its neighbours
    assert inside.sum() >= 8
    centers = torch.stack([(boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2], 1)
    widths = torch.stack([boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]], 1)
    difference = (shown[:, :2] - centers).abs() / (0.25 * widths + 0.02)
    assert (difference[inside] < 1).all(), difference[inside].max()
    assert (shown[inside, 2] > 0.98).all()  # no padding inside the picture


@torch.no_grad()
@pytest.mark.parametrize("grid", [(1, 2), (2, 1), (2, 2), (2, 3), (3, 2), (1, 6), (6, 1), (3, 4), (4, 3)])
def test_internvl_finds_out_how_its_tiles_lie(grid: tuple[int, int]) -> None:
    """Six tiles may be 2 x 3 or 3 x 2: only the pictures tell, also where they show noise."""
    import transformers as t

    rows, columns = grid
    noise = np.random.default_rng(0).integers(0, 256, (4 * rows, 4 * columns, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((columns * 64, rows * 64), Image.Resampling.BICUBIC)
    processor = t.GotOcr2ImageProcessor(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=rows * columns, min_patches=rows * columns
    )
    inputs = dict(processor(images=picture, return_tensors="pt"))
    adapter = adapter_for(build("internvl"))
    assert isinstance(adapter, Adapter)
    tiles = len(inputs["pixel_values"])
    assert tiles == rows * columns + 1
    encoded = adapter.encoded("image", inputs, [16] * tiles)
    adapter.assemble(encoded, [Run(0, 0, 16 * tiles)])
    assert encoded.layouts == [tiled(rows, columns, 4)]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", SIZES)
def test_packing_equals_that_of_the_model(family: str, size: tuple[int, int]) -> None:
    model = build(family)
    most = 9 if family == "llava_onevision" else None
    cut = AnyRes(size, tuple((h, w) for h, w in PINPOINTS[family]), 28, 7, most_tiles=most)
    views = torch.randn(1 + cut.tiles[0] * cut.tiles[1], 16, 64)
    options: dict[str, Any] = {"vision_feature_select_strategy": "default"} if most is None else {}
    (packed,), _ = model.model.pack_image_features(
        [views], torch.tensor([size]), image_newline=model.model.image_newline, **options
    )
    layout = cut.layout()
    assert torch.equal(packed[layout.patch_tokens()], cut.pack(views))
    nearest = cut.pack(torch.arange(views.shape[0] * 16).view(-1, 16, 1), nearest=True)
    assert nearest.dtype == torch.int64 and len(nearest) == layout.cells


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next_video", "llava_onevision", "qwen2_vl", "qwen3_vl"])
def test_video_frames_follow_each_other(family: str) -> None:
    model = build(family)
    adapter = adapter_for(model)
    assert isinstance(adapter, Adapter)
    if family.startswith("qwen"):
        cells, newline = 24, ()
        arguments: dict[str, Any] = {"video_grid_thw": torch.tensor([[3, 8, 12]])}
        (layout,) = adapter.encoded("video", arguments, [72]).layouts
        assert layout.views == (View((4, 6), role="frame"),) * 3
    else:
        arguments = {"pixel_values_videos": torch.randn(1, 3, 3, 28, 28)}
        features = model.model.get_video_features(arguments["pixel_values_videos"], return_dict=True).pooler_output
        encoded = adapter.encoded("video", arguments, [len(f) for f in features])
        cells, newline = 4, (12,) if family == "llava_onevision" else ()
        (layout,) = encoded.layouts
        assert layout.views == (View((2, 2), role="frame"),) * 3
    assert layout.structural == newline
    assert layout.view_of().tolist() == [0] * cells + [1] * cells + [2] * cells


@pytest.mark.parametrize("most", [2, 4, 6])
def test_best_resolution_is_that_of_transformers(most: int) -> None:
    from transformers.image_processing_utils import select_best_resolution

    sides = range(1, most + 1)
    grids = [(336 * h, 336 * w) for h in sides for w in sides if h * w <= most or most == 6]
    numbers = random.Random(most)
    usual = [(1, 1), (1, 4000), (4000, 1), (2, 3), (336, 336), (672, 672), (1344, 336), (480, 640), (1080, 1920)]
    sizes = usual + [tuple(numbers.randint(1, 10 ** numbers.randint(1, 4)) for _ in "hw") for _ in range(3000)]
    for pinpoints in (grids, grids[::-1], grids + grids[:2], grids[:1]):
        for size in sizes:
            assert best_resolution(size, tuple(pinpoints)) == select_best_resolution(size, pinpoints), size


def test_seams_and_tiles_of_cells() -> None:
    cut = AnyRes((50, 50), ((56, 56),), 28, 7)
    thumbnail, tiles = cut.layout().views
    assert (thumbnail.role, tiles.role, tiles.grid, tiles.seams) == ("thumbnail", "tiles", (8, 8), ((4.0,), (4.0,)))
    numbers = tiles.tiles().view(8, 8)
    assert numbers[0].tolist() == [0] * 4 + [1] * 4 and numbers[7].tolist() == [2] * 4 + [3] * 4
    assert (thumbnail.tiles() == 0).all()
    padded = AnyRes((20, 50), ((56, 56),), 28, 7)
    (rows, _), grid = padded.layout().views[1].seams, padded.grid
    assert grid == (4, 8) and rows == (2.0,)  # two of the eight rows are cut off on each side
