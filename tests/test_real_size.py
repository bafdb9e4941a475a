# SPDX-License-Identifier: Apache-2.0
"""Released models at their real size: their shapes, their random weights, and what is counted and timed on them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmcompress.assets import released
from mmcompress.eval import machine
from mmcompress.eval.cost import released as real
from mmcompress.eval.cost.counts import count, language_model
from mmcompress.eval.cost.midsize import one_image_prompt
from torch import nn

from .architectures import OLDEST
from .families import build, image, prompts

PLANS = ("stock", "divprune(keep=0.25)", "voronoi(keep=0.25)", "fastv(layer=2, keep=0.25)", "tome(keep=0.5)")
FEW: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}


def small(name: str) -> dict[str, Any]:
    """The released config with narrow matrices: the real road at a size for tests."""
    config = released()[name]["config"]
    text = {**config.get("text_config", config), **FEW, "head_dim": 16, "vocab_size": 32064}
    vision = {**config["vision_config"], "hidden_size": 32, "intermediate_size": 64}
    vision |= {key: 2 for key in ("num_heads", "num_attention_heads") if key in vision}
    vision |= {key: 64 for key in ("out_hidden_size",) if key in vision}
    vision |= {key: 3 for key in ("depth", "num_hidden_layers") if key in vision}
    vision |= {key: [1] for key in ("deepstack_visual_indexes", "fullatt_block_indexes") if key in vision}
    ids = {key: 32000 + i for i, key in enumerate(key for key in config if key.endswith(("token_id", "token_index")))}
    if "rope_scaling" in text and "mrope_section" in (text["rope_scaling"] or {}):
        text["rope_scaling"] = {**text["rope_scaling"], "mrope_section": [2, 3, 3]}
    nested = {"text_config": text} if "text_config" in config else text
    return {**config, **nested, **ids, "vision_config": vision}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: {"config": small(name), "source": "this test"} for name in real.NAMES}
    monkeypatch.setattr(real, "released", lambda: known)


@pytest.mark.skipif(OLDEST, reason="configs are in the form of the newest transformers")
@pytest.mark.parametrize(
    "name", [real.NAMES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in real.NAMES[1:])]
)
def test_a_released_model_is_measured(name: str, narrow: None) -> None:
    plans = ["divprune(keep=0.25)", "fastv(keep=0.25)"]  # behind two layers
    found = real.measure(name, plans, batch=2, layers=4, repeats=1, warmup=0, new_tokens=3, text_tokens=12)
    stock, diverse, cut = found.rows
    assert [row.label for row in found.rows] == ["stock", *plans]
    assert found.about["batch"] == 2 and found.about["dtype"] == "bfloat16" and found.about["random_weights"]
    assert (found.about["layers"], found.about["layers_released"]) == (4, real.depth_of(released()[name]["config"]))
    tokens = stock.counts.visual
    assert diverse.counts.layers == [12 + round(tokens / 4)] * 4 and cut.counts.layers[:2] == [12 + tokens] * 2
    assert stock.reached == stock.reached_behind_vision == 1.0
    record = found.to_dict()["rows"][1]
    assert record["reached"] == pytest.approx(record["speedup"] * record["flops_ratio"])
    parts = record["milliseconds"]
    assert parts["ttft"]["median"] > 0 and parts["decode"]["median"] > 0 and record["kv_bytes"] < stock.counts.kv_bytes
    if machine.resident_now() is not None:
        assert min(row.times.peak for row in found.rows) > 0  # type: ignore[type-var]


@pytest.mark.skipif(OLDEST, reason="configs are in the form of the newest transformers")
@pytest.mark.parametrize("name", real.NAMES)
def test_random_weights_keep_values_in_bounds(name: str, narrow: None) -> None:
    """Each weight once, none left empty, tied ones tied; logits are finite and differ between tokens."""
    model = real.build(name, torch.float32, layers=3)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    head, words = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is words) == (name == "Qwen/Qwen3-VL-4B-Instruct")
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight.numel() > 2000 and module.weight is not words:
            assert module.weight.std() == pytest.approx(module.in_features**-0.5, rel=0.1)
    with torch.no_grad():
        logits = model(**one_image_prompt(model, 12)).logits
    assert logits.isfinite().all() and logits.std() > 0.1 and not torch.equal(logits[0, 0], logits[0, 1])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_counts_by_shapes_are_counts(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, [[5, image(family), 4]], mask=False)
    for plan in PLANS:
        assert count(model, inputs, plan, shapes=True) == count(model, inputs, plan), plan


def test_depth_is_cut_where_memory_ends_and_says_so(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = real.NAMES[0]
    whole = real.build(name, layers=2)
    each = sum(p.numel() for p in language_model(whole).layers[0].parameters())
    rest = sum(p.numel() for p in whole.parameters()) - 2 * each
    monkeypatch.setattr(real, "free_bytes", lambda device: real.SPARE + 2 * (rest + 5 * each) + each)
    with pytest.warns(UserWarning, match=r"5 of 32 layers .* fit in torch\.bfloat16"):
        assert len(language_model(real.build(name)).layers) == 5
    with pytest.raises(ValueError, match=r"5 of 32 layers .* not 7"):
        real.build(name, layers=7)
    monkeypatch.setattr(real, "free_bytes", lambda device: real.SPARE)
    with pytest.raises(ValueError, match="0 of 32 layers"):
        real.build(name)


def test_what_cannot_be_built() -> None:
    with pytest.raises(ValueError, match=r"no released model 'llava'.*llava-hf/llava-1\.5-7b-hf"):
        real.build("llava")
    with pytest.raises(ValueError, match=r"layers=33: llava-hf/llava-1\.5-7b-hf has 1 to 32"):
        real.build(real.NAMES[0], layers=33)
    with pytest.raises(ValueError, match="batch=0"):
        real.measure(real.NAMES[0], batch=0)


def test_random_values_are_laid_without_a_gap() -> None:
    values = torch.arange(1.0, 8.0)
    new = torch.empty(3, 5)
    assert real._fill(new, values, 5, 2.0) == (5 + 15) % 7
    assert new.flatten().tolist() == [2 * (1.0 + (5 + i) % 7) for i in range(15)]


@pytest.mark.skipif(machine.resident_now() is None, reason="the system does not tell")
def test_peak_of_the_process() -> None:
    before = machine.resident_now()
    assert before is not None
    block = torch.ones(60, 2**18)
    del block
    assert machine.resident_now() is not None  # what was given back counts no more
    assert machine.resident_peak() - before < 30 * 2**20
    block = torch.ones(60, 2**18)
    del block
    assert 55 * 2**20 <= machine.resident_peak() - before < 90 * 2**20
