# SPDX-License-Identifier: Apache-2.0
"""Vision and language signals of every family against its own eager attention."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import mmcompress as mm

from .families import FAMILIES, PINPOINTS, QWEN, VIDEO_FAMILIES, Part, build, image, prompts, video
from .test_signals import SEEN

MODULES = {
    "llava": "clip.modeling_clip", "llava_next": "clip.modeling_clip", "llava_next_video": "clip.modeling_clip",
    "llava_onevision": "siglip.modeling_siglip", "internvl": "internvl.modeling_internvl",
    "internvl_qwen3": "internvl.modeling_internvl",
}  # fmt: skip


def eager_weights(model: Any, family: str, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A list that fills with the weights of every vision attention call."""
    name = MODULES.get(family, f"{family}.modeling_{family}")
    module = importlib.import_module(f"transformers.models.{name}")
    weights: list[Tensor] = []
    eager = module.eager_attention_forward

    def spy(owner: Any, *args: Any, **kwargs: Any) -> Any:
        out = eager(owner, *args, **kwargs)
        if not owner.is_causal:
            weights.append(out[1])
        return out

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    return weights


def shown(model: Any, family: str, parts: list[Part]) -> tuple[mm.Visuals, dict[str, Tensor]]:
    inputs = prompts(model, family, [parts])
    with mm.compressed(model, "spy"), torch.no_grad():
        model(**inputs)
    return SEEN["visuals"], inputs


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("family", FAMILIES)
def test_vision_signals_equal_eager_weights(
    family: str, kind: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "video" and family not in VIDEO_FAMILIES:
        pytest.skip("no video in this family")
    model = build(family, attention=attention)
    visuals, inputs = shown(model, family, [4, image(family, True) if kind == "image" else video(family), 3])
    model.set_attn_implementation("eager")
    weights = eager_weights(model, family, monkeypatch)
    model(**inputs)
    base = model.model
    if family in QWEN:
        frames = 1 if kind == "image" else 2
        received = torch.cat([w.mean((1, 2))[0] for w in weights[-frames:]]).view(-1, 4).mean(1)
        if family == "qwen2_5_vl":
            from transformers.vision_utils import get_vision_window_index

            grid = inputs[f"{kind}_grid_thw"]
            order, _ = get_vision_window_index(grid, spatial_merge_size=2, window_size=16, patch_size=4)
            received = received[order.argsort()]
        assert torch.allclose(visuals["received_attention"][0], received, atol=1e-5)
        assert "cls_attention" not in visuals.signals
        return
    block = {"llava_onevision": -1}.get(family, -2 if not family.startswith("internvl") else -1)
    w = weights[block]
    prefix = 0 if family == "llava_onevision" else 1
    rows = {"received_attention": w.mean((1, 2))[:, prefix:]}
    if prefix:
        rows["cls_attention"] = w.mean(1)[:, 0, 1:]
    for name, patches in rows.items():
        if family.startswith("internvl"):
            side = int(patches.shape[1] ** 0.5)
            expected = torch.nn.functional.avg_pool2d(patches.view(-1, 1, side, side), 2).flatten()
        elif family == "llava":
            expected = patches.flatten()
        elif kind == "video":
            pooled = patches.view(-1, 1, 4, 4)
            if family == "llava_onevision":
                pooled = torch.nn.functional.interpolate(pooled, size=(2, 2), mode="bilinear")
            else:
                pooled = torch.nn.functional.avg_pool2d(pooled, 2)
            expected = pooled.flatten()
        else:  # the signal takes the road of the features, with nan for newlines
            options: dict[str, Any] = {} if "onevision" in family else {"vision_feature_select_strategy": "default"}
            newline = torch.full((1,), float("nan"))
            (packed,), _ = base.pack_image_features(
                [patches[..., None]], inputs["image_sizes"], image_newline=newline, **options
            )
            expected = packed[:, 0][~packed[:, 0].isnan()]
        assert torch.allclose(visuals[name][0], expected, atol=1e-5)
    assert ("cls_attention" in visuals.signals) == bool(prefix)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["image", "video"])
