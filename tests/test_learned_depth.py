# SPDX-License-Identifier: Apache-2.0
"""p_mod and gamma_mod: schedules, routing, and converted models of every family against slow twins."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm
from mmcompress.learn import GammaMoD, PMoD, attention_rank
from mmcompress.learn.depth import Routed, Seen, gathered, put_back
from mmcompress.runtime.cache import PrunedLayer

from .families import FAMILIES, IMAGE, QWEN, VIDEO, VIDEO_FAMILIES, build, prompts
from .flash import FlashStandIn
from .test_engine import follow_up
from .test_families import MIXED, alone, samples
from .tiny import GREEDY
from .watch import NoWaiting

OPTIONS: dict[str, dict[str, Any]] = {
    "p_mod": {"std": 0.5},
    "gamma_mod": {"layers": (1, 2), "std": 0.5, "threshold": 0.4},
}


def converted(model: Any, method: str, **more: Any) -> Any:
    torch.manual_seed(5)
    return mm.convert(model, method, **{**OPTIONS[method], **more})


# ---------------------------------------------------------------------- schedules and routing
def test_the_published_schedule() -> None:
    config = PMoD()
    assert config.converted(32) == tuple(range(8, 32))
    assert sum(config.ratios(32)) / 32 == pytest.approx(0.537, abs=1e-3)
    assert config.ratios(32)[24:] == [0.15] * 8
    assert PMoD(schedule="linear").raw(32)[:2] == [1.0, pytest.approx(30 / 31)]
    assert GammaMoD().converted(32) == tuple(range(3, 31))


def test_counts_are_cut_off() -> None:
    assert [PMoD.kept(n, 0.15) for n in (0, 1, 6, 7, 576)] == [0, 0, 0, 1, 86]
    assert PMoD.kept(20, 0.45) == 9 and PMoD.kept(7, 1.0) == 7


@given(st.integers(1, 400), st.integers(0, 400), st.sampled_from([0.25, 0.3, 0.34, 0.5, 1.0]))
def test_gamma_takes_all_behind_the_prefix(tokens: int, prefix: int, skip: float) -> None:
    prefix = min(prefix, tokens)
    config = GammaMoD(skip=skip)
    taken = config.taken(tokens, prefix)
    assert tokens - prefix <= taken <= tokens and taken == tokens - math.floor(prefix * skip)
    assert abs(config.taken(tokens, prefix, compat="reference") - taken) <= 1


def seen_of(batch: int, length: int, seed: int, training: bool = False) -> Seen:
    """Left-padded rows with visual tokens somewhere in them; one row may have none."""
    generator = torch.Generator().manual_seed(seed)
    valid = torch.arange(length) >= torch.randint(0, length // 2, (batch, 1), generator=generator)
    visual = (torch.rand(batch, length, generator=generator) < 0.6) & valid
    visual[:, -2:] = False
    visual[-1] &= seed % 2 == 0
    return Seen.of(visual, valid, training=training)


@given(st.integers(1, 3), st.integers(4, 24), st.integers(0, 10**6), st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_p_mod_runs_the_best_and_all_text(batch: int, length: int, seed: int, ratio: float) -> None:
    seen = seen_of(batch, length, seed)
    logits = torch.randn(batch, length, generator=torch.Generator().manual_seed(seed)).mul(2).round()  # with ties
    config = PMoD()
    routed = config.choose(seen, logits, ratio)
    assert routed.passing is not None and routed.counts == routed.runs.sum(1).tolist()
    for row in range(batch):
        places = [i for i in range(length) if seen.visual[row, i]]
        kept = sorted(places, key=lambda i: (-float(logits[row, i]), i))[: PMoD.kept(len(places), ratio)]
        for i in range(length):
            g = 0.2 * math.tanh(float(logits[row, i])) + 1
            assert bool(routed.runs[row, i]) == (i in kept or bool(seen.valid[row, i] and not seen.visual[row, i]))
            assert float(routed.mlp[row, i]) == pytest.approx(g if i in kept else 1.0)
            passes = bool(seen.visual[row, i]) and i not in kept
            assert float(routed.passing[row, i]) == pytest.approx(g if passes else 1.0)


def test_a_saturated_router_never_lets_text_take_the_place_of_a_visual_token() -> None:
    visual = torch.tensor([[False, True, True, True, False]])
    seen = Seen.of(visual, torch.ones_like(visual))
    routed = PMoD().choose(seen, torch.tensor([[1e4, -1e4, -1e4, -1e4, 1e4]]), 0.7)
    assert routed.runs.tolist() == [[True, True, True, False, True]]


@given(st.integers(1, 3), st.integers(4, 24), st.integers(0, 10**6), st.floats(0, 1))
@settings(deadline=None, max_examples=50)
def test_gamma_mod_in_training(batch: int, length: int, seed: int, skip: float) -> None:
    seen = seen_of(batch, length, seed, training=True)
    logits = torch.randn(batch, length, 2, generator=torch.Generator().manual_seed(seed)).mul(2).round()
    config = GammaMoD(skip=skip)
    routed = config.choose(seen, logits)
    r = logits.softmax(-1)[..., 1]
    losses = []
    for row in range(batch):
        visual = [i for i in range(length) if seen.visual[row, i]]
        prefix = [i for i in range(length) if seen.valid[row, i] and visual and i <= visual[-1]]
        out = sorted(prefix, key=lambda i: (float(r[row, i]), -i))[: math.floor(len(prefix) * skip)]
        for i in range(length):
            runs = bool(seen.valid[row, i]) and i not in out
            assert bool(routed.runs[row, i]) == runs
            if seen.valid[row, i]:
                losses.append(-math.log(float(r[row, i] if runs else 1 - r[row, i])))
    assert routed.loss is not None and float(routed.loss) == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_gamma_mod_in_use_goes_by_its_thresholds() -> None:
    visual = torch.tensor([[False, True, True, True, False]])
    r = torch.tensor([[0.004, 0.006, 0.4, 0.6, 0.001]])
    logits = torch.stack([torch.zeros_like(r), torch.log(r / (1 - r))], -1)
    valid = torch.ones_like(visual)
    assert GammaMoD().choose(Seen.of(visual, valid), logits).runs.tolist() == [[False, True, True, True, False]]
    step = GammaMoD().choose(Seen.of(visual[:, :1], valid[:, :1], decoding=True), logits[:, 3:4])
    assert bool(step.runs) and not bool(
        GammaMoD().choose(Seen.of(visual[:, :1], valid[:, :1], decoding=True), logits[:, 2:3]).runs
    )


def test_routing_of_p_mod_does_not_wait() -> None:
    seen, logits, config = seen_of(2, 20, 3), torch.randn(2, 20), PMoD()
    with NoWaiting():
        routed = config.choose(seen, logits, 0.4)
        assert routed.counts is not None
        packed = gathered(routed.runs, routed.counts)
        put_back(torch.randn(2, 20, 8), torch.randn(2, packed.source.shape[1], 8), packed, routed.passing)


def test_rows_that_pass_by_altogether() -> None:
    runs = torch.zeros(2, 5, dtype=torch.bool)
    packed = gathered(runs, [0, 0])
    hidden = torch.randn(2, 5, 3)
    assert packed.valid is not None and not packed.valid.any()
    made = torch.full((2, 1, 3), float("nan"))
    assert torch.equal(put_back(hidden, made, packed, None), hidden)
    assert torch.equal(put_back(hidden, made, packed, torch.full((2, 5), 0.5)), hidden / 2)


def test_rank_of_attention() -> None:
    one = torch.full((6, 6), 1 / 6)
    assert attention_rank(one).item() == 5  # the triangle of a constant has full rank but for its first row
    sink = torch.zeros(6, 6)
    sink[:, 0] = 1.0
    assert attention_rank(torch.stack([one, sink])).tolist() == [5, 1]


# ---------------------------------------------------------------------- converted models
def visual_tokens(inputs: dict[str, Tensor]) -> Tensor:
    return (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == VIDEO)


def twin(model: Any, inputs: dict[str, Tensor], route: Callable[[int, Tensor], Routed]) -> Tensor:
    """Logits of a stock model in which every layer runs all tokens, with the keys of those masked that are to pass by, and the
    outcome is put together token by token. route(layer, states) says what happens to them."""
    layers = model.model.language_model.layers
    length = inputs["input_ids"].shape[1]
    state: dict[int, tuple[Tensor, Routed]] = {}

    def before(index: int, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        hidden = args[0] if args else kwargs["hidden_states"]
        routed = route(index, hidden)
        state[index] = hidden, routed
        seen = torch.ones(length, length, dtype=torch.bool).tril()[None] & routed.runs[:, None]
        seen = (seen | torch.eye(length, dtype=torch.bool))[:, None]
        return args, {**kwargs, "attention_mask": seen}

    def mlp(index: int, module: Any, args: tuple, output: Tensor) -> Tensor:
        return output * state[index][1].mlp[..., None]

    def after(index: int, module: Any, args: tuple, output: Any) -> Any:
        hidden, routed = state[index]
        made = output[0] if isinstance(output, tuple) else output
        rest = hidden if routed.passing is None else hidden * routed.passing[..., None]
        made = torch.where(routed.runs[..., None], made, rest)
        return (made, *output[1:]) if isinstance(output, tuple) else made

    handles: list[Any] = []
    for i, layer in enumerate(layers):
        handles.append(
            layer.register_forward_pre_hook(lambda m, a, k, i=i: before(i, m, a, k), with_kwargs=True)  # type: ignore[misc]
        )
        handles.append(layer.mlp.register_forward_hook(lambda m, a, o, i=i: mlp(i, m, a, o)))  # type: ignore[misc]
        handles.append(layer.register_forward_hook(lambda m, a, o, i=i: after(i, m, a, o), prepend=True))  # type: ignore[misc]
    try:
        return model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def everything(valid: Tensor) -> Routed:
    return Routed(valid, torch.ones(valid.shape))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_p_mod_is_the_masked_twin(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, samples(family))
    valid, visual = inputs["attention_mask"].bool(), visual_tokens(inputs)
    converted(model, "p_mod")
    made = mm.conversion(model)
    routers = {i: copy.deepcopy(router) for i, router in made.engine.routers.items()}
    config = made.config
    assert isinstance(config, PMoD) and set(routers) == {1, 2, 3}
    logits = model(**inputs).logits
    tokens = [made.tokens_per_layer(row) for row in range(2)]
    mm.unconvert(model)

    def route(layer: int, hidden: Tensor) -> Routed:
        if layer not in routers:
            return everything(valid)
        z = routers[layer](hidden)[..., 0]
        g = 0.2 * torch.tanh(z) + 1
        kept = torch.zeros_like(visual)
        for row in range(2):
            places = visual[row].nonzero()[:, 0]
            k = int(len(places) * config.ratios(4)[layer])
            kept[row, places[g[row, places].sort(descending=True, stable=True).indices[:k]]] = True
        assert tokens[0][layer] == int((kept | (valid & ~visual))[0].sum())
        one = torch.ones_like(g)
        return Routed(kept | (valid & ~visual), torch.where(kept, g, one), None, torch.where(visual & ~kept, g, one))

    wanted = twin(model, inputs, route)
    error = (logits - wanted)[valid].abs().max() / wanted[valid].abs().max()
    assert error < 1e-4, error
    assert tokens[1] == sorted(tokens[1], reverse=True) and tokens[1][-1] < tokens[1][0]


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("family", QWEN)
def test_gamma_mod_is_the_masked_twin_where_ids_are_kept(family: str, training: bool) -> None:
    model = build(family)
    inputs = prompts(model, family, samples(family))
    valid, visual = inputs["attention_mask"].bool(), visual_tokens(inputs)
    converted(model, "gamma_mod")
    model.train(training)
    made = mm.conversion(model)
    router, config = copy.deepcopy(made.engine.routers[1]), made.config
    assert isinstance(config, GammaMoD)
    logits = model(**inputs, use_cache=False).logits
    loss = made.router_loss()
    tokens = made.tokens_per_layer(0)
    mm.unconvert(model)
    layers, seen, losses = model.model.language_model.layers, Seen.of(visual, valid, training=training), []

    def route(layer: int, hidden: Tensor) -> Routed:
        if layer not in (1, 2):
            return everything(valid)
        routed = config.choose(seen, router(layers[layer].input_layernorm(hidden)))
        losses.append(routed.loss)
        assert tokens[layer] == int(routed.runs[0].sum())
        return routed

    wanted = twin(model, inputs, route)
    assert (logits - wanted)[valid].abs().max() / wanted[valid].abs().max() < 1e-4
    if training:
        assert float(loss) == pytest.approx(0.01 * sum(map(float, losses)), rel=1e-4)
    else:
        assert float(loss) == 0


@torch.no_grad()
def test_gamma_mod_numbers_tokens_anew() -> None:
    """A LLaVA: the layer run by hand on the tokens that it keeps, with positions from 0."""
    model = build("llava")
    inputs = prompts(model, "llava", [[5, ("image", 28, 28), 4]])
    converted(model, "gamma_mod", layers=(2,))
    layer, norm = model.model.language_model.layers[2], model.model.language_model.layers[2].input_layernorm
    states: list[Tensor] = []
    handles = [
        model.model.language_model.layers[1].register_forward_hook(lambda m, a, o: states.append(o)),
        layer.register_forward_hook(lambda m, a, o: states.append(o)),
    ]
    model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    before, found = states
    router = mm.conversion(model).engine.routers[2]
    r = router(norm(before)).softmax(-1)[..., 1]
    kept = (r[0] > 0.4).nonzero()[:, 0]
    mm.unconvert(model)
    assert 0 < len(kept) < before.shape[1]
    x, rotary = before[:, kept], model.model.language_model.rotary_emb
    tables = rotary(x, torch.arange(len(kept))[None])
    attended = x + layer.self_attn(hidden_states=norm(x), position_embeddings=tables, attention_mask=None)[0]
    wanted = before.clone()
    wanted[:, kept] = attended + r[:, kept, None] * layer.mlp(layer.post_attention_layernorm(attended))
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_back_and_the_point_where_nothing_changes(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, samples(family))
    before, names = model(**inputs).logits, list(model.state_dict())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert mm.convert(model, "p_mod", minimum=1.0) is model
    assert any("depth_router" in name for name in model.state_dict())
    assert torch.equal(model(**inputs).logits, before)
    out = model.generate(**inputs, **GREEDY)
    assert len(set(mm.conversion(model).tokens_per_layer())) == 1
    for method in OPTIONS:
        mm.unconvert(model)
        converted(model, method)
        assert not torch.equal(model(**inputs).logits, before)
    mm.unconvert(mm.unconvert(model))
    assert torch.equal(model(**inputs).logits, before) and torch.equal(model.generate(**inputs, **GREEDY), out)
    assert list(model.state_dict()) == names
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_batches_equal_alone_and_decoding_goes_on(family: str, method: str) -> None:
    model = converted(build(family), method)
    inputs = prompts(model, family, samples(family))
    logits, out = model(**inputs).logits, model.generate(**inputs, **GREEDY)
    assert model(**inputs, output_hidden_states=True).hidden_states[2].shape[1] == inputs["input_ids"].shape[1]
    for row, sample in enumerate(samples(family)):
        single = alone(model, family, sample, inputs, row)
        mine = model(**single).logits
        assert (mine[0] - logits[row, -mine.shape[1] :]).abs().max() < 1e-4 * mine.abs().max()
        assert torch.equal(model.generate(**single, **GREEDY)[0, -6:], out[row, -6:])
    if method == "p_mod":  # gamma has another threshold for tokens of a prompt
        assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), out)


@torch.no_grad()
@pytest.mark.parametrize("method", OPTIONS)
def test_each_layer_has_its_own_cache(method: str) -> None:
    model = converted(build("llava"), method, **({"decode": 0.45} if method == "gamma_mod" else {}))
    inputs = prompts(model, "llava", samples("llava"))
    cache = model(**inputs).past_key_values
    made = mm.conversion(model)
    assert all(isinstance(layer, PrunedLayer) for layer in cache.layers)
    for layer, held in enumerate(cache.layers):
        assert held.physical == max(made.tokens_per_layer(row)[layer] for row in range(2))
        assert held.get_seq_length() == inputs["input_ids"].shape[1]
    assert "% of the KV cache" in made.report() and "tokens per layer 68" in made.report()


@torch.no_grad()
@pytest.mark.parametrize("method", OPTIONS)
def test_a_second_turn_and_beams(method: str) -> None:
    model = converted(build("llava"), method)
    inputs = prompts(model, "llava", [[5, ("image", 28, 28), 4], [3, ("image", 28, 28), 6]])
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    turn = follow_up(first.sequences, inputs["attention_mask"])
    again = model.generate(**turn, **GREEDY, past_key_values=first.past_key_values)
    assert again.shape[1] > turn["input_ids"].shape[1]
    if method == "p_mod":
        whole = {**turn, "pixel_values": inputs["pixel_values"]}
        assert torch.equal(model.generate(**whole, **GREEDY)[:, -6:], again[:, -6:])
    cache = model(**inputs, use_cache=True).past_key_values  # one prompt in two calls
    more = torch.randint(5, 140, (2, 5), generator=torch.Generator().manual_seed(7))
    ids, mask = (
        torch.cat([inputs[name], x], 1) for name, x in (("input_ids", more), ("attention_mask", torch.ones_like(more)))
    )
    joined = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits[:, -5:]
    parted = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
    assert (parted - joined).abs().max() < 1e-4 * joined.abs().max()
    beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    for row, sample in enumerate([[5, ("image", 28, 28), 4], [3, ("image", 28, 28), 6]]):
        single = alone(model, "llava", sample, inputs, row)
        assert torch.equal(
            model.generate(**single, max_new_tokens=4, do_sample=False, num_beams=3)[0, -4:], beams[row, -4:]
        )


@torch.no_grad()
def test_text_alone_runs_as_before_in_p_mod() -> None:
    model = build("llava")
    inputs = prompts(model, "llava", [[9], [4]])
    before = model(**inputs).logits
    assert torch.equal(converted(model, "p_mod")(**inputs).logits, before)
    out = model.generate(**inputs, **GREEDY)
    mm.unconvert(model)
    assert torch.equal(model.generate(**inputs, **GREEDY), out)
    assert not torch.equal(converted(model, "gamma_mod")(**inputs).logits, before)


@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradients_reach_everything_and_survive_checkpointing(family: str, method: str) -> None:
    model = converted(build(family), method)
    inputs = prompts(model, family, samples(family), side="right")
    model.train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        loss = model(**inputs, use_cache=False).logits.float().logsumexp(-1)[inputs["attention_mask"].bool()].mean()
        (loss + mm.conversion(model).router_loss()).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    routers = [name for name in plain if "depth_router" in name]
    assert len(routers) == (6 if method == "p_mod" else 1)
    assert all(plain[name].isfinite().all() for name in plain) and all(plain[n].abs().max() > 0 for n in routers)
    model.gradient_checkpointing_enable()
    again = gradients()
    two = [model(**inputs, use_cache=False).logits.float().logsumexp(-1).mean() for _ in range(2)]
    sum(two).backward()  # type: ignore[union-attr]
    assert plain.keys() == again.keys()
    for name, grad in plain.items():
        assert torch.allclose(grad, again[name], rtol=1e-3, atol=1e-5 * float(grad.abs().max()) + 1e-12), name


@torch.no_grad()
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(method: str, dtype: torch.dtype) -> None:
    model = converted(build("llava", dtype=dtype), method)
    inputs = prompts(model, "llava", samples("llava"))
    logits, tokens = model(**inputs).logits, mm.conversion(model).tokens_per_layer()
    assert model.generate(**inputs, **GREEDY).shape[0] == 2
    exact = model.float()(**{name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}).logits
    assert logits.isfinite().all() and logits.dtype == dtype
    for one, other in zip(tokens, mm.conversion(model).tokens_per_layer(), strict=True):
        assert abs(one - other) <= (0 if method == "p_mod" else 2)
    alike = torch.cosine_similarity(logits.float(), exact, dim=-1)[inputs["attention_mask"].bool()]
    assert alike.median() > 0.999 and alike.min() > 0.5, alike.sort().values[:5]


@torch.no_grad()
@pytest.mark.parametrize("method", OPTIONS)
def test_eager_attention_is_the_same(method: str) -> None:
    model = converted(build("llava"), method)
    inputs = prompts(model, "llava", samples("llava"))
    valid = inputs["attention_mask"].bool()
    sdpa, out = model(**inputs).logits[valid], model.generate(**inputs, **GREEDY)
    model.set_attn_implementation("eager")
    assert (model(**inputs).logits[valid] - sdpa).abs().max() < 1e-4 * sdpa.abs().max()
    assert torch.equal(model.generate(**inputs, **GREEDY), out)


@torch.no_grad()
@pytest.mark.parametrize("method", OPTIONS)
def test_static_caches_and_flash_attention(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = converted(build("llava"), method)
    inputs = prompts(model, "llava", samples("llava"))
    valid = inputs["attention_mask"].bool()
    logits, out = model(**inputs).logits[valid], model.generate(**inputs, **GREEDY)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(**inputs, **GREEDY, **static), out)
    flash = FlashStandIn(monkeypatch)
    flash.enable(model)
    assert (model(**inputs).logits[valid] - logits).abs().max() < 1e-4 * logits.abs().max()
    assert torch.equal(model.generate(**inputs, **GREEDY), out)
    assert flash.calls


@torch.no_grad()
@pytest.mark.parametrize("method", OPTIONS)
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_and_pictures_together(family: str, method: str) -> None:
    model = converted(build(family), method)
    inputs = prompts(model, family, samples(family, MIXED))
    logits, tokens = model(**inputs).logits, mm.conversion(model).tokens_per_layer()
    assert logits.isfinite().all() and tokens[2] < tokens[0]
    out = model.generate(**inputs, **GREEDY)
    if method == "p_mod":
        assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), out)
    longer = {
        name: torch.nn.functional.pad(x, (3, 0))
        for name, x in inputs.items()
        if x.shape[:2] == inputs["input_ids"].shape
    }
    padded = model(**{**inputs, **longer}).logits[:, 3:]  # what is in the padding does not matter
    real = inputs["attention_mask"].bool()
    assert (padded - logits)[real].abs().max() < 1e-4 * logits[real].abs().max()


@torch.no_grad()
def test_a_copy_of_a_converted_model_is_one_too() -> None:
    model = converted(build("llava"), "p_mod")
    inputs = prompts(model, "llava", samples("llava"))
    other = copy.deepcopy(model)
    wanted = model(**inputs).logits
    mm.unconvert(model)
    assert torch.equal(other(**inputs).logits, wanted)
    mm.unconvert(other)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_a_probe_for_redundant_layers() -> None:
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava"))
    ranks = mm.attention_ranks(model, inputs)
    assert len(ranks) == 4 and all(1 <= rank <= inputs["input_ids"].shape[1] for rank in ranks)
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    single = alone(model, "llava", samples("llava")[0], inputs, 0)
    other = alone(model, "llava", samples("llava")[1], inputs, 1)
    assert mm.attention_ranks(model, [single, other]) == pytest.approx(ranks, abs=1.0)
    model.set_attn_implementation("eager")
    maps = model(**single, use_cache=False, output_attentions=True).attentions
    by_hand = [np.linalg.matrix_rank(np.tril(weights[0].numpy(), -1)).mean() for weights in maps]
    assert mm.attention_ranks(model, single) == pytest.approx(
        by_hand, abs=0.25
    )  # one of four heads may lie at the edge
    with pytest.raises(ValueError, match="at least one batch"):
        mm.attention_ranks(model, [])


# ---------------------------------------------------------------------- save, load, errors
@torch.no_grad()
@pytest.mark.parametrize("method", OPTIONS)
def test_save_and_load(method: str, tmp_path: Path) -> None:
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava"))
    stock = model(**inputs).logits
    converted(model, method)
    changed = model.model.language_model.layers[2].mlp.up_proj.weight
    changed.add_(0.1 * torch.randn(changed.shape, generator=torch.Generator().manual_seed(2)))
    assert list(mm.conversion(model).changed()) == ["model.language_model.layers.2.mlp.up_proj.weight"]
    wanted = model(**inputs).logits
    mm.conversion(model).save(tmp_path / "w", {"by": "a test"})
    other = mm.convert(build("llava"), method, weights=tmp_path / "w")
    assert mm.conversion(other).config == mm.conversion(model).config
    assert torch.equal(other(**inputs).logits, wanted)
    mm.conversion(other).save(tmp_path / "again")
    mm.unconvert(other)
    assert torch.equal(other(**inputs).logits, stock)
    assert torch.equal(mm.convert(other, method, weights=tmp_path / "again")(**inputs).logits, wanted)
    wrong = build("llava", seed=3)
    with pytest.raises(ValueError, match="another model"):
        mm.convert(wrong, method, weights=tmp_path / "w")
    with pytest.raises(ValueError, match="not converted"):
        mm.conversion(wrong)
    with pytest.raises(ValueError, match=f"weights for '{method}', not for"):
        mm.convert(build("llava"), "p_mod" if method == "gamma_mod" else "gamma_mod", weights=tmp_path / "w")
    with pytest.raises(ValueError, match="leave them out"):
        mm.convert(build("llava"), method, weights=tmp_path / "w", std=0.1)


def test_clear_errors() -> None:
    model = build("llava")
    for method, options, words in [
        ("mod", {}, "there is gamma_mod, p_mod"),
        ("p_mod", {"keep": 0.5}, "no option 'keep': its options are: schedule"),
        ("p_mod", {"schedule": "step"}, "choose 'cosine'"),
        ("p_mod", {"minimum": 1.5}, "minimum=1.5: give a part"),
        ("p_mod", {"scale": -1}, "scale=-1: give a number, at least 0.0"),
        ("p_mod", {"maximum": 1.0}, "converts layer 0"),
        ("p_mod", {"shift": 9.0}, "converts no layer"),
        ("gamma_mod", {}, "converts no layer of a language model of 4"),
        ("gamma_mod", {"layers": (2, 1)}, "ascending"),
        ("gamma_mod", {"layers": (3, 4)}, "converts layer 4"),
        ("gamma_mod", {"layers": (1,), "skip": 2}, "skip=2: give a number from 0.0 to 1.0"),
    ]:
        with pytest.raises(ValueError, match=words):
            mm.convert(model, method, **options)
    converted(model, "p_mod")
    with pytest.raises(ValueError, match="converted already, by PMoD"):
        mm.convert(model, "p_mod")
    with pytest.raises(NotImplementedError, match=r"mmcompress\.unconvert"):
        mm.compress(model, "divprune", keep=0.5)
    with pytest.raises(ValueError, match="no call with something to route"):
        mm.conversion(model).report()
    with pytest.raises(NotImplementedError, match="call the whole model"):
        model.model.language_model(inputs_embeds=torch.zeros(1, 3, 64))
    mm.unconvert(model)
    mm.compress(model, "divprune", keep=0.5)
    with pytest.raises(NotImplementedError, match=r"mmcompress\.uncompress"):
        mm.convert(model, "p_mod")
    with pytest.raises(NotImplementedError, match="is not supported"):
        mm.convert(torch.nn.Linear(2, 2), "p_mod")
    with pytest.raises(NotImplementedError, match="layers that look back only so far"):
        mm.convert(build("llava_onevision", use_sliding_window=True, sliding_window=8, max_window_layers=0), "p_mod")
