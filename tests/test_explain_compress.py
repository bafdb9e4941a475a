# SPDX-License-Identifier: Apache-2.0
"""explain_compress: its relevance against the step-by-step definition, what the net reads, and the choices in models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm
from mmcompress.explain.relevance import answer_relevances, owed
from mmcompress.methods.explain_compress import Compressor
from mmcompress.ops.explained import relevance_target, target_divergence
from mmcompress.runtime.relevance import MODES, Prompt
from mmcompress.weights import CONFIG, Saved

from . import tiny
from .families import FAMILIES, build, image, prompts
from .test_explain_maps import prompt
from .test_families import alone, samples
from .tiny import GREEDY
from .watch import NoWaiting

ANSWERS = [[31, 77, 58], [45, 20]]


def model_of(family: str, **how: Any) -> Any:
    """A tiny model whose `generate` takes the likeliest token, whatever it is."""
    model = build(family, **how)
    model.generation_config.suppress_tokens = None
    return model


def net_for(seed: int = 0, **how: Any) -> Compressor:
    torch.manual_seed(seed)
    return Compressor(**{"channels": (8, 16), **how}).eval()


def longer(inputs: dict[str, Tensor], more: list[int]) -> dict[str, Tensor]:
    """One unpadded prompt and some of its answer."""
    if not more:
        return inputs
    ids = torch.tensor([more])
    found = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    found["attention_mask"] = torch.ones_like(found["input_ids"])
    if "mm_token_type_ids" in inputs:
        found["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(ids)], 1)
    return found


def step_by_step(model: Any, inputs: dict[str, Tensor], answer: list[int]) -> list[Tensor]:
    """The definition: the whole R <- R + C R of the sequence so far, its last row, for each answer token."""
    found = []
    for t, token in enumerate(answer):
        out = model.model(**longer(inputs, answer[:t]), output_attentions=True)
        logit = model.lm_head(out.last_hidden_state[0, -1])[token]
        gradients = torch.autograd.grad(logit, out.attentions)
        total = torch.eye(out.attentions[0].shape[-1])
        for weights, gradient in zip(out.attentions, gradients, strict=True):
            change = torch.zeros_like(total)
            for head in range(weights.shape[1]):
                change += (weights[0, head] * gradient[0, head]).clamp_min(0).detach()
            total = total + change / weights.shape[1] @ total
        found.append(total[-1])
    return found


def near(found: Tensor, expected: Tensor, to: float = 1e-5) -> bool:
    return float((found - expected).abs().max()) <= to * float(expected.abs().max())


# ---------------------------------------------------------------------- relevance
@pytest.mark.parametrize("family", FAMILIES)
def test_relevance_is_the_step_by_step_definition(family: str) -> None:
    model = model_of(family, attention="eager")  # fused attention rounds otherwise, by 1.2e-5
    inputs = prompt(model, family)
    (sample,), _ = owed(model, inputs, [ANSWERS[0]])
    assert sample is not None and all(p.requires_grad and p.grad is None for p in model.parameters())
    length = inputs["input_ids"].shape[1]
    for t, expected in enumerate(step_by_step(model, inputs, ANSWERS[0])):
        assert expected[:-1].max() > 0
        assert near(sample.relevance[t, : length + t - 1], expected[:-1])  # the last one is the token itself
        assert not sample.relevance[t, length + t :].any()
    (span,) = sample.spans
    assert torch.equal(sample.of_visual(0), sample.relevance[:, span.patches].mean(0))


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "qwen3_vl", "internvl_qwen3"])
def test_relevance_of_a_ragged_batch_is_that_of_each_sample_alone(family: str) -> None:
    model = model_of(family)
    inputs = prompts(model, family, samples(family))
    for mode in MODES:
        both, _ = owed(model, inputs, ANSWERS, mode=mode)
        for row, together in enumerate(both):
            single = alone(model, family, samples(family)[row], inputs, row)
            (by_itself,), _ = owed(model, single, [ANSWERS[row]], mode=mode)
            assert together is not None and by_itself is not None and len(together.spans) == (1, 2)[row]
            for i in range(len(together.spans)):
                assert near(together.of_visual(i), by_itself.of_visual(i), 3e-5)
                assert near(together.attention[i], by_itself.attention[i])
            assert together.relevance.shape[0] == (1 if mode == "fast" else len(ANSWERS[row]))


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_summed_relevance_adds_up_every_gradient_weighted_map(family: str) -> None:
    model = model_of(family, attention="eager")
    inputs = prompt(model, family)
    (sample,), _ = owed(model, inputs, [ANSWERS[0]], mode="summed")
    assert sample is not None
    length = inputs["input_ids"].shape[1]
    for t, token in enumerate(ANSWERS[0]):
        out = model.model(**longer(inputs, ANSWERS[0][:t]), output_attentions=True)
        gradients = torch.autograd.grad(model.lm_head(out.last_hidden_state[0, -1])[token], out.attentions)
        expected = sum(
            (a * g)[0].relu().mean(0).sum(0).detach() for a, g in zip(out.attentions, gradients, strict=True)
        )
        assert near(sample.relevance[t, : length + t], expected)


def test_the_oracle_ranks_by_the_relevance_that_it_is_told() -> None:
    model = model_of("llava")
    inputs = prompt(model, "llava")
    found = {}
    for name in ("exact", "summed"):
        with mm.compressed(model, mm.ExplainCompress(keep=5, mode="oracle", answer_tokens=3, relevance=name)):
            model(**inputs)
            found[name] = mm.trace(model).visuals[0].kept_cells().tolist()
        (sample,), _ = owed(model, inputs, mode=name, max_new_tokens=3)
        assert sample is not None
        assert found[name] == sample.of_visual(0).sort(descending=True, stable=True).indices[:5].sort().values.tolist()
    assert found["exact"] != found["summed"]
    with pytest.raises(ValueError, match="relevance='fast'"):
        mm.ExplainCompress(relevance="fast")


def test_fast_relevance_is_one_backward_pass_and_another_thing() -> None:
    model = model_of("llava", attention="eager")
    inputs, answer = prompt(model, "llava"), ANSWERS[0]
    (fast,), _ = owed(model, inputs, [answer], mode="fast")
    (exact,), _ = owed(model, inputs, [answer])
    out = model.model(**longer(inputs, answer[:-1]), output_attentions=True)
    length = inputs["input_ids"].shape[1]
    places = range(length - 1, length - 1 + len(answer))
    chances = model.lm_head(out.last_hidden_state[0]).log_softmax(-1)
    total = sum(chances[place, token] for place, token in zip(places, answer, strict=True))
    whole = torch.eye(out.attentions[0].shape[-1])
    for weights, gradient in zip(out.attentions, torch.autograd.grad(total, out.attentions), strict=True):
        whole = whole + (weights * gradient)[0].relu().mean(0).detach() @ whole
    assert fast is not None and exact is not None
    assert near(fast.relevance[0], whole[list(places)].mean(0))
    assert not near(fast.of_visual(0) / fast.of_visual(0).sum(), exact.of_visual(0) / exact.of_visual(0).sum(), 1e-2)


def test_the_answer_is_that_of_the_stock_model_up_to_its_end() -> None:
    model = model_of("llava")
    inputs = prompts(model, "llava", samples("llava"))
    made = model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :].tolist()
    model.generation_config.eos_token_id = made[0][2]
    short = made[0][: made[0].index(made[0][2])]
    mm.compress(model, "uniform(keep=2)")  # left out meanwhile
    found, _ = owed(model, inputs, max_new_tokens=6)
    assert "uniform" in repr(model._mmcompress_engine.plan)
    assert found[0] is not None and found[0].answer == tuple(short)
    model.generation_config.eos_token_id = made[0][0]
    found, _ = owed(model, inputs, [made[0], [3]])
    assert found[0] is None and found[1] is not None and found[1].answer == (3,)
    assert owed(model, inputs, [[], []])[0] == [None, None]


def test_relevances_are_explanations() -> None:
    model = model_of("llava_onevision")
    inputs = prompts(model, "llava_onevision", samples("llava_onevision"))
    raw, _ = owed(model, inputs, ANSWERS)
    for row, found in enumerate(answer_relevances(model, None, inputs, ANSWERS)):
        sample = raw[row]
        assert found is not None and sample is not None and found.answer_ids == ANSWERS[row]
        asked = len(found.tokens) - len(ANSWERS[row])
        assert asked and bool(found.maps[:asked].isnan().all()) and found.coverage == 1.0
        for i, span in enumerate(sample.spans):
            maps = torch.stack([found.token_map(t, i) for t in range(asked, len(found.tokens))])
            assert maps.min() >= 0 and maps.max() <= 1
            torch.testing.assert_close(maps * found.options["scale"], sample.relevance[:, span.patches])
    assert {t.id for t in found.tokens[:asked]} <= set(inputs["input_ids"][1].tolist())


def test_half_precision_frozen_parameters_and_inference_mode_have_relevance_too() -> None:
    model = model_of("llava")
    inputs = prompt(model, "llava")
    (plain,), _ = owed(model, inputs, ANSWERS[:1])
    with torch.inference_mode():
        (inside,), _ = owed(model.requires_grad_(False), inputs, ANSWERS[:1])
    half = build("llava", dtype=torch.bfloat16)
    (rough,), _ = owed(half, inputs, ANSWERS[:1])
    assert plain is not None and inside is not None and rough is not None
    assert torch.equal(plain.relevance, inside.relevance) and rough.relevance.dtype == torch.float32
    assert torch.corrcoef(torch.stack([plain.of_visual(0), rough.of_visual(0)]))[0, 1] > 0.9


def test_what_has_no_relevance_is_refused() -> None:
    model = model_of("llava")
    inputs = prompt(model, "llava")
    with pytest.raises(ValueError, match="mode='quick'"):
        owed(model, inputs, mode="quick")
    with pytest.raises(ValueError, match="no image"):
        owed(model, {"input_ids": torch.tensor([[5, 6, 7]])}, [[8]])
    right = prompts(model, "llava", samples("llava"), side="right")
    with pytest.raises(ValueError, match="pad on the left"):
        owed(model, right, ANSWERS)
    layers = model.model.language_model.layers
    undo = tiny.handing(layers[2].self_attn, sliding_window=8)
    with pytest.raises(NotImplementedError, match=r"layer 2 of .*sliding window of 8"):
        owed(model, inputs, ANSWERS[:1])
    mm.compress(model, "explain_compress")  # reads layer 0 alone
    with pytest.raises(NotImplementedError, match=r"explain_compress.*layer 2"):
        mm.compress(model, "explain_compress(mode='oracle')")
    undo()
    tiny.handing(layers[0].self_attn, position_bias=torch.zeros(1))
    for plan in ("explain_compress", "explain_compress(mode='oracle')"):
        with pytest.raises(NotImplementedError, match=r"explain_compress.*layer 0.*position_bias"):
            mm.compress(model, plan)


def test_attention_without_a_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llava")
    layer = model.model.language_model.layers[1]
    original = type(layer).forward

    def blind(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return original(self, hidden_states, *args, **kwargs)

    monkeypatch.setattr(type(layer), "forward", blind)
    with pytest.raises(NotImplementedError, match="cannot be differentiated"):
        owed(model, prompt(model, "llava"), ANSWERS[:1])


def test_prompts_grow_in_all_their_parts() -> None:
    positions = torch.arange(12).reshape(3, 1, 4)
    levels = {"visual_pos_masks": torch.tensor([[False, True, True, False]])}
    seen = Prompt(torch.zeros(1, 4, 2), positions, torch.tensor([[False, True, True, True]]), levels)
    whole = seen.followed_by(torch.ones(1, 2, 2))
    assert whole.positions is not None and whole.positions[:, 0, -3:].tolist() == [[3, 4, 5], [7, 8, 9], [11, 12, 13]]
    assert whole.mask.tolist() == [[False, True, True, True, True, True]]
    assert whole.levels["visual_pos_masks"].tolist() == [[False, True, True, False, False, False]]
    assert seen.behind(1, 2)["position_ids"][:, 0].tolist() == [[6], [10], [14]]


# ---------------------------------------------------------------------- labels
@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4))
def test_targets_and_divergence_are_those_of_the_slow_twin(rows: list[list[int]]) -> None:
    longest = max(map(len, rows))
    values = torch.tensor([[float(v) for v in row] + [9.0] * (longest - len(row)) for row in rows])
    here = torch.tensor([[i < len(row) for i in range(longest)] for row in rows])
    chances = torch.rand(values.shape, generator=torch.Generator().manual_seed(0)).log().masked_fill(~here, -math.inf)
    target = relevance_target(values, here)
    divergence = target_divergence(target, chances)
    for i, row in enumerate(rows):
        upper = sorted(range(len(row)), key=lambda j: (-row[j], j))[: (len(row) + 1) // 2]
        total = sum(row[j] for j in upper)
        expected = [row[j] / total if j in upper and total else 0.0 for j in range(len(row))]
        assert target[i].tolist() == pytest.approx(expected + [0.0] * (longest - len(row)))
        wanted = sum(p * (math.log(p) - float(chances[i, j])) for j, p in enumerate(expected) if p)
        assert float(divergence[i]) == pytest.approx(wanted, abs=1e-5)


# ---------------------------------------------------------------------- the net
def test_the_net_is_the_one_of_the_card() -> None:
    assert 177_000 < sum(p.numel() for p in Compressor().parameters()) < 179_000
    net = net_for(kernel=5, scaling="count")
    x = torch.rand(1, 7, generator=torch.Generator().manual_seed(1))
    rows = (x * 7)[0][:, None]  # tokens by channels
    for depthwise, pointwise in zip(net.depthwise, net.pointwise, strict=True):
        made = torch.zeros_like(rows)
        for token in range(7):
            for tap in range(5):
                if 0 <= token + tap - 2 < 7:
                    made[token] += depthwise.weight[tap] * rows[token + tap - 2]
        rows = torch.nn.functional.gelu((made + depthwise.bias) @ pointwise.weight.T + pointwise.bias)
    expected = (rows @ net.head.weight[0] + net.head.bias).log_softmax(0)
    torch.testing.assert_close(net(x)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scaling", ["zscore", "count"])
def test_padding_does_not_change_what_the_net_says(scaling: str) -> None:
    net = net_for(scaling=scaling)
    rows = [torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in (1, 4, 9)]
    x = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=5.0)
    here = torch.arange(9) < torch.tensor([[1], [4], [9]])
    together = net(x, here)
    for row, found, there in zip(rows, together, here, strict=True):
        torch.testing.assert_close(found[there], net(row[None])[0], atol=1e-6, rtol=1e-5)
        assert bool((found[~there] == -math.inf).all())
    assert bool(net(torch.zeros(2, 6)).isfinite().all())
    with pytest.raises(ValueError, match="kernel=4"):
        Compressor(kernel=4)
    with pytest.raises(ValueError, match="scaling='log'"):
        Compressor(scaling="log")


def test_a_saved_compressor_is_the_same_and_of_its_model_alone(tmp_path: Path) -> None:
    model = model_of("llava")
    net = net_for(kernel=5)
    folder = net.save_pretrained(tmp_path / "net", model)
    again = Compressor.from_pretrained(folder)
    x = torch.rand(2, 11)
    assert torch.equal(again(x), net(x)) and again.kernel == 5
    mm.compress(model, f"explain_compress(weights={str(folder)!r}, keep=5)")
    assert "weights" in repr(model._mmcompress_engine.plan)
    inputs = prompt(model, "llava")
    with torch.no_grad():
        model(**inputs)
    chosen = mm.trace(model).visuals[0].kept_cells()
    with torch.no_grad(), mm.compressed(model, mm.ExplainCompress(keep=5).holding(net)):
        model(**inputs)
        assert torch.equal(mm.trace(model).visuals[0].kept_cells(), chosen)
    with pytest.raises(ValueError, match="trained for another model"):
        mm.compress(model_of("llava", seed=1), "explain_compress", weights=folder)
    with pytest.raises(ValueError, match=r"no config\.json"):
        mm.compress(model, "explain_compress", weights=tmp_path)
    saved = Saved.load(folder)
    Saved("explain_compress", saved.base, saved.tensors, {**saved.options, "depth": 3}).save(folder)
    with pytest.raises(ValueError, match="do not say how they are built"):
        mm.compress(model, "explain_compress", weights=folder)
    Saved("explain_compress", saved.base, saved.tensors, {**saved.options, "kernel": 3}).save(folder)
    with pytest.raises(ValueError, match="do not fit"):
        mm.compress(model, "explain_compress", weights=folder)
    Saved("dyvte", saved.base, saved.tensors, saved.options).save(folder)
    with pytest.raises(ValueError, match="for 'dyvte'"):
        Compressor.from_pretrained(folder)
    (folder / CONFIG).write_text("{}")
    with pytest.raises(ValueError, match="does not describe weights"):
        mm.compress(model, "explain_compress", weights=folder)


# ---------------------------------------------------------------------- the stage
@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "best"},
        {"mode": "learned"},
        {"mode": "proxy", "weights": "x"},
        {"weights": ""},
        {"answer_tokens": 0},
        {"keep": 0},
    ],
)
def test_bad_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
        mm.ExplainCompress(**wrong)


def stages() -> list[mm.ExplainCompress]:
    return [mm.ExplainCompress(), mm.ExplainCompress(mode="oracle"), mm.ExplainCompress().holding(net_for())]


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), share=st.floats(0.01, 1.0), seed=st.integers(0, 99), flat=st.booleans())
def test_budgets_are_exact_and_ties_go_to_the_lower_token(n: int, share: float, seed: int, flat: bool) -> None:
    values = torch.rand(2, n, generator=torch.Generator().manual_seed(seed))
    values = torch.zeros_like(values) if flat else (values * 4).round()
    k = max(1, math.floor(share * n + 0.5))
    for stage in stages():
        seen = mm.Visuals(torch.zeros(2, n, 3).half(), mm.Layout.raster(1, 1, n), k, {stage.signal: values})
        with NoWaiting():
            keep = stage.select(seen).keep
        assert keep.shape == (2, k) and bool((keep.diff(dim=1) > 0).all())
        if stage.trained is None:
            expected = [sorted(sorted(range(n), key=lambda j: (-float(row[j]), j))[:k]) for row in values]
            assert keep.tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_choice_in_the_model_is_that_of_its_eager_attention(family: str) -> None:
    """Proxy and learned, in a ragged batch and alone."""
    model, net = model_of(family), net_for()
    inputs = prompts(model, family, samples(family))
    together: dict[Any, list[Tensor]] = {}
    modes = {"proxy": mm.ExplainCompress(keep=0.3), "learned": mm.ExplainCompress(keep=0.3).holding(net)}
    for name, stage in modes.items():
        with mm.compressed(model, stage):
            model(**inputs)
            for visual in mm.trace(model).visuals:
                together.setdefault((name, visual.row), []).append(visual.kept_cells())
            spans = mm.trace(model).call.spans
    model.set_attn_implementation("eager")
    for row in (0, 1):
        single = alone(model, family, samples(family)[row], inputs, row)
        first = model.model(**single, output_attentions=True).attentions[0][0].mean(0)
        gone = inputs["input_ids"].shape[1] - single["input_ids"].shape[1]
        for name, stage in modes.items():
            for i, span in enumerate(s for s in spans if s.row == row):
                scores = first[span.text - gone][:, span.patches - gone].mean(0)
                scores = net(scores[None])[0] if name == "learned" else scores
                best = scores.sort(descending=True, stable=True).indices[: span.kept].sort().values
                assert torch.equal(together[name, row][i], best)
            with mm.compressed(model, stage):
                model(**single)
                for visual, kept in zip(mm.trace(model).visuals, together[name, row], strict=True):
                    assert torch.equal(visual.kept_cells(), kept)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_oracle_lets_the_model_answer_first(family: str) -> None:
    model = model_of(family)
    inputs = prompts(model, family, samples(family))
    expected, _ = owed(model, inputs, max_new_tokens=3)
    stock = model.generate(**inputs, **GREEDY)
    with mm.compressed(model, mm.ExplainCompress(keep=0.25, mode="oracle", answer_tokens=3)):
        out = model.generate(**inputs, **GREEDY)
        visuals = mm.trace(model).visuals
    assert out.shape == stock.shape
    for row, sample in enumerate(expected):
        assert sample is not None and sample.answer == tuple(stock[row, inputs["input_ids"].shape[1] :][:3].tolist())
        mine = [visual for visual in visuals if visual.row == row]
        for i, visual in enumerate(mine):
            k = len(visual.kept_cells())
            best = sample.of_visual(i).sort(descending=True, stable=True).indices[:k]
            assert torch.equal(visual.kept_cells(), best.sort().values) and k < visual.tokens


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_all_tokens_are_the_stock_model(family: str) -> None:
    model = model_of(family)
    inputs = prompts(model, family, samples(family))
    logits, made = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    plans = [mm.ExplainCompress(keep=1.0), mm.ExplainCompress(keep=1.0, mode="oracle")]
    for stage in [*plans, mm.ExplainCompress(keep=1.0).holding(net_for())]:
        with mm.compressed(model, stage):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, **GREEDY), made)


@torch.no_grad()
def test_a_later_turn_reads_its_own_question() -> None:
    """The second picture is chosen by attention over a pruned cache; the oracle knows the first turn only."""
    model = model_of("llava")
    first, second = prompt(model, "llava"), prompt(model, "llava", 4, image("llava"), 3, seed=9)
    for mode, works in (("proxy", True), ("oracle", False)):
        with mm.compressed(model, mm.ExplainCompress(keep=4, mode=mode)):
            cache = model(**first, use_cache=True).past_key_values
            mask = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1])
            follow = {**second, "attention_mask": mask, "past_key_values": cache}
            if works:
                assert model(**follow).logits.isfinite().all() and len(mm.trace(model).visuals[0].kept_cells()) == 4
            else:
                with pytest.raises(NotImplementedError, match="first turn only"):
                    model(**follow)


def test_gradients_flow_through_what_is_kept() -> None:
    model = model_of("llava")
    inputs = prompt(model, "llava")
    with mm.compressed(model, "explain_compress(keep=4)"):
        model(**inputs).logits.sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
