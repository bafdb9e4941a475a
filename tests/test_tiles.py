# SPDX-License-Identifier: Apache-2.0
"""Tiles of one picture: found by where they stand in the prompt and by what they show, cut by processors of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from mmcompress.adapters import Adapter, adapter_for
from mmcompress.adapters.layouts import tiled
from PIL import Image
from torch import Tensor

import mmcompress as mm
from mmcompress.runtime.adapter import Run
from mmcompress.visuals import Layout

from .architectures import IMAGE, OLDEST, build

pytestmark = pytest.mark.skipif(OLDEST, reason="configs are those of the newest transformers")
SIDE = 32
"""Of a tile, in pixels."""


def picture(rows: int, columns: int, seed: int = 0) -> Image.Image:
    """Noise of a few pixels, so that no two parts of it look alike."""
    noise = np.random.default_rng(seed).integers(0, 256, (4 * rows, 4 * columns, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((columns * SIDE, rows * SIDE), Image.Resampling.BICUBIC)


def cut(name: str, images: Sequence[Image.Image]) -> dict[str, Any]:
    """What the image processor of an architecture makes of the pictures of one sample."""
    size = {"height": SIDE, "width": SIDE}
    if name in ("idefics3", "smolvlm"):
        cls = getattr(transformers, {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[name] + "ImageProcessor")
        parts = [
            cls(size={"longest_edge": max(image.size)}, max_image_size={"longest_edge": SIDE})(
                image, return_tensors="pt"
            )
            for image in images
        ]
        return {"pixel_values": torch.cat([part["pixel_values"] for part in parts], 1)}
    if name == "ovis2":
        made = transformers.Ovis2ImageProcessor(size=size, crop_to_patches=True, max_patches=12)
    elif name == "cohere2_vision":
        made = transformers.Cohere2VisionImageProcessor(size=size, max_patches=12)
    else:
        made = transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=12)
    return dict(made(images=list(images), return_tensors="pt"))


def standing(counts: Sequence[int], tokens: int, inside: int, between: int) -> list[Run]:
    """The runs of placeholders of pictures with so many views each in one row, with marks inside and between them."""
    runs: list[Run] = []
    at = 3
    for count in counts:
        for _ in range(count):
            runs.append(Run(0, at, tokens))
            at += tokens + inside
        at += between - inside
    return runs


GRIDS = [(2, 2), (2, 3), (3, 2), (1, 2), (4, 1)]


@pytest.mark.parametrize("name", ["idefics3", "smolvlm", "cohere2_vision", "aya_vision", "ovis2"])
@pytest.mark.parametrize("close", [True, False])
def test_pictures_are_found_in_a_row_of_tiles(name: str, close: bool) -> None:
    """Several pictures of one sample, whole ones among them, beside each other or with text between."""
    sizes = [*GRIDS[:3], (1, 1), (1, 1), *GRIDS[3:]]
    images = [picture(*size, seed) for seed, size in enumerate(sizes)]
    model = build(name)
    adapter = adapter_for(model)
    assert isinstance(adapter, Adapter)
    side = adapter.side // adapter.factor  # type: ignore[attr-defined]
    views = [rows * columns + (rows * columns > 1) for rows, columns in sizes]
    inputs = cut(name, images)
    if "grids" in inputs:  # Ovis cuts in a way of its own
        sizes = [tuple(grid) for grid in inputs["grids"].tolist()]
    encoded = adapter.encoded("image", inputs, [side * side] * sum(views))
    adapter.assemble(encoded, standing(views, side * side, 2, 3 if close else 30))
    assert encoded.layouts == [tiled(*size, side, name == "ovis2") for size in sizes]


def test_pictures_of_their_own_stay_apart() -> None:
    """Close to each other, but none shows the others; of one colour; far from what they show; and in other rows."""
    adapter = adapter_for(build("idefics3"))
    assert isinstance(adapter, Adapter)
    halves = cut("idefics3", [picture(1, 2)])["pixel_values"]
    others = cut("idefics3", [picture(1, 1, seed) for seed in range(5)])["pixel_values"]

    def found(pixels: Tensor, runs: list[Run]) -> int:
        encoded = adapter.encoded("image", {"pixel_values": pixels}, [16] * pixels.shape[1])
        adapter.assemble(encoded, runs)
        return len(encoded.layouts)

    assert found(halves, standing([3], 16, 2, 2)) == 1
    assert found(halves, standing([3], 16, 9, 2)) == 3
    assert found(halves, [Run(0, 3, 16), Run(0, 21, 16), Run(1, 3, 16)]) == 3
    assert found(others, standing([5], 16, 2, 2)) == 5
    assert found(torch.full((1, 3, 3, SIDE, SIDE), 0.5), standing([3], 16, 2, 2)) == 3


def prompt(inputs: dict[str, Any], views: Sequence[int]) -> dict[str, Any]:
    """A row of text and tiles with marks between them."""
    row = [5, 6, 7]
    for count in views:
        for view in range(count):
            row += [10, 11 + view, *[IMAGE] * 16]
        row += [10, 5, 6, 7]
    ids = torch.tensor([row])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": inputs["pixel_values"]}


@torch.no_grad()
@pytest.mark.parametrize("plan", ["visionzip(keep=0.25)", "tome(keep=0.5)", "globalcom2(keep=0.25)"])
def test_the_tiles_of_a_picture_share_a_budget(plan: str) -> None:
    """One visual with tiles and thumbnail, and signals and clusters of them all; a whole picture beside it is another."""
    model = mm.compress(build("smolvlm"), plan)
    inputs = prompt(cut("smolvlm", [picture(2, 2), picture(1, 1, 1)]), [5, 1])
    model(**inputs)
    shown = mm.trace(model).visuals
    keep = float(plan.partition("=")[2][:-1])
    assert [(v.tokens, v.kept) for v in shown] == [(80, round(80 * keep)), (16, round(16 * keep))]
    assert [view.role for view in shown[0].layout.views] == ["tile"] * 4 + ["thumbnail"]
    alone = model(**prompt(cut("smolvlm", [picture(2, 2)]), [5]))
    assert mm.trace(model).visuals[0].kept_cells().tolist() == shown[0].kept_cells().tolist()
    assert torch.isfinite(alone.logits).all()


@pytest.mark.parametrize("close", [True, False])
@pytest.mark.parametrize("name", ["lfm2_vl", "minicpmv4_6"])
def test_pictures_are_found_among_views_of_several_sizes(name: str, close: bool) -> None:
    """The view of the whole keeps the shape of its picture: last of LFM2-VL, first of MiniCPM-V."""
    images = [
        picture(*size, seed)
        for seed, size in enumerate([(2, 2), (2, 3), (1, 1), (1, 1), (1, 2), (3, 2), (1, 1), (4, 1)])
    ]
    if name == "lfm2_vl":
        made = transformers.Lfm2VlImageProcessor(
            tile_size=SIDE, encoder_patch_size=4, downsample_factor=2, max_image_tokens=16, min_image_tokens=4,
            max_num_patches=64,
        )(images=images, return_tensors="pt", return_row_col_info=True)  # fmt: skip
        grids = list(zip(made["image_rows"].tolist(), made["image_cols"].tolist(), strict=True))
    else:
        made = transformers.MiniCPMV4_6ImageProcessor(patch_size=4, scale_resolution=SIDE, max_slice_nums=9)(
            images=images, return_tensors="pt"
        )
        grids = [(max(rows, 1), max(columns, 1)) for rows, columns in made["grids"]]
    assert sum(rows * columns > 1 for rows, columns in grids) >= 4
    adapter = adapter_for(build(name))
    shapes = [(h // adapter.side, w // adapter.side) for h, w in adapter.shapes(made)]  # type: ignore[union-attr]
    encoded = adapter.encoded("image", dict(made), [h * w for h, w in shapes])  # type: ignore[union-attr]
    runs: list[Run] = []
    at, views = 3, iter(shapes)
    for rows, columns in grids:
        for _ in range(rows * columns + (rows * columns > 1)):
            height, width = next(views)
            runs.append(Run(0, at, height * width))
            at += height * width + 1
        at += 1 if close else 30
    adapter.assemble(encoded, runs)  # type: ignore[union-attr]
    found, wanted = iter(shapes), []
    for rows, columns in grids:
        places = tiled(rows, columns, 1, name != "lfm2_vl").views
        wanted.append(Layout(tuple(replace(place, grid=next(found)) for place in places)))
    assert encoded.layouts == wanted
