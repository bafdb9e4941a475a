# SPDX-License-Identifier: Apache-2.0
"""Newlines, separators, begin and end among the features of a picture are no patches: found, kept, not counted."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from mmcompress.adapters import adapter_for
from torch import Tensor

import mmcompress as mm
from mmcompress.runtime.structural import StructuralTokens, ruled
from mmcompress.visuals import View

from .architectures import IMAGE, OLDEST, base_of, build, pictures, prompts

pytestmark = pytest.mark.skipif(OLDEST, reason="the tiny inputs are those of the newest transformers")

CASES = {
    "hunyuan_vl": (0, 5, 10, 15, 20, 21),  # begin; 4 rows of 4 patches with a newline each; end
    "hy_v4_vl": (4, 9, 14, 19),
    "deepseek_ocr2": (144,),
    "emu3": tuple(range(16, 272, 17)),
    "granite4_vision": (20, 25, 30, 35),
}


def features_of(model: Any, number: int) -> Tensor:
    found = pictures(model, [[number]])
    return torch.cat([f.flatten(0, -2) for f in adapter_for(model).features(_encoded(model, found), found)])


def _encoded(model: Any, found: dict[str, Any]) -> Any:
    encode = base_of(model).get_image_features
    return encode(**{name: x for name, x in found.items() if name in inspect.signature(encode).parameters})


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_structural_tokens_are_the_rows_that_no_picture_changes(name: str) -> None:
    model = build(name)
    one, other = features_of(model, 1), features_of(model, 2)
    unmoved = torch.isclose(one, other, atol=1e-5).all(1).nonzero()[:, 0].tolist()
    assert set(CASES[name]) <= set(unmoved) and (name == "emu3" or len(unmoved) == len(CASES[name]))
    for features in (one, other):
        adapter = adapter_for(model)
        found = StructuralTokens(adapter.base, adapter.language_model).among(features)
        assert tuple(found.nonzero()[:, 0].tolist()) == CASES[name]


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("plan", ["divprune(keep=0.5)", "fastv(layer=1, keep=0.5)"])
def test_they_stay_and_do_not_count(name: str, plan: str) -> None:
    model = build(name)
    inputs = prompts(model, [[4, "1", 2, "2", 6]])
    if name == "hy_v4_vl" and "fastv" in plan:
        pytest.skip("its language model has indexers: no layer stages")
    mm.compress(model, plan)
    model(**inputs)
    trace = mm.trace(model)
    left = set(trace.call.groups[-1].source[0].tolist())
    size = trace.visuals[0].layout.tokens
    for visual in trace.visuals:
        first = min(*visual.span.patches.tolist(), *visual.span.structural.tolist())
        assert visual.layout.structural == CASES[name]
        assert visual.tokens == size - len(CASES[name]) and sum(visual.layout.views[0].grid) > 1
        assert left >= {first + at for at in CASES[name]}
    total = sum(visual.tokens for visual in trace.visuals)
    gone = inputs["input_ids"].shape[1] - len(left)
    assert gone == total - total // 2
    mm.compress(model, plan, structural="drop")
    model(**inputs)
    dropped = len(left) - len(mm.trace(model).call.groups[-1].source[0])
    assert dropped == 2 * len(CASES[name])


@torch.no_grad()
@pytest.mark.parametrize("change", ["half", "lora", "offload"])
def test_they_are_found_in_half_precision_behind_lora_and_when_offloaded(change: str) -> None:
    name = "granite4_vision" if change == "offload" else "hunyuan_vl"  # which stock cannot run offloaded
    model = build(name)
    inputs = prompts(model, [[4, "1", 6]])
    if change == "half":
        model = model.to(torch.bfloat16)
        inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    elif change == "lora":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["patch_merger.mlp"], init_lora_weights=False)
        )
    else:
        pytest.importorskip("accelerate").cpu_offload(model, execution_device="cpu")
    mm.compress(model, "divprune(keep=0.5)")
    model(**inputs)
    assert mm.trace(model).visuals[0].layout.structural == CASES[name]


@torch.no_grad()
def test_patches_are_none_of_them() -> None:
    """Neither where a tower has tokens of its own (CLS), nor where patches are the same everywhere."""
    for name in ("janus", "unlimited_ocr", "video_llava"):
        model = build(name)
        base = base_of(model)
        found = StructuralTokens(
            base, adapter_for(model).language_model if name != "unlimited_ocr" else base.language_model
        )
        rows = torch.randn(6, 64)
        rows[3:] = rows[0]
        assert not found.among(rows).any()
        assert bool(found) == (name != "janus")
        if name == "unlimited_ocr":
            rows[2], rows[5] = base.image_newline, base.view_separator
            assert found.among(rows).tolist() == [False, False, True, False, False, True]


def test_rows_of_the_same_length_are_a_grid() -> None:
    marks = torch.zeros(8, dtype=torch.bool)
    marks[[3, 7]] = True
    assert ruled(marks, True).views == (View((2, 3)),) and ruled(marks, True).structural == (3, 7)
    assert ruled(marks, False).views == (View((1, 6)),)
    marks[2] = True
    assert ruled(marks, True).views == (View((1, 5)),) and ruled(marks, True).structural == (2, 3, 7)


@torch.no_grad()
def test_row_breaks_between_the_placeholders_are_text_that_stays() -> None:
    """Pixtral's [IMG_BREAK]: one picture of many runs."""
    model = build("lighton_ocr")
    inputs = prompts(model, [[4, "1", 6]])
    ids = inputs["input_ids"][0].tolist()
    first, count = ids.index(IMAGE), ids.count(IMAGE)
    broken = [*ids[:first]]
    for row in range(4):
        broken += [*[IMAGE] * (count // 4), 99 if row < 3 else 98]
    ids = torch.tensor([[*broken, *ids[first + count :]]])
    inputs = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    mm.compress(model, "divprune(keep=2)")
    model(**inputs)
    assert [visual.kept for visual in mm.trace(model).visuals] == [2]
    left = mm.trace(model).call.groups[-1].source[0]
    assert ids[0, left].tolist() == [t for i, t in enumerate(ids[0].tolist()) if t != IMAGE or i in left.tolist()]
    assert int((ids[0, left] == 99).sum()) == 3 and len(left) == ids.shape[1] - count + 2
