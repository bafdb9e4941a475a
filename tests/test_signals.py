# SPDX-License-Identifier: Apache-2.0
"""Signals against the weights of the model's own eager attention."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers.models.clip import modeling_clip
from transformers.models.siglip import modeling_siglip

import mmcompress as mm
from mmcompress.runtime.signals import VisionTap

from .tiny import ALIKE, GREEDY, OLDEST, RAGGED, build, prompts

SEEN: dict[str, Any] = {}


@mm.register("spy")
@dataclass(frozen=True, repr=False)
class Spy(mm.InputStage):
    """Keeps what it is shown, for the tests."""

    keep: float | int = 0.5
    needs: ClassVar[tuple] = (
        ("cls_attention", "received_attention"),
        "received_attention",
        "keys",
        "encoder_features",
        ("cls_feature", None),
    )

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        SEEN["visuals"] = visuals
        return mm.Selection.top(visuals["cls_attention", "received_attention"], visuals.k)


@mm.register("text_spy")
@dataclass(frozen=True, repr=False)
class TextSpy(mm.InputStage):
    """Keeps what it is shown of the text, for the tests."""

    keep: float | int = 0.5
    needs: ClassVar[tuple] = ("text_embeddings",)

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        SEEN["visuals"] = visuals
        SEEN.setdefault("all", []).append(visuals)
        return mm.Selection.top(visuals.features.sum(-1), visuals.k)


@torch.no_grad()
@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_vision_signals_equal_eager_weights(tower: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tower)
    inputs = prompts(model, ALIKE)
    mm.compress(model, "spy")
    model(**inputs)
    mm.uncompress(model)
    visuals: mm.Visuals = SEEN["visuals"]

    model.set_attn_implementation("eager")
    module = {"clip": modeling_clip, "siglip": modeling_siglip}[tower]
    weights, eager = [], module.eager_attention_forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        out = eager(*args, **kwargs)
        weights.append(out[1])
        return out

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    tower_out = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    w, first = weights[2], 1 if tower == "clip" else 0  # block 2 of 4 makes hidden_states[-2]
    assert torch.allclose(visuals["received_attention"], w.mean(2).mean(1)[:, first:], atol=1e-5)
    states = tower_out.hidden_states[-2]
    assert torch.allclose(visuals["encoder_features"], states[:, first:], atol=1e-5)
    layer = model.model.vision_tower.encoder.layers[2]
    keys = layer.self_attn.k_proj(layer.layer_norm1(tower_out.hidden_states[2])).unflatten(-1, (4, -1)).mean(2)
    assert torch.allclose(visuals["keys"], keys[:, first:], atol=1e-5)
    if tower == "clip":
        assert torch.allclose(visuals["cls_attention"], w.mean(1)[:, 0, 1:], atol=1e-5)
        assert torch.allclose(visuals["cls_feature"], states[:, 0], atol=1e-5)
    else:
        assert "cls_attention" not in visuals.signals


def test_the_report_names_a_substitute() -> None:
    model = mm.compress(build("siglip"), "visionzip", keep=0.5)
    with torch.no_grad():
        model(**prompts(model, ALIKE))
    assert "received_attention stands for cls_attention" in str(mm.report(model))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 3}])
def test_repeated_rows_get_the_signals_of_their_own_sample(options: dict[str, Any]) -> None:
    model = mm.compress(build(), "visionzip", keep=0.5)
    inputs = prompts(model, ALIKE if OLDEST else RAGGED)
    model(**inputs)
    plain = {(v.row, v.index): v.kept_cells().tolist() for v in mm.trace(model).visuals}
    model.generate(**inputs, **{**GREEDY, **options})
    for visual in mm.trace(model).visuals:
        index = visual.index if not OLDEST else visual.index // 3  # 5.17 encodes the repeated pixels
        assert visual.kept_cells().tolist() == plain[visual.row // 3, index]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("query", ["last", "all"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_fastv_keeps_what_eager_attention_says(side: str, query: str, attention: str) -> None:
    model = build(attention="eager")
    inputs = prompts(model, RAGGED, side=side)
    w = model(**inputs, output_attentions=True).attentions[1].mean(1)
    model.set_attn_implementation(attention)
    mm.compress(model, "fastv", layer=2, keep=0.5, query=query)
    model(**inputs)
    for row in range(2):
        valid = inputs["attention_mask"][row].bool()
        last = int(valid.nonzero().max())
        score = w[row, last] if query == "last" else w[row][valid].mean(0)
        visuals = [v for v in mm.trace(model).visuals if v.row == row]
        places = torch.cat([v.span.patches for v in visuals])
        expected = sorted(places[score[places].sort(descending=True).indices[: len(places) // 2]].tolist())
        found = torch.cat([v.span.patches[v.kept_cells(layer=2)] for v in visuals]).tolist()
        assert found == expected
        assert all(v.kept == 16 and len(v.kept_cells(layer=1)) == 16 for v in visuals)


@torch.no_grad()
def test_fastv_in_a_later_turn_sees_the_keys_of_the_cache() -> None:
    """The softmax runs over old and new keys, as in one call with everything."""
    model = build()
    one, two = prompts(model, [[7]], mask=False), prompts(model, [[3, "image", 4]], seed=5, mask=False)
    mm.compress(model, "fastv", layer=2, keep=0.5)
    model(input_ids=torch.cat([one["input_ids"], two["input_ids"]], 1), pixel_values=two["pixel_values"])
    whole = mm.trace(model).visuals[0].kept_cells(layer=2).tolist()
    cache = model(**one, use_cache=True).past_key_values
    model(**two, past_key_values=cache)
    assert mm.trace(model).visuals[0].kept_cells(layer=2).tolist() == whole


@mm.register("deep_spy")
@dataclass(frozen=True, repr=False)
class DeepSpy(mm.InputStage):
    """Keeps what it is shown of other blocks, for the tests."""

    keep: float | int = 0.5
    needs: ClassVar[tuple] = (
        "received_attention@0",
        "received_attention@0.5",
        "keys@-1",
        "cls_logits@-1",
        "cls_attention",
    )

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        SEEN["visuals"] = visuals
        return mm.Selection.top(visuals["received_attention@0"], visuals.k)


@torch.no_grad()
def test_signals_of_other_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    inputs = prompts(model, ALIKE)
    with mm.compressed(model, "deep_spy"):
        model(**inputs)
    visuals: mm.Visuals = SEEN["visuals"]
    model.set_attn_implementation("eager")
    weights, eager = [], modeling_clip.eager_attention_forward

    def spy(*args: Any, **kwargs: Any) -> Any:
        out = eager(*args, **kwargs)
        weights.append(out[1])
        return out

    monkeypatch.setattr(modeling_clip, "eager_attention_forward", spy)
    states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    for name, block in (("received_attention@0", 0), ("received_attention@0.5", 2)):
        assert torch.allclose(visuals[name], weights[block].mean((1, 2))[:, 1:], atol=1e-5)
    assert torch.allclose(visuals["cls_attention"], weights[2].mean(1)[:, 0, 1:], atol=1e-5)
    last = model.model.vision_tower.encoder.layers[3]
    normed = last.layer_norm1(states[3])
    q, k = (p(normed).unflatten(-1, (4, -1)).transpose(1, 2) for p in (last.self_attn.q_proj, last.self_attn.k_proj))
    assert torch.allclose(visuals["keys@-1"], k.mean(1)[:, 1:], atol=1e-5)
    logits = (q[:, :, :1] @ k.transpose(2, 3)).mean(1)[:, 0, 1:] * last.self_attn.scale
    assert torch.allclose(visuals["cls_logits@-1"], logits, atol=1e-4)


def test_a_block_that_is_not_there() -> None:
    stage = type("Far", (DeepSpy,), {"needs": ("keys@7",)})()
    with pytest.raises(ValueError, match=r"keys@7.*has 4 blocks"):
        mm.compress(build(), stage)


@mm.register("map_spy")
@dataclass(frozen=True, repr=False)
class MapSpy(mm.InputStage):
    """Keeps what it is shown of the attention map between patches, for the tests."""

    keep: float | int = 0.5
    needs: ClassVar[tuple] = (
        "given_attention", "received_logits", "given_logits", "joint_keys@-1", ("cls_joint_attention@-1", None),
    )  # fmt: skip

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        SEEN["visuals"] = visuals
        return mm.Selection.top(visuals["given_logits"], visuals.k)


@torch.no_grad()
def test_rows_and_columns_of_the_map_between_patches() -> None:
    model = build()
    inputs = prompts(model, ALIKE)
    with mm.compressed(model, "map_spy"):
        model(**inputs)
    visuals: mm.Visuals = SEEN["visuals"]
    tower = model.model.vision_tower
    states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states

    def heads(layer: Any, which: str, state: torch.Tensor) -> torch.Tensor:
        projected = getattr(layer.self_attn, f"{which}_proj")(layer.layer_norm1(state))
        return projected.unflatten(-1, (4, -1)).transpose(1, 2)

    read, last = tower.encoder.layers[2], tower.encoder.layers[3]
    logits = heads(read, "q", states[2]) @ heads(read, "k", states[2]).transpose(2, 3) * read.self_attn.scale
    patches = logits[:, :, 1:, 1:].mean(1)
    assert torch.allclose(visuals["given_logits"], patches.mean(2), atol=1e-4)
    assert torch.allclose(visuals["received_logits"], patches.mean(1), atol=1e-4)
    weights = logits.softmax(-1)[:, :, 1:, 1:].mean(1)
    assert torch.allclose(visuals["given_attention"], weights.mean(2), atol=1e-5)
    q, k = (heads(last, which, states[3]).transpose(1, 2).flatten(2) for which in "qk")
    assert torch.allclose(visuals["joint_keys@-1"], k[:, 1:], atol=1e-5)
    joint = (q[:, :1] @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    assert torch.allclose(visuals["cls_joint_attention@-1"], joint[:, 0, 1:], atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_map_signals_in_every_kind_of_encoder(family: str) -> None:
    """Means of the logits over patches are what rows and columns of the same map must agree on."""
    from . import families

    model = families.build(family)
    with mm.compressed(model, "map_spy"):
        model(**families.prompts(model, family, [[4, families.image(family, True), 3]]))
    visuals: mm.Visuals = SEEN["visuals"]
    for name in ("given_attention", "received_logits", "given_logits"):
        assert visuals[name].shape == visuals.features.shape[:2] and visuals[name].isfinite().all()
    if family not in families.PINPOINTS:  # tiles are cropped
        assert torch.allclose(visuals["given_logits"].mean(), visuals["received_logits"].mean(), atol=1e-4)
    assert ("cls_joint_attention@-1" in visuals.signals) == (family in ("llava_next", "internvl"))


def test_the_cls_token_is_that_of_the_first_view_of_each_picture() -> None:
    rows, adapter = torch.randn(6, 4), SimpleNamespace(views=lambda encoded, arguments: [3, 2, 1])
    found = VisionTap._of_first_view(SimpleNamespace(adapter=adapter), rows, None, {})  # type: ignore[arg-type]
    assert torch.equal(torch.stack(found), rows[[0, 3, 5]])
