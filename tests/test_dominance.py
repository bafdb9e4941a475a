# SPDX-License-Identifier: Apache-2.0
"""Text dominance: its formulas, the measurement against eager attention of stock and compressed models, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mmcompress as mm
from mmcompress.ops.dominance import depth_stages, dominance, modality_mass, modality_shares

from .families import FAMILIES, IMAGE, START, build, image, prompts
from .tiny import GREEDY, handing
from .tiny import build as tiny

STEPS = 5
SHORT: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}


# ---------------------------------------------------------------------- formulas
@given(st.integers(2, 12), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50, derandomize=True)
def test_the_index_is_the_ratio_of_the_efficiencies(n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    rows = torch.rand(3, 4, n, generator=g).softmax(-1)
    text = torch.zeros(3, n, dtype=torch.bool)
    text[:, : int(torch.randint(1, n, (), generator=g))] = True
    masses, tokens = [modality_mass(rows, s) for s in (text, ~text)], [s.sum(1) for s in (text, ~text)]
    mdi, aei_text, aei_other = dominance(masses[0], masses[1], tokens[0], tokens[1])
    shares = modality_shares(masses[0], masses[1])
    assert torch.allclose(shares[0] + shares[1], torch.ones(3, dtype=torch.float64))
    assert torch.allclose(mdi, aei_text / aei_other) and (aei_text <= n / tokens[0] + 1e-9).all()
    for i in range(3):
        per_text = sum(float(row[j]) for row in rows[i] for j in range(n) if text[i, j]) / int(tokens[0][i])
        per_other = sum(float(row[j]) for row in rows[i] for j in range(n) if not text[i, j]) / int(tokens[1][i])
        assert mdi[i].item() == pytest.approx(per_text / per_other, rel=1e-5)


def test_nothing_to_divide_by() -> None:
    text, other = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    mdi, aei, _ = dominance(text, other, torch.tensor([2, 2, 2, 2]), torch.tensor([2, 0, 2, 2]))
    assert mdi[0] == math.inf and mdi[1].isnan() and mdi[2].isnan() and mdi[3] == 0
    assert aei[0] == 2 and aei[1] == 1


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(8, [0.5, 3.5, 6.5]), (7, [0.5, 2.5, 5.5]), (3, [0.5, 0.5, 1.5]), (2, [0.5, 0.5, 0.5]), (1, [0, 0, 0])],
)
def test_stages_of_the_depth(layers: int, expected: list[float]) -> None:
    assert depth_stages(torch.arange(layers).double()).tolist() == expected


# ---------------------------------------------------------------------- in a model
def eager(model: Any, inputs: dict[str, Tensor]) -> list[list[Tensor]]:
    """Mean over heads of the last row of every layer, [B, keys], step by step."""
    model.set_attn_implementation("eager")
    out = model.generate(**inputs, **SHORT, output_attentions=True, return_dict_in_generate=True)
    model.set_attn_implementation("sdpa")
    return [[layer[:, :, -1].mean(1) for layer in step] for step in out.attentions]


def hooks(model: Any) -> int:
    return sum(len(m._forward_hooks) for m in model.model.language_model.modules())


class Spy:
    """Stands for sdpa and notes the attention of the last row, mean over heads, of every layer of the language model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Any) -> None:
        self.rows: list[list[Tensor]] = []
        self.layers = [layer.self_attn for layer in model.model.language_model.layers]
        known = ALL_ATTENTION_FUNCTIONS._global_mapping
        self.sdpa = known["sdpa"]
        monkeypatch.setitem(known, "sdpa", self.attention)

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Any:
        if module in self.layers:
            keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
            logits = query[:, :, -1:] @ keys.transpose(2, 3) * kwargs["scaling"]
            if attention_mask is not None:
                logits = logits.masked_fill(~attention_mask[:, :, -1:], -math.inf)
            if module is self.layers[0]:
                self.rows.append([])
            self.rows[-1].append(logits.softmax(-1)[:, :, 0].mean(1))
        return self.sdpa(module, query, key, value, attention_mask, **kwargs)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_attention_of_the_stock_model(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, [[5, image(family), 4], [3, image(family, True), 2, image(family), 6]])
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    visual, width = ids == IMAGE, ids.shape[1]
    text = real & ~visual
    found = mm.modality_dominance(model, inputs, STEPS)
    assert hooks(model) == 0
    masses = [
        [sum((step[i][:, :width] * keys).sum(1) for step in eager(model, inputs)) for i in range(4)]
        for keys in (text, visual)
    ]
    for mine, expected in zip((found.text_mass, found.other_mass), masses, strict=True):
        assert torch.allclose(mine, torch.stack(expected, 1).double(), atol=1e-4)
    assert torch.equal(found.text_tokens, text.sum(1, keepdim=True).double().expand(-1, 4))
    assert torch.equal(found.other_tokens, visual.sum(1, keepdim=True).double().expand(-1, 4))
    assert found.generated == [STEPS, STEPS] and found.plan == ""
    shares = found.text_mass / (found.text_mass + found.other_mass)
    assert torch.allclose(found.aei_text, shares / (found.text_tokens / (found.text_tokens + found.other_tokens)))
    assert torch.allclose(found.mdi, found.aei_text / found.aei_other)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["fastervlm(keep=0.5)", "divprune(keep=6) >> fastv(layer=2, keep=3)"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl", "internvl"])
def test_equals_the_attention_of_a_compressed_model(family: str, plan: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family)
    inputs = prompts(model, family, [[5, image(family), 4]])
    mm.compress(model, plan)
    spy = Spy(monkeypatch, model)
    found = mm.modality_dominance(model, inputs, STEPS)
    steps = spy.rows
    assert len(steps) == STEPS
    (visual,) = mm.trace(model).visuals
    ids = inputs["input_ids"][0]
    places, structural = (ids == IMAGE).nonzero()[:, 0], set(visual.layout.structural)
    patches = [int(p) for i, p in enumerate(places) if i not in structural]
    for layer in range(4):
        kept = {patches[cell] for cell in visual.kept_cells(layer).tolist()}
        here = [i for i in range(len(ids)) if i not in patches or i in kept]
        is_visual = torch.tensor([bool(ids[i] == IMAGE) for i in here])
        assert len(here) < len(ids) and steps[0][layer].shape[1] == len(here)
        assert found.other_tokens[0, layer] == is_visual.sum() and found.text_tokens[0, layer] == (~is_visual).sum()
        rows = torch.stack([step[layer][0, : len(here)] for step in steps])
        assert found.text_mass[0, layer].item() == pytest.approx(rows[:, ~is_visual].sum().item(), abs=1e-4)
        assert found.other_mass[0, layer].item() == pytest.approx(rows[:, is_visual].sum().item(), abs=1e-4)
    assert found.plan == repr(mm.as_pipeline(plan))


@torch.no_grad()
def test_a_batch_is_its_samples() -> None:
    model = build("llava_next")
    parts: list[list[Any]] = [[5, image("llava_next"), 4], [3, image("llava_next", True), 2, image("llava_next"), 6]]
    mm.compress(model, "visionzip(keep=0.5) >> fastv(layer=2, keep=0.5)")
    inputs = prompts(model, "llava_next", parts)
    both = mm.modality_dominance(model, inputs, STEPS)
    alone = mm.modality_dominance(model, prompts(model, "llava_next", parts[:1]), STEPS)
    for name in ("mdi", "aei_text", "text_tokens", "other_tokens"):
        assert torch.allclose(getattr(both, name)[0], getattr(alone, name)[0], atol=1e-4)
    static = mm.modality_dominance(model, inputs | {"cache_implementation": "static"}, STEPS)
    assert torch.allclose(static.mdi, both.mdi, atol=1e-4)
    mm.uncompress(model)
    stock = mm.modality_dominance(model, inputs, STEPS)
    with mm.compressed(model, "uniform(keep=1.0)"):
        assert torch.allclose(mm.modality_dominance(model, inputs, STEPS).mdi, stock.mdi)


@torch.no_grad()
def test_rows_behind_the_end_of_an_answer_do_not_count() -> None:
    model = build("llava")
    parts: list[list[Any]] = [[5, image("llava"), 4], [3, image("llava"), 6]]
    inputs = prompts(model, "llava", parts)
    out = model.generate(**inputs, **SHORT)[:, inputs["input_ids"].shape[1] :]
    end = int(out[0, 1])
    assert end not in out[1].tolist() and end != int(out[0, 0])
    model.generation_config.eos_token_id = [end, 1]
    found = mm.modality_dominance(model, inputs, STEPS)
    assert found.generated == [2, STEPS]
    model.generation_config.eos_token_id = None
    short = mm.modality_dominance(model, prompts(model, "llava", parts[:1]), 2)
    assert torch.allclose(found.text_mass[0], short.text_mass[0], atol=1e-4)


@torch.no_grad()
def test_without_the_first_token() -> None:
    model = build("qwen2_5_vl")
    inputs = prompts(model, "qwen2_5_vl", [[5, image("qwen2_5_vl"), 4], [image("qwen2_5_vl"), 9]])
    found = mm.modality_dominance(model, inputs, STEPS)
    without = found.without_sink
    assert without is not None and torch.equal(without.text_tokens, found.text_tokens - 1)  # a start marker is text
    sink = torch.stack([sum(step[i][0, 0] for step in eager(model, inputs)) for i in range(4)])
    first = int((inputs["attention_mask"][0] == 0).sum())
    assert first == 0 and torch.allclose(found.text_mass[0] - without.text_mass[0], sink.double(), atol=1e-4)
    only = mm.modality_dominance(model, inputs, STEPS, exclude_sink=True)
    assert torch.equal(only.mdi, without.mdi) and only.without_sink is None
    assert "without the first token" in str(found) and "without the first token" not in str(only)


@torch.no_grad()
def test_other_tokens_can_be_counted_as_visual() -> None:
    model = build("internvl")
    inputs = prompts(model, "internvl", [[5, image("internvl"), 4]])
    plain = mm.modality_dominance(model, inputs, 2)
    more = mm.modality_dominance(model, inputs, 2, also_visual=[START])
    assert torch.equal(more.other_tokens, plain.other_tokens + 1)
    assert torch.allclose(more.other_mass + more.text_mass, plain.other_mass + plain.text_mass)
    text = str(plain)
    stages = plain.stages()
    assert f"early {stages['early'][0]:.2f} / {stages['early'][1]:.2f}" in text and "2 generated tokens" in text
    assert stages["late"][0] == pytest.approx(plain.mdi[:, -2:].mean().item())


@torch.no_grad()
def test_a_prompt_without_visuals() -> None:
    model = tiny()
    found = mm.modality_dominance(model, {"input_ids": torch.arange(5, 14)[None]}, 2)
    assert found.mdi.isnan().all() and (found.other_tokens == 0).all() and (found.aei_text == 1).all()


def test_what_cannot_be_measured() -> None:
    model = tiny()
    ids = torch.arange(5, 14)[None]
    with pytest.raises(ValueError, match="padded on the right"):
        mm.modality_dominance(model, {"input_ids": ids, "attention_mask": torch.tensor([[1] * 8 + [0]])}, 2)
    with pytest.raises(NotImplementedError, match="not supported"):
        mm.modality_dominance(torch.nn.Linear(2, 2), {"input_ids": ids}, 2)
    cache = model(input_ids=ids, use_cache=True).past_key_values
    longer = torch.cat([ids, ids], 1)
    with pytest.raises(NotImplementedError, match="an earlier turn"):
        mm.modality_dominance(model, {"input_ids": longer, "past_key_values": cache}, 2)
    handing(model.model.language_model.layers[1].self_attn, sliding_window=8)
    with pytest.raises(
        NotImplementedError, match=r"text dominance .*layer 1 of the language model.*sliding window of 8"
    ):
        mm.modality_dominance(model, {"input_ids": ids}, 2)
    assert hooks(model) == 0


# ---------------------------------------------------------------------- the pruning of the paper
def test_the_pruning_is_that_of_fastervlm() -> None:
    g = torch.Generator().manual_seed(0)
    score = torch.rand(2, 36, generator=g)
    for r, k in ((0.75, 9), (0.9, 4), (0.95, 2)):
        stage = mm.LanguageOverrules(keep=1 - r)
        assert stage.budget(36) == k and mm.LanguageOverrules(1 - r).budget(576) == round(576 * (1 - r))
        seen = mm.Visuals(torch.randn(2, 36, 4), mm.Layout.raster(1, 6, 6), k, {"cls_attention": score})
        assert torch.equal(stage.select(seen).keep, mm.Selection.top(score, k).keep)
    assert repr(mm.as_pipeline("language_overrules")) == "language_overrules(keep=0.1)"


@torch.no_grad()
def test_pruning_makes_visual_tokens_fewer_in_every_layer() -> None:
    model = build("llava")
    inputs = prompts(model, "llava", [[5, image("llava"), 4]])
    mm.compress(model, "language_overrules(keep=0.25)")
    assert (mm.modality_dominance(model, inputs, 2).other_tokens == 4).all()
    assert model.generate(**inputs, **GREEDY).shape[1] == 25 + 6
