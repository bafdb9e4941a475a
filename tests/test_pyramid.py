# SPDX-License-Identifier: Apache-2.0
"""pyramiddrop, sparsevlm and transprune: their arithmetic, slow twins, edge cases, and their decisions in a model by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm
from mmcompress.budget import (
    check_mean,
    distinct_layers,
    floored,
    kept_beside_recycled,
    layer_mean,
    recycling,
    scaled_to_mean,
)
from mmcompress.methods.sparsevlm import PUBLISHED
from mmcompress.ops.density import density_peaks
from mmcompress.ops.transitions import transition, transition_value

from .families import FAMILIES, QWEN, build, image, prompts
from .reference import captured, rows_shown
from .test_engine import close
from .test_families import alone, kept_places, samples, visual_places
from .tiny import GREEDY
from .watch import NoWaiting

CUTS = {"pyramiddrop": (8, 16, 24), "sparsevlm": (3, 7, 16), "transprune": (7, 9, 12)}
PLANS = ["pyramiddrop", "sparsevlm", "sparsevlm(version='2.0')", "transprune", "transprune(absolute=True)"]


def stage_of(plan: str) -> Any:
    return mm.as_pipeline(plan).stages[0]


# ---------------------------------------------------------------------- arithmetic
def test_the_published_means_of_the_cards() -> None:
    def mean(stage: Any) -> float:
        return layer_mean(576, stage.budgets(576, 32), stage.cuts(32), 32)

    assert mean(mm.PyramidDrop()) == 270
    assert mm.TransPrune().budgets(576, 32) == (504, 360, 72) and mean(mm.TransPrune()) == 236.25
    lists = {
        "1.5": {192: (309, 204, 113), 128: (312, 117, 39), 96: (249, 55, 27), 64: (82, 32, 18)},
        "2.0": PUBLISHED["2.0"],
    }
    means = {"1.5": (206.5, 145.4, 114.1, 82.2), "2.0": (206.8, 144.1, 113.9, 81.8)}  # the cards have them rounded
    for version, settings_ in lists.items():
        stages = [mm.SparseVLM(version=version, setting=name) for name in settings_]
        assert [s.budgets(576, 32) for s in stages] == list(settings_.values())
        assert [mean(s) for s in stages] == pytest.approx(means[version], abs=0.06)
    assert mm.SparseVLM().budgets(576, 32) == (309, 204, 113)


def test_published_settings_of_pyramiddrop_follow_from_the_mean() -> None:
    """The third-party setting for 128, and what the card works out for 64."""
    for keep, counts in ((128, (184, 92, 46)), (64, (56, 28, 14))):
        stage = mm.PyramidDrop(keep=keep)
        assert stage.cuts(32) == (2, 10, 20) and stage.budgets(576, 32) == counts
        assert layer_mean(576, counts, (2, 10, 20), 32) == keep
    assert mm.PyramidDrop(keep=270 / 576).cuts(32) == (8, 16, 24)
    assert mm.PyramidDrop(keep=270 / 576).budgets(576, 32) == (288, 144, 72)
    assert mm.PyramidDrop(keep=0.46).cuts(32) == (2, 10, 20)
    assert mm.PyramidDrop(keep=0.2, layers=(0.1, 0.2, 0.3)).cuts(30) == (3, 6, 9)


def test_sparsevlm_scales_the_list_that_is_nearest() -> None:
    for version in PUBLISHED:
        for name in PUBLISHED[version]:
            counts = mm.SparseVLM(version=version, setting=name).budgets(576, 32)
            mean = layer_mean(576, counts, (3, 7, 16), 32)
            found = mm.SparseVLM(math.floor(mean), version=version).budgets(576, 32)
            assert max(abs(a - b) for a, b in zip(found, counts, strict=True)) <= 4
    a, b = (mm.SparseVLM(0.3, setting=name).budgets(576, 32) for name in (192, 64))
    assert a[0] < b[0] and a[2] > b[2]


@pytest.mark.parametrize(
    ("where", "depth", "expected"),
    [((8, 16, 24), 32, (8, 16, 24)), ((1, 1, 2), 4, (1, 2, 3)), ((1, 1, 1), 4, (1, 2, 3)), ((2, 2), 5, (2, 3)), ((1,), 2, (1,))],
)  # fmt: skip
def test_cuts_on_one_layer_move_up(where: tuple[int, ...], depth: int, expected: tuple[int, ...]) -> None:
    assert distinct_layers(where, depth) == expected


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_a_cut_that_keeps_as_much_as_the_one_before_drops_nothing(version: str) -> None:
    stage = mm.SparseVLM(version=version, ratios=(0.5, 0.5, 0.5))
    assert stage.budgets(16, 32) == ((9, 9, 9) if version == "1.5" else (8, 8, 8))  # one stands for what is merged


def test_too_few_layers_and_wrong_order() -> None:
    with pytest.raises(ValueError, match=r"before the layers \(1, 2, 3\).* has 3 layers.*layers=.*or earlier"):
        distinct_layers((1, 1, 2), 3)
    with pytest.raises(ValueError, match="ascending"):
        distinct_layers((3, 2), 8)
    with pytest.raises(ValueError, match="has 2 layers"):
        mm.SparseVLM().cuts(2)
    with pytest.raises(ValueError, match="ascending"):
        mm.PyramidDrop(layers=(0.5, 3, 0.9)).cuts(32)
    for plan in PLANS:
        for depth in (4, 5, 6, 12, 24, 28, 32, 36, 40):
            found = stage_of(plan).cuts(depth)
            assert len(set(found)) == 3 and found[-1] < depth
        assert stage_of(plan).cuts(32) == CUTS[stage_of(plan).name]
    assert mm.PyramidDrop().cuts(28) == (7, 14, 21)


def twin(
    ratios: list[float], tokens: int, layers: list[int], depth: int, budget: Fraction
) -> tuple[list[int], Fraction]:
    """All counts at every factor at which one of them changes, in fractions; the largest that fit, filled up. And the mean."""
    ends, parts = [*layers[1:], depth], [Fraction(str(ratio)) for ratio in ratios]

    def mean(counts: list[int]) -> Fraction:
        total = layers[0] * tokens + sum(n * (b - a) for n, a, b in zip(counts, layers, ends, strict=True))
        return Fraction(total, depth)

    found = [1] * len(ratios)
    for factor in sorted({j / (part * tokens) for part in parts for j in range(1, tokens + 1)}):
        counts = [min(tokens, max(1, math.floor(factor * part * tokens))) for part in parts]
        if mean(counts) > budget:
            break
        found = counts
    more = True
    while more:
        more = False
        for i in range(len(found)):
            trial = [n + (j == i) for j, n in enumerate(found)]
            if trial[i] <= (trial[i - 1] if i else tokens) and mean(trial) <= budget:
                found, more = trial, True
    return found, mean(found)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_scaled_to_mean_equals_trying_everything(data: st.DataObject) -> None:
    depth = data.draw(st.integers(2, 20))
    layers = sorted(data.draw(st.sets(st.integers(1, depth - 1), min_size=1, max_size=4)))
    tokens = data.draw(st.integers(1, 50))
    ratios = sorted(
        (data.draw(st.sampled_from([0.06, 0.125, 0.25, 0.3, 0.5, 0.75, 1.0])) for _ in layers), reverse=True
    )
    least = layer_mean(tokens, [1] * len(layers), layers, depth)
    keep = data.draw(
        st.integers(math.ceil(least), tokens)
        if data.draw(st.booleans())
        else st.sampled_from([n / 40 for n in range(1, 41)])
    )
    if isinstance(keep, float) and keep * depth <= layers[0]:
        with pytest.raises(ValueError, match="cut earlier"):
            scaled_to_mean(ratios, tokens, layers, depth, keep)
        return
    budget = Fraction(keep) if isinstance(keep, int) else Fraction(round(keep * 40), 40) * tokens
    found = scaled_to_mean(ratios, tokens, layers, depth, keep)
    expected, mean = twin(ratios, tokens, layers, depth, budget)
    assert list(found) == expected
    assert list(found) == sorted(found, reverse=True) and found[-1] >= 1 and found[0] <= tokens
    if set(found) != {1}:
        assert mean <= budget
    assert mean > budget - 1 or set(found) == {tokens}


def test_a_mean_that_cannot_be_reached() -> None:
    match = r"keep=0.05 .* 2 of the 32 layers .* above 0.062: cut earlier \(layers=...\), or prune before the language model"
    with pytest.raises(ValueError, match=match):
        mm.PyramidDrop(keep=0.05).cuts(32)
    with pytest.raises(ValueError, match=r"keep=36 .* 36.9 or more, with 576 visual tokens: cut earlier"):
        mm.PyramidDrop(keep=36).budgets(576, 32)
    assert mm.PyramidDrop(keep=37).budgets(576, 32) == (1, 1, 1)
    with pytest.raises(ValueError, match=r"keep=600.*only 576"):
        mm.PyramidDrop(keep=600).budgets(576, 32)
    with pytest.raises(ValueError, match=r"above 0\.250"):
        mm.compress(build("llava"), "sparsevlm", keep=0.25)
    check_mean(None, (8,), 32)
    # a ratio fits visuals of every size: a single token stays
    assert mm.PyramidDrop(keep=0.1).budgets(1, 32) == (1, 1, 1)


def test_recycling_and_what_is_kept_beside_it() -> None:
    assert [recycling(d) for d in (0, 1, 3, 4, 30, 33, 276, 510)] == [
        (0, 0), (1, 1), (1, 1), (2, 1), (10, 2), (10, 2), (83, 9), (154, 16),
    ]  # fmt: skip
    for tokens in (*range(1, 60), 144, 576, 2880):
        for k in range(1, tokens + 1):
            kept = kept_beside_recycled(tokens, k)
            fits = [m for m in range(1, tokens) if m + recycling(tokens - m)[1] == k] if tokens < 200 else [kept]
            assert kept == (max(fits) if fits else 1) and kept <= k
            if k > recycling(tokens - 1)[1] and tokens > 1:
                assert kept + recycling(tokens - kept)[1] == k
    for name, lists in PUBLISHED["1.5"].items():
        tokens = 576
        for kept, k in zip(lists, mm.SparseVLM(setting=name).budgets(576, 32), strict=True):
            assert kept_beside_recycled(tokens, k) == kept
            tokens = k


# ---------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("plan", "match"),
    [
        ("pyramiddrop(keep=0)", "count must be at least 1"),
        ("pyramiddrop(keep=1.5)", r"ratio must lie in \(0, 1\]"),
        ("pyramiddrop(layers=8)", "layers=8: give a tuple"),
        ("pyramiddrop(layers=())", "give a tuple"),
        ("pyramiddrop(layers=(0, 3, 5))", "layers=0: .*at least 1"),
        ("pyramiddrop(layers=(0.5, 0.25, 0.75))", "ascending order"),
        ("pyramiddrop(layers=(0.25, 0.5))", "as many ratios as layers"),
        ("pyramiddrop(ratios=(0.5, 0.25))", "as many ratios as layers"),
        ("pyramiddrop(ratios=(0.25, 0.5, 0.1))", "do not rise"),
        ("pyramiddrop(ratios=(1.5, 0.5, 0.1))", "do not rise"),
        ("pyramiddrop(ratios=(288, 144, 72))", "floats in"),
        ("pyramiddrop(ratios=0.5)", "give a tuple"),
        ("sparsevlm(version='1.0')", "choose '1.5' .*or '2.0'"),
        ("sparsevlm(version=2.0)", "choose '1.5' .*or '2.0'"),
        ("sparsevlm(setting=100)", "choose 192, 128, 96, 64"),
        ("sparsevlm(setting=64, ratios=(.5, .2, .1))", "one of both"),
        ("sparsevlm(heads=2)", "version='2.0'"),
        ("sparsevlm(heads=0, version='2.0')", "heads=0"),
        ("transprune(start=-1)", "start=-1"),
        ("transprune(start=1.5)", r"float in \[0, 1\)"),
        ("transprune(start=())", "ascending order"),
        ("transprune(start=(4, 3))", "ascending order"),
        ("transprune(start=(0.5, 0.6))", "ascending order"),
        ("transprune(absolute=1)", "choose False"),
        ("transprune(layer=3)", "no option 'layer': did you mean 'layers'"),
    ],
)  # fmt: skip
def test_invalid_options(plan: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        mm.as_pipeline(plan)


def test_transprune_starts_before_it_cuts() -> None:
    for options in ({"start": 7}, {"start": 9}, {"start": 0.3}):
        with pytest.raises(ValueError, match="start earlier or cut later"):
            mm.TransPrune(**options).cuts(32)  # type: ignore[arg-type]
    assert mm.TransPrune(start=6).cuts(32) == (7, 9, 12)
    assert mm.TransPrune(start=1e-5).needs[0] == "transitions@0.000010000"


def test_transprune_sums_up_some_layers() -> None:
    stage = mm.TransPrune(layers=(4, 8, 12), start=(3, 4, 5, 6, 9, 10))
    assert stage.cuts(32) == (4, 8, 12) and mm.as_pipeline(repr(stage)).parts == (stage,)
    for start in ((4, 9), (3, 32), (3, 40)):
        with pytest.raises(ValueError, match="name a layer before it, and none that is not there"):
            replace(stage, start=start).cuts(32)


OTHERS = ["pyramiddrop(keep=0.3, layers=(2, 0.5), ratios=(0.5, 0.1))", "sparsevlm(keep=0.4, setting=64)"]


@pytest.mark.parametrize("plan", [*PLANS, *OTHERS])
def test_plans_survive_print_and_json(plan: str) -> None:
    pipeline = mm.as_pipeline(plan)
    assert mm.as_pipeline(repr(pipeline)) == pipeline
    assert mm.as_pipeline(json.loads(json.dumps(pipeline.to_dict()))) == pipeline


def test_positions_of_the_references() -> None:
    assert [stage_of(plan).positions for plan in PLANS] == ["reindex", "reindex", "keep", "reindex", "reindex"]


# ---------------------------------------------------------------------- density peaks
def slow_peaks(x: Tensor, count: int) -> tuple[list[int], list[int]]:
    """For the tokens [n, C] of one row, one by one."""
    n = len(x)
    far = [[float((x[i].double() - x[j].double()).norm()) / x.shape[1] ** 0.5 for j in range(n)] for i in range(n)]
    density = [-sum(d * d for d in sorted(row)[:count]) / count for row in far]
    gap = []
    for i in range(n):
        denser = [far[i][j] for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        gap.append(min(denser) if denser else max(map(max, far)))
    value = [density[i] + (math.log(gap[i]) if gap[i] else -math.inf) for i in range(n)]
    centres = sorted(range(n), key=lambda i: (-value[i], i))[:count]
    into = [
        centres.index(i) if i in centres else min(range(count), key=lambda c: (far[i][centres[c]], c)) for i in range(n)
    ]
    return centres, into


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_density_peaks_equal_the_slow_twin(count: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(3, 12, 6, generator=generator) * scale
    x[1, 3:9] = x[1, 2] + 1e-3 * scale * torch.randn(6, 6, generator=generator)  # a heap
    x[2, 7] = x[2, 1]  # a copy
    centres, into = density_peaks(x, count)
    for row in range(3):
        assert (centres[row].tolist(), into[row].tolist()) == slow_peaks(x[row], count)
    alone = density_peaks(x[1:2], count)
    assert torch.equal(alone[0][0], centres[1]) and torch.equal(alone[1][0], into[1])


def test_density_peaks_find_heaps_that_are_far_apart() -> None:
    """Where exp(-distance^2) is 0 for every token that is alone; and without any difference it is the first ones."""
    heaps = torch.tensor([[0.0], [1.0], [0.0], [1.0], [1.0], [2.0]]) * 300
    centres, into = density_peaks(heaps.expand(6, 4)[None], 3)
    assert into[0].tolist() in ([0, 1, 0, 1, 1, 2], [1, 0, 1, 0, 0, 2], [1, 2, 1, 2, 2, 0], [2, 1, 2, 1, 1, 0])
    centres, into = density_peaks(torch.ones(1, 5, 4), 2)
    assert centres.tolist() == [[0, 1]] and into.tolist() == [[0, 1, 0, 0, 0]]


# ---------------------------------------------------------------------- slow twins of the decisions
def shown(
    stage: Any, tokens: int, k: int, rows: int = 2, words: int = 5, heads: int = 5, seed: int = 0, smooth: float = 1.0
) -> mm.Visuals:
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * smooth

    attention = (3 * noise(rows, heads, words, tokens)).softmax(-1)
    values = {
        "last_attention": (3 * noise(rows, tokens)).softmax(-1),
        "text_relevance": (2 * noise(rows, words)).softmax(-1),
        "text_attention": attention.mean(1),
        "text_attention_heads": attention,
        "rotary_gain": 1 + noise(rows, words, tokens),
        "transitions": noise(rows, tokens).exp(),
        "absolute_transitions": noise(rows, tokens).exp(),
    }
    signals = {name: values[name.partition("@")[0]] for name in stage.needs}
    return mm.Visuals(noise(rows, tokens, 8), mm.Layout.raster(1, 1, tokens), k, signals)


def slow(stage: Any, seen: mm.Visuals, row: int) -> tuple[list[int], list[list[int]]]:
    """Slots of the output tokens of one row, and the slots that each was made of, by loops."""
    n, k = seen.n, seen.k
    signals = {name.partition("@")[0]: x[row].double().tolist() for name, x in seen.signals.items()}
    if stage.name == "pyramiddrop":
        score = signals["last_attention"]
    elif stage.name == "transprune":
        changed, asked = signals[stage.changes.partition("@")[0]], signals["text_attention"]
        attended = [sum(word[j] for word in asked) / len(asked) for j in range(n)]
        score = [changed[j] / (sum(changed) + 1e-8) + attended[j] / (sum(attended) + 1e-8) for j in range(n)]
    else:
        relevance = signals["text_relevance"]
        raters = [w for w, r in enumerate(relevance) if r > sum(relevance) / len(relevance)]
        raters = raters or list(range(len(relevance)))
        if stage.version == "1.5":
            score = [sum(signals["text_attention"][w][j] for w in raters) / len(raters) for j in range(n)]
        else:
            gain = signals["rotary_gain"]
            gain = [[math.copysign(max(abs(g), 1e-4), g) for g in word] for word in gain]
            by_head = [
                [sum(head[w][j] / gain[w][j] for w in raters) / len(raters) for j in range(n)]
                for head in signals["text_attention_heads"]
            ]
            count = stage.heads or math.ceil(len(by_head) / 2)
            chosen = sorted(range(len(by_head)), key=lambda h: (-sum(by_head[h]), h))[:count]
            score = [sum(by_head[h][j] for h in chosen) / len(chosen) for j in range(n)]
    order = sorted(range(n), key=lambda j: (-score[j], j))
    if stage.name != "sparsevlm" or stage.version == "2.0":
        keep = sorted(order[:k])
        return keep, [[j] for j in keep]
    kept = kept_beside_recycled(n, k)
    merged = int(0.3 * (n - kept)) + 1 if n > kept else 0
    keep, spare = sorted(order[:kept]), sorted(order[kept : kept + merged])
    if k == kept:
        return keep, [[j] for j in keep]
    centres, into = slow_peaks(seen.features[row][spare], k - kept)
    members = [[spare[i] for i in range(len(spare)) if into[i] == c] for c in range(k - kept)]
    return [*keep, *(spare[c] for c in centres)], [*([j] for j in keep), *members]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([*PLANS, "sparsevlm(version='2.0', heads=4)"]),
    st.integers(1, 70),
    st.integers(1, 70),
    st.integers(0, 99),
)
def test_decisions_equal_slow_twins(plan: str, tokens: int, k: int, seed: int) -> None:
    """Exact budget, order, and members of merged tokens, for every N and k."""
    stage, k = stage_of(plan), min(k, tokens)
    seen = shown(stage, tokens, k, seed=seed)
    chosen = stage.select(seen)
    made = chosen.apply(seen.features)
    assert chosen.keep.shape == (2, k)
    for row in range(2):
        keep, members = slow(stage, seen, row)
        assert chosen.keep[row].tolist() == keep
        expected = torch.stack([seen.features[row, m].mean(0) for m in members])
        close(made[row], expected, 1e-5)
        if chosen.assign is not None:
            into = [[j for j in range(tokens) if chosen.assign[row, j] == c] for c in range(k)]
            assert into == members


def test_raters_where_no_word_is_above_the_mean() -> None:
    """One word, or all alike: all are raters; without any word the first tokens stay."""
    stage = mm.SparseVLM()
    seen = shown(stage, 12, 5, words=1)
    assert torch.equal(stage.score(seen), seen.signals["text_attention"][:, 0])
    assert stage.raters(torch.tensor([[0.25, 0.25, 0.25, 0.25]])).all()
    assert stage.raters(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).tolist() == [[False, True, True, False]]
    assert stage.raters(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [
        [False, False, True]
    ]  # the mean is not above itself
    for plan in PLANS[1:]:
        stage = stage_of(plan)
        seen = shown(stage, 6, 3, words=0)
        if "transprune" in plan:
            assert torch.equal(stage.select(seen).keep, mm.Selection.top(seen[stage.changes], 3).keep)
        else:
            assert stage.select(seen).keep[:, :2].tolist() == [[0, 1]] * 2


def test_gain_near_zero_and_negative() -> None:
    """Nothing divides by less than 1e-4, and the sign of the gain stays."""
    stage = mm.SparseVLM(version="2.0", heads=1)
    seen = shown(stage, 4, 1, rows=1, words=1, heads=1)
    seen.signals["text_attention_heads"][:] = 1e-5
    seen.signals["rotary_gain"][:] = torch.tensor([1e-9, -1e-9, 0.0, 1.0])
    close(stage.score(seen), torch.tensor([[0.1, -0.1, 0.1, 1e-5]]), 1e-6)


# ---------------------------------------------------------------------- edge cases
def variants(seen: mm.Visuals) -> dict[str, mm.Visuals]:
    def of(change: Callable[[Tensor], Tensor]) -> mm.Visuals:
        return replace(seen, features=change(seen.features), signals={n: change(x) for n, x in seen.signals.items()})

    return {
        "plain": seen,
        "equal": of(lambda x: torch.ones_like(x)),
        "zero": of(lambda x: torch.zeros_like(x)),
        "float16": of(lambda x: x.half()),
        "bfloat16": of(lambda x: x.bfloat16()),
    }


@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("plan", PLANS)
def test_edge_cases(plan: str, tokens: int) -> None:
    stage = stage_of(plan)
    for k in {1, 2, tokens // 2, tokens - 1, tokens} & set(range(1, tokens + 1)):
        for name, seen in variants(shown(stage, tokens, k)).items():
            with NoWaiting():
                chosen = stage.select(seen)
            for row in chosen.keep.tolist():
                assert len(set(row)) == k and min(row) >= 0 and max(row) < tokens
            made = chosen.apply(seen.features)
            assert made.isfinite().all() and made.dtype == seen.features.dtype
            if name == "equal" and not chosen.merges:
                assert chosen.keep[0].tolist() == list(range(k))
            one = replace(seen, features=seen.features[1:], signals={n: x[1:] for n, x in seen.signals.items()})
            assert torch.equal(stage.select(one).keep[0], chosen.keep[1])


@pytest.mark.parametrize("plan", PLANS)
def test_gradient_flows_through_kept_and_merged_tokens(plan: str) -> None:
    stage = stage_of(plan)
    seen = shown(stage, 60, 20)
    features = seen.features.requires_grad_()
    chosen = stage.select(seen)
    chosen.apply(features).square().sum().backward()
    assert features.grad is not None
    touched = features.grad.abs().sum(2) > 0
    used = torch.zeros_like(touched).scatter(1, chosen.keep, True) if chosen.assign is None else chosen.assign >= 0
    assert torch.equal(touched, used)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(PLANS),
    st.integers(1, 3000),
    st.sampled_from([4, 6, 28, 32]),
    st.sampled_from([None, 0.26, 0.4, 0.77, 1.0]),
)
def test_budgets_of_every_size(plan: str, tokens: int, depth: int, keep: float | None) -> None:
    """Whole numbers that never rise, and a mean that is not above what was asked for."""
    stage = replace(stage_of(plan), keep=keep)
    counts, cuts = stage.budgets(tokens, depth), stage.cuts(depth)
    assert all(1 <= b <= a for a, b in zip((tokens, *counts), counts, strict=False))
    if keep is not None:
        mean = layer_mean(tokens, counts, cuts, depth)
        assert mean <= keep * tokens + 1e-6 or set(counts) == {1}
        assert mean > keep * tokens - 1 or set(counts) == {tokens}
    elif plan == "pyramiddrop":
        assert counts == floored((0.5, 0.25, 0.125), tokens)


# ---------------------------------------------------------------------- in the models
@torch.no_grad()
@pytest.mark.parametrize("plan", [p for p in PLANS if "absolute" not in p])
@pytest.mark.parametrize("family", FAMILIES)
def test_runs_on_every_family_and_batched_equals_alone(family: str, plan: str) -> None:
    model = mm.compress(build(family), plan)
    inputs = prompts(model, family, samples(family))
    batch = model.generate(**inputs, **GREEDY)[:, -6:]
    trace = mm.trace(model)
    for row, parts in enumerate(samples(family)):
        counts = trace.tokens_per_layer(row)
        tokens = sum(v.tokens for v in trace.visuals if v.row == row)
        left = [tokens - (counts[0] - n) for n in counts]
        assert left == [tokens, *stage_of(plan).budgets(tokens, 4)]
        assert torch.equal(model.generate(**alone(model, family, parts, inputs, row), **GREEDY)[0, -6:], batch[row])


@torch.no_grad()
def test_keep_of_one_changes_nothing() -> None:
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava"))
    logits = model(**inputs).logits
    for plan in PLANS:
        with mm.compressed(model, replace(stage_of(plan), keep=1.0)):
            assert torch.equal(model(**inputs).logits, logits)


class ByHand:
    """One sample through the stock layers with eager attention, cut as a method says; every signal from the weights that the
    attention modules themselves return."""

    def __init__(self, model: Any, seen: dict[str, Any], row: int, real: Tensor, visual: Tensor, text: Tensor) -> None:
        self.model, self.language_model = model, model.model.language_model
        self.hidden = self.embeds = seen["inputs_embeds"][row : row + 1, real]
        positions = seen["position_ids"]
        positions = torch.arange(seen["inputs_embeds"].shape[1])[None] if positions is None else positions
        self.positions = positions[..., row if positions.shape[-2] > 1 else 0, :][..., None, real]
        self.places, self.visual, self.text = real, visual[real], text[real]
        self.weights = torch.empty(0)
        self.changed = torch.zeros(len(real))
        words = (self.embeds[0, self.visual] @ self.embeds[0, self.text].T).softmax(1).mean(0)
        self.raters = words > words.mean()

    def attend(self, layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
        tables = self.language_model.rotary_emb(hidden, self.positions)
        n = hidden.shape[1]
        mask = torch.full((1, 1, n, n), torch.finfo(hidden.dtype).min).triu(1)
        return layer.self_attn(hidden, position_embeddings=tables, attention_mask=mask)[:2]

    def run(self, layer: Any, absolute: bool, counted: bool) -> None:
        before = layer.input_layernorm(self.hidden)
        out, self.weights = self.attend(layer, before)
        self.hidden = self.hidden + out
        middle = layer.post_attention_layernorm(self.hidden)
        mlp = layer.mlp(middle)
        self.hidden = self.hidden + mlp
        if counted:
            for x, y in ((before, out), (middle, mlp)):
                self.changed = self.changed + transition_value(*transition(x, y), absolute=absolute)[0]

    def signals(self, layer: Any, stage: Any) -> dict[str, Tensor]:
        """The signals of a cut before `layer`, [1, ...]."""
        at = self.visual
        found = {}
        for name in stage.needs:
            weights = self.weights
            if name.endswith("@next"):
                weights = self.attend(layer, layer.input_layernorm(self.hidden))[1]
            kind = name.partition("@")[0]
            if kind == "last_attention":
                found[name] = weights.mean(1)[:, -1, at]
            elif kind == "text_attention":
                found[name] = weights.mean(1)[:, self.text][..., at]
            elif kind == "text_attention_heads":
                found[name] = weights[:, :, self.text][..., at]
            elif kind == "text_relevance":
                found[name] = self.raters[None].float()  # more than the mean: those that are
            elif kind == "rotary_gain":
                width = self.language_model.layers[0].self_attn.head_dim
                theta = 10000.0 ** (-torch.arange(0, width, 2) / width)
                apart = self.positions[..., self.text].flatten()[:, None] - self.positions[..., at].flatten()
                found[name] = 2 * (apart[..., None] * theta).cos().sum(-1)[None] / width**0.5
            else:
                found[name] = self.changed[None, at]
        return found

    def cut(self, layer: Any, stage: Any, k: int, number: int, reindex: bool) -> None:
        at = self.visual.nonzero()[:, 0]
        seen = mm.Visuals(
            self.hidden[:, at], mm.Layout.raster(1, 1, len(at)), k, self.signals(layer, stage), cut=number
        )
        keep, members = slow(stage, seen, 0)
        slots = at[keep]
        made = torch.stack([self.hidden[0, at[m]].mean(0) for m in members])
        stay = torch.isin(torch.arange(len(self.places)), slots) | ~self.visual
        source = torch.arange(len(self.places))
        source[slots.sort().values], source = slots, source
        hidden = self.hidden.clone()
        hidden[0, slots.sort().values] = made
        self.hidden, source = hidden[:, stay], source[stay]
        self.positions = self.positions[..., : len(source)] if reindex else self.positions[..., source]
        self.changed, self.places = self.changed[source], self.places[source]
        self.visual, self.text = self.visual[stay], self.text[stay]


@torch.no_grad()
@pytest.mark.parametrize("plan", [*PLANS, "transprune(start=(0, 2))"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "internvl_qwen3", "qwen2_5_vl"])
def test_decisions_and_logits_equal_eager_layers_by_hand(family: str, plan: str) -> None:
    """Three cuts in a batch of two, with sdpa, against one sample at a time with the eager weights of the model."""
    if family in QWEN and "2.0" in plan:
        pytest.skip("the twin has no M-RoPE")
    model = build(family)
    inputs = prompts(model, family, samples(family))
    with captured(model) as given:
        model(**inputs)
    stage = stage_of(plan)
    mm.compress(model, stage)
    logits = model(**inputs).logits
    trace, shape = mm.trace(model), inputs["input_ids"].shape
    visual, texts = visual_places(model, shape), torch.zeros(shape, dtype=torch.bool)
    for span in trace.call.spans:
        texts[span.row, span.text] = True
    found = [kept_places(model, inputs, layer) for layer in range(4)]
    mm.uncompress(model)
    model.set_attn_implementation("eager")
    cuts = stage.cuts(4)
    assert cuts == (1, 2, 3)
    for row in range(2):
        real = inputs["attention_mask"][row].nonzero()[:, 0]
        hand = ByHand(model, given, row, real, visual[row], texts[row])
        budgets = stage.budgets(int(visual[row].sum()), 4)
        for i, layer in enumerate(model.model.language_model.layers):
            if i in cuts:
                number = cuts.index(i)
                hand.cut(layer, stage, budgets[number], number, stage.positions == "reindex" and family not in QWEN)
            assert found[i][row].tolist() == sorted(hand.places.tolist())
            start = getattr(stage, "start", 0)
            hand.run(layer, getattr(stage, "absolute", False), not isinstance(start, tuple) or i in start)
        expected = model.lm_head(model.model.language_model.norm(hand.hidden))[0]
        close(logits[row, hand.places], rows_shown(expected, hand.places, inputs["input_ids"][row]), 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "internvl_qwen3"])
def test_a_later_turn_sees_renumbered_keys(family: str) -> None:
    """The last word of a second turn attends to what is left of the first picture, at its new place."""
    model = build(family)
    one, two = (prompts(model, family, [[5, image(family), 4]], seed=i, mask=False) for i in range(2))
    plan = "pyramiddrop(layers=(1, 3), ratios=(0.5, 0.2))"
    mm.compress(model, plan)
    cache = model(**one, use_cache=True).past_key_values
    first = [
        kept[0]
        for kept in (
            kept_places(model, {**one, "attention_mask": torch.ones_like(one["input_ids"])}, i) for i in range(4)
        )
    ]
    visual = [visual_places(model, one["input_ids"].shape)[0]]
    model(**two, past_key_values=cache)
    second = [
        kept[0]
        for kept in (
            kept_places(model, {**two, "attention_mask": torch.ones_like(two["input_ids"])}, i) for i in range(4)
        )
    ]
    visual.append(visual_places(model, two["input_ids"].shape)[0])
    mm.uncompress(model)
    model.set_attn_implementation("eager")
    joined = {n: torch.cat([one[n], two[n]], 1 if n == "input_ids" else 0) for n in one}
    with captured(model) as given:
        model(**joined)
    length = len(visual[0])
    whole = torch.cat([visual[0], torch.zeros(len(visual[1]), dtype=torch.bool)])
    hand = ByHand(model, given, 0, torch.arange(len(whole)), whole, torch.zeros_like(whole))
    hand.text[-1] = True
    stage, own = stage_of(plan), torch.cat([torch.zeros(length, dtype=torch.bool), visual[1]])
    for i, layer in enumerate(model.model.language_model.layers):
        if i in (1, 3):
            # the first picture goes as it went in the first turn; then the last word of the second one looks at its own
            stay = torch.isin(hand.places, first[i]) | (hand.places >= length)
            hand.hidden, hand.places, hand.changed = hand.hidden[:, stay], hand.places[stay], hand.changed[stay]
            hand.positions = hand.positions[..., : len(hand.places)]
            hand.visual, hand.text = own[hand.places], hand.text[stay]
            budgets = stage.budgets(int(visual[1].sum()), 4)
            hand.cut(layer, stage, budgets[(1, 3).index(i)], 0, True)
            assert hand.places[hand.places >= length].tolist() == (second[i] + length).tolist()
        hand.run(layer, False, False)