@pytest.mark.parametrize("family", FAMILIES)
def test_encoder_features_take_the_road_to_the_tokens(family: str, kind: str) -> None:
    """What `project` makes of the encoder features is what enters the LLM."""
    if kind == "video" and family not in VIDEO_FAMILIES:
        pytest.skip("no video in this family")
    if kind == "video" and family == "llava_onevision":
        pytest.skip("OneVision pools after the projector, which is not linear")
    model = build(family)
    visuals, _ = shown(model, family, [4, image(family, True) if kind == "image" else video(family), 3])
    assert torch.allclose(visuals.project(visuals["encoder_features"]), visuals.features, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_those_of_the_block(family: str) -> None:
    """Mean over heads (and over the patches of a token) of the keys before rotation, recomputed from the block's input."""
    model = build(family)
    seen: dict[str, Tensor] = {}
    adapter = mm.adapters.adapter_for(model)
    block = adapter.blocks[adapter.feature_blocks[-1]]
    if block.k is not None:
        handle = block.k.register_forward_hook(lambda m, a, o: seen.update(k=o))
    else:
        handle = block.qkv.register_forward_hook(lambda m, a, o: seen.update(k=o.chunk(3, -1)[1]))
    visuals, _ = shown(model, family, [4, image(family), 3])
    handle.remove()
    heads = seen["k"].unflatten(-1, (block.heads, -1)).mean(-2)
    total = heads[:, 1:].sum((0, 1)) if heads.dim() == 3 and adapter.prefix else heads.flatten(0, -2).sum(0)
    if family in PINPOINTS:
        return  # tiles are cropped: the road is tested with attention above
    assert torch.allclose(visuals["keys"][0].sum(0) * adapter.unit, total, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("query", ["last", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fastv_keeps_what_eager_attention_says(family: str, query: str) -> None:
    model = build(family, attention="eager")
    parts: list[list[Part]] = [[5, image(family), 4], [3, image(family, True), 2, image(family), 6]]
    inputs = prompts(model, family, parts)
    w = model(**inputs, output_attentions=True).attentions[1].mean(1)
    model.set_attn_implementation("sdpa")
    mm.compress(model, "fastv", layer=2, keep=0.5, query=query)
    model(**inputs)
    for row in range(2):
        valid = inputs["attention_mask"][row].bool()
        score = w[row, -1] if query == "last" else w[row][valid].mean(0)
        visuals = [v for v in mm.trace(model).visuals if v.row == row]
        places = torch.cat([v.span.patches for v in visuals])
        expected = sorted(places[score[places].sort(descending=True).indices[: len(places) // 2]].tolist())
        found = torch.cat([v.span.patches[v.kept_cells(layer=2)] for v in visuals]).tolist()
        assert sorted(found) == expected


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_text_embeddings_are_those_of_the_instruction(family: str) -> None:
    """The text behind the last visual; all text where there is none behind it."""
    model = build(family)
    cases = [([5, image(family), 4], slice(-4, None)), ([6, image(family)], slice(0, 6))]
    for parts, instruction in cases[
        : 1 if family == "llava" else 2
    ]:  # there a prompt cannot end with the picture's own tokens
        inputs = prompts(model, family, [parts])
        with mm.compressed(model, "text_spy"):
            model(**inputs)
        found = SEEN["visuals"]["text_embeddings"]
        ids = inputs["input_ids"][:, instruction]
        assert torch.equal(found, model.get_input_embeddings()(ids))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_text_embeddings_of_unequal_prompts(family: str) -> None:
    model = mm.compress(build(family), "text_spy")
    model(**prompts(model, family, [[5, image(family), 4], [2, image(family), 7]]))
    lengths = sorted(v["text_embeddings"].shape[1] for v in SEEN["all"][-2:])
    assert lengths == [4, 7]
