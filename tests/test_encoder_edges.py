# SPDX-License-Identifier: Apache-2.0
"""Edges of signals, merging and adapters: overflow, rounding, bias of merged keys, shrunk and flat pictures, a CLS that stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmcompress.adapters import adapter_for
from mmcompress.adapters.layouts import AnyRes
from mmcompress.adapters.tiles import arrangement
from transformers.models.llava_next.modeling_llava_next import unpad_image

import mmcompress as mm
from mmcompress.runtime.encoder import EncoderFacade
from mmcompress.runtime.signals import VisionTap
from mmcompress.selection import Selection
from mmcompress.stage import InputStage, LayerStage
from mmcompress.visuals import Visuals

from . import families
from .tiny import RAGGED, build, prompts


# ---------------------------------------------------------------------- signals
@torch.no_grad()
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_features_that_overflow_are_refused(value: float) -> None:
    """A projector in float16 gives Inf, not NaN."""
    model = mm.compress(build(), "uniform(keep=0.5)")
    model.model.multi_modal_projector.linear_2.bias[3] = value
    with pytest.raises(ValueError, match=r"row 0 are not finite"):
        model(**prompts(model, RAGGED))


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("keys@0", 0),
        ("keys@-1", 3),
        ("keys@0.0", 0),
        ("keys@0.3", 1),
        ("keys@0.45", 2),
        ("keys@0.95", 3),
        ("keys@1.0", 3),
    ],
)
def test_a_part_of_the_depth_is_the_nearest_block(name: str, block: int) -> None:
    """Of four blocks: 0.3 is 1.2, 0.45 is 1.8; what rounds to the end is the last one."""
    assert list(VisionTap(None, adapter_for(build()), {name}, None).at) == [block]


@torch.no_grad()
def test_attention_received_behind_merges_counts_what_keys_stand_for() -> None:
    """softmax(q k + log size) of the merged tokens, each patch showing the value of its cluster."""
    model = build("siglip")
    inputs = prompts(model, [[5, "image", 4]])
    mm.compress(model, "tome(keep=0.5, proportional=True) >> visionzip(keep=0.5)")
    attention, seen = model.model.vision_tower.encoder.layers[2].self_attn, {}
    for name in ("q_proj", "k_proj"):
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    pixels = inputs["pixel_values"]
    found = model.model.get_image_features(pixels, return_dict=True).mmcompress.signals["received_attention"][0]
    q, k = (seen[name].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj"))
    facade, sizes = model._mmcompress_engine.facade, None
    start = facade.start

    def watched(*args: Any) -> None:
        nonlocal sizes
        start(*args)
        sizes = facade.run()

    facade.start = watched
    handle = model.model.vision_tower.register_forward_pre_hook(watched, with_kwargs=True)
    model.model.get_image_features(pixels, return_dict=True)
    handle.remove()
    assert sizes is not None
    source = sizes.states[2].source[0]
    count = torch.bincount(source).float()
    assert count.max() > 1 and len(count) == q.shape[2] < 16
    received = (q @ k.transpose(2, 3) * attention.scale + count.log()).softmax(-1).mean((1, 2))[0]
    assert (found - received[source]).abs().max() < 1e-5
    plain = (q @ k.transpose(2, 3) * attention.scale).softmax(-1).mean((1, 2))[0]
    assert (found - plain[source]).abs().max() > 1e-2


@dataclass(frozen=True)
class Looks(InputStage):
    """Notes in what precision it is asked."""

    keep: float | int = 0.5
    name = "looks"

    def select(self, visuals: Visuals) -> Selection:
        SEEN.append((torch.is_autocast_enabled("cpu"), (visuals.features @ visuals.features.transpose(1, 2)).dtype))
        return Selection.of(torch.arange(visuals.k).expand(len(visuals.features), -1))


@dataclass(frozen=True)
class LooksInside(LayerStage):
    keep: float | int = 0.5
    layer: int | float = 2
    name = "looks_inside"
    select = Looks.select


SEEN: list[tuple[bool, torch.dtype]] = []


@torch.no_grad()
def test_methods_decide_in_full_precision_under_autocast() -> None:
    model = mm.compress(build(), Looks() >> LooksInside())
    model.model.language_model.layers[1].register_forward_hook(lambda m, a, out: out.float())
    SEEN.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(**prompts(model, RAGGED))
    assert len(SEEN) >= 2 and not any(enabled for enabled, _ in SEEN)


# ---------------------------------------------------------------------- merging
def test_the_longest_segment_that_is_left_is_told_to_flash() -> None:
    """Segments of 8, 4 and 4 patches, of which 4, 4 and 2 are left: max_seqlen as a number and as a tensor."""
    kept = torch.tensor([0, 2, 5, 7, 8, 9, 10, 11, 12, 15])
    tables = (torch.arange(16.0)[:, None], -torch.arange(16.0)[:, None])
    bounds = torch.tensor([0, 8, 12, 16], dtype=torch.int32)
    for longest in (8, torch.tensor(8), None):
        given = {"cu_seqlens": bounds, "position_embeddings": tables, "max_seqlen": longest}
        changed = EncoderFacade._fewer(kept[None], given, 16)
        assert changed["cu_seqlens"].tolist() == [0, 4, 8, 10] and changed["cu_seqlens"].dtype == torch.int32
        assert changed["position_embeddings"][0][:, 0].tolist() == kept.tolist()
        assert changed["max_seqlen"] == (None if longest is None else 4)
        assert type(changed["max_seqlen"]) is type(longest)


@torch.no_grad()
@pytest.mark.parametrize(("keep", "left"), [(5, 46), (7, 65), (9, 83)])
def test_what_is_left_of_a_shrunk_picture_is_rounded(keep: int, left: int) -> None:
    """148 tokens of views of 16 units: 46.25, 64.75 and 83.25 are left with 5, 7 and 9 of each view."""
    model = mm.compress(families.build("llava_onevision"), "tome", keep=keep)
    inputs = families.prompts(model, "llava_onevision", [[2, ("image", 112, 100), 3]])
    encoded = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).mmcompress
    assert (encoded.layouts[0].cells, 16 - sum(encoded.merged)) == (148, keep)
    assert encoded.left == [left]
    model(**inputs)
    assert mm.trace(model).visuals[0].kept == left


# ---------------------------------------------------------------------- LLaVA
@torch.no_grad()
@pytest.mark.parametrize("plan", ["visionzip(keep=0.5)", "tome(keep=0.5)", "prumerge(keep=0.5)", "uniform(keep=0.25)"])
def test_a_cls_token_that_the_model_keeps_is_structural(plan: str) -> None:
    """Strategy "full": 17 tokens, of which the first is CLS: no patch, never chosen, in no signal; dropped only if asked."""
    model = build(vision_feature_select_strategy="full")
    inputs = prompts(model, [[5, "image", 4]])
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    assert (inputs["input_ids"] == 150).sum() == 17
    for structural, extra in (("keep", 1), ("drop", 0)):
        mm.compress(model, plan, structural=structural)
        lengths: list[int] = []
        handle = model.model.language_model.layers[0].register_forward_pre_hook(
            lambda m, a, k, lengths=lengths: lengths.append((a[0] if a else k["hidden_states"]).shape[1]),
            with_kwargs=True,
        )
        model(**inputs)
        handle.remove()
        (visual,) = mm.trace(model).visuals
        assert visual.tokens == 16 and visual.kept == (4 if "uniform" in plan else 8)
        assert lengths == [9 + visual.kept + extra]
        assert visual.layout.structural == (0,)
        signals = model.model.get_image_features(inputs["pixel_values"], return_dict=True).mmcompress.signals
        assert all(len(values[0]) == 16 for name, values in signals.items() if name != "cls_feature")
        if "encoder_features" in signals:
            assert torch.equal(signals["encoder_features"][0], states[0, 1:])


@pytest.mark.parametrize("mode", ["average", "max", "conv"])
def test_signals_are_pooled_as_the_frames_of_a_video(mode: str) -> None:
    model = families.build("llava_next_video")
    model.config.spatial_pool_mode = mode
    adapter: Any = adapter_for(model)
    x = torch.randn(3, 5, 4, 4)
    found = adapter.pool(x, False)
    expected = F.max_pool2d(x, 2) if mode == "max" else F.avg_pool2d(x, 2)
    assert torch.equal(found, expected)
    assert torch.equal(adapter.pool(x, True), F.max_pool2d(x, 2))


@torch.no_grad()
@pytest.mark.parametrize("ratio", [None, "anyres_max_9", "anyres_max_4", "anyres_max_1"])
def test_the_aspect_ratio_may_be_an_argument(ratio: str | None) -> None:
    """OneVision shrinks a picture of 4 x 4 tiles; how far is said by the call, else by the config."""
    model = families.build("llava_onevision")
    inputs = families.prompts(model, "llava_onevision", [[2, ("image", 112, 100), 3]])
    mm.compress(model, "tome(keep=0.5)")
    given = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    output = model.model.get_image_features(**given, **({"vision_aspect_ratio": ratio} if ratio else {}))
    (layout,) = output.mmcompress.layouts
    assert layout.tokens == len(output.pooler_output[0])
    most = int((ratio or "anyres_max_9").removeprefix("anyres_max_"))
    assert (
        layout.views[1].grid
        == AnyRes((112, 100), tuple(map(tuple, families.PINPOINTS["llava_onevision"])), 28, 7, most).grid
    )
    sizes = {1: (4, 3), 4: (8, 7), 9: (12, 11)}
    assert layout.views[1].grid == sizes[most]
    assert [len(c) for c in output.mmcompress.clusters] == [layout.cells]


# ---------------------------------------------------------------------- layouts
@pytest.mark.parametrize(
    ("size", "tiles", "tile"),
    [
        ((47, 141), (1, 3), 336),
        ((376, 235), (1, 2), 336),
        ((198, 352), (2, 2), 336),
        ((210, 210), (2, 1), 384),
        ((163, 163), (1, 2), 384),
        ((198, 396), (1, 3), 384),
        ((198, 187), (2, 2), 384),
        ((110, 99), (3, 1), 384),
        ((640, 427), (2, 1), 336),
    ],
)
def test_padding_is_cut_as_the_model_cuts_it(size: tuple[int, int], tiles: tuple[int, int], tile: int) -> None:
    """Sizes at which a product is a hair below a whole number, and a row or column more would be cut without rounding."""
    cut = AnyRes(size, ((tiles[0] * tile, tiles[1] * tile),), tile, 14)
    rows, columns = (n * (tile // 14) for n in cut.tiles)
    assert cut.tiles == tiles and cut.shown == tuple(unpad_image(torch.zeros(1, rows, columns), list(size)).shape[1:])


def test_an_odd_rest_of_padding_lies_below_and_on_the_right() -> None:
    """23 of 28 pixels high: two pixels of padding above, three below."""
    assert AnyRes((20, 50), ((28, 56),), 28, 7).layout().views[1].box == (0, -2 / 23, 1, 26 / 23)
    assert AnyRes((50, 20), ((56, 28),), 28, 7).layout().views[1].box == (-2 / 23, 0, 26 / 23, 1)


def test_seams_move_when_onevision_shrinks() -> None:
    """4 x 4 tiles of 4 x 4 tokens shown as 12 x 12: a seam after every three cells, not four."""
    pinpoints = ((112, 112),)
    whole = AnyRes((112, 112), pinpoints, 28, 7).layout().views[1]
    shrunk = AnyRes((112, 112), pinpoints, 28, 7, most_tiles=9).layout().views[1]
    assert whole.grid == (16, 16) and whole.seams == ((4.0, 8.0, 12.0), (4.0, 8.0, 12.0))
    assert shrunk.grid == (12, 12) and shrunk.seams == ((3.0, 6.0, 9.0), (3.0, 6.0, 9.0))
    assert shrunk.tiles().view(12, 12)[0].tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
    cropped = AnyRes((84, 112), pinpoints, 28, 7, most_tiles=4).layout().views[1]  # 12 x 16 shown as 6 x 9
    assert cropped.grid == (6, 9)
    rows, columns = cropped.seams
    assert rows == pytest.approx([n * cropped.grid[0] / 12 for n in (2, 6, 10)])
    assert columns == pytest.approx([n * cropped.grid[1] / 16 for n in (4, 8, 12)])


@pytest.mark.parametrize(("tiles", "rows"), [(2, (1, 2)), (4, (1, 4)), (6, (1, 6))])
def test_tiles_of_a_flat_picture_lie_in_a_row(tiles: int, rows: tuple[int, int]) -> None:
    """Nothing tells how they lie, every arrangement fits as well: the first one, in a row."""
    flat = torch.full((tiles + 1, 3, 8, 8), 0.5).numpy()
    assert arrangement(flat[:-1], flat[-1]) == (*rows, 0.0)
