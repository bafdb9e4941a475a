# SPDX-License-Identifier: Apache-2.0
"""Budget, plans, selections, shared operations: properties and exact cases."""

from __future__ import annotations

import json
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mmcompress as mm
from mmcompress.budget import exact_merge_schedule, keep_text, merge_schedule, read_keep, resolve, scaled_to_mean
from mmcompress.ops import argmax_first, bipartite_match, merge_mean
from mmcompress.trace import Shape, kv_bytes, prefill_flops

INPUT_METHODS = ["random", "uniform", "divprune", "visionzip"]


def some_visuals(u: int, n: int, k: int, seed: int = 0, cls: bool = True, equal: bool = False) -> mm.Visuals:
    g = torch.Generator().manual_seed(seed)
    features = torch.ones(u, n, 6) if equal else torch.randn(u, n, 6, generator=g)
    encoder = torch.ones(u, n, 5) if equal else torch.randn(u, n, 5, generator=g)
    attention = torch.ones(u, n) if equal else torch.rand(u, n, generator=g)
    signals = {"cls_attention": attention, "keys": encoder, "encoder_features": encoder}
    if cls:
        signals["cls_feature"] = torch.randn(u, 5, generator=g)
    return mm.Visuals(features, mm.Layout.raster(1, 1, n), k, signals, road=lambda x: torch.cat([x, x[..., :1]], -1))


# ---------------------------------------------------------------------- budget
@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_a_ratio_is_rounded_half_to_even_and_keeps_one_at_least(keep: float, tokens: int) -> None:
    assert resolve(keep, tokens) == max(1, round(keep * tokens))


@given(st.integers(1, 5000), st.integers(0, 5000))
def test_a_count_is_the_count(keep: int, more: int) -> None:
    assert resolve(keep, keep + more) == keep


def test_budget_rounding_cases() -> None:
    assert [resolve(0.5, n) for n in (1, 3, 5, 576)] == [1, 2, 2, 288]
    assert resolve(0.098, 576) == 56
    assert resolve(1.0, 7) == 7


@given(st.integers(1, 700), st.integers(1, 30), st.integers(0, 1), st.data())
@settings(deadline=None)
def test_merge_schedules_are_exact(tokens: int, blocks: int, protected: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    fewest = tokens
    for _ in range(blocks):
        fewest -= fewest // 2
    if keep < fewest:
        with pytest.raises(ValueError, match=f"keep at least {fewest}"):
            exact_merge_schedule(tokens, keep, blocks, protected)
        return
    schedule = exact_merge_schedule(tokens, keep, blocks, protected)
    now = tokens
    for r in schedule:
        assert 0 <= r <= now // 2
        now -= r
    assert (now, len(schedule)) == (keep, blocks)


def test_an_even_schedule_is_even() -> None:
    assert exact_merge_schedule(576, 64, 23, 1) == [23] * 6 + [22] * 17
    assert merge_schedule((5, 4), 3) == [5, 4, 0]


@pytest.mark.parametrize(
    ("text", "keep"),
    [
        ("0.25", 0.25), ("25%", 0.25), (" 12.5 % ", 0.125), ("33.3%", 0.333), ("100%", 1.0), ("1.0", 1.0), ("1e-1", 0.1),
        ("64", 64), ("1", 1), ("007", 7),
    ],
)  # fmt: skip
def test_keep_as_it_is_written(text: str, keep: float) -> None:
    found = read_keep(text)
    assert found == keep and type(found) is type(keep)
    again = read_keep(keep_text(found))
    assert again == keep and type(again) is type(keep)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a", "keep='a': write a ratio as 0.25 or 25%, a count as an int"),
        ("", "keep=''"), ("%", "keep='%'"), ("1/4", "keep='1/4'"), ("0", "keep=0: a count must be at least 1"),
        ("0%", "keep=0.0: a ratio"), ("150%", "keep=1.5: a ratio"), ("nan", "keep=nan"), ("nan%", "keep=nan"), ("-3", "keep=-3.0"),
        ("2.0", "keep=2.0: a ratio must lie in (0, 1]; for a count write an int, e.g. keep=2"),
    ],
)  # fmt: skip
def test_what_is_no_keep(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_keep(text)


def test_what_rounding_leaves_goes_to_no_count_above_the_budget() -> None:
    """A mean of just under the next token is not rounded up to it, and a product of floats that should be whole is."""
    assert scaled_to_mean((0.5,), 100, (1,), 2, 0.75) == (50,)
    for part in range(2, 100):  # keep * tokens * depth is whole, but for the error of floats
        keep = (100 + part) / 200
        assert scaled_to_mean((0.5,), 100, (1,), 2, keep) == (part,), keep
        assert scaled_to_mean((0.5,), 100, (1,), 2, keep - 1e-5) == (part - 1,), keep
        assert scaled_to_mean((0.5,), 100, (1,), 2, keep + 1e-5) == (part,), keep


# ---------------------------------------------------------------------- methods alone
@pytest.mark.parametrize("method", INPUT_METHODS)
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_exact_budget_order_and_no_slot_twice(method: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 40))
    k = data.draw(st.integers(1, n - 1))
    equal, cls = data.draw(st.booleans()), data.draw(st.booleans())
    stage = mm.as_pipeline(method, keep=k).input_stages[0]
    both = stage.select(some_visuals(2, n, k, seed=n, cls=cls, equal=equal))
    assert both.keep.shape == (2, k)
    assert both.keep.min() >= 0 and both.keep.max() < n
    for row in both.keep:
        assert len(set(row.tolist())) == k
        if method != "visionzip":
            assert row.tolist() == sorted(row.tolist())
    assert torch.equal(stage.select(some_visuals(2, n, k, seed=n, cls=cls, equal=equal)).keep, both.keep)
    if both.assign is not None:
        assert set(both.assign.unique().tolist()) <= set(range(-1, k))
        own = both.assign.gather(1, both.keep)
        assert (own[:, 1 if cls else 0 :] == torch.arange(1 if cls else 0, k)).all()
    assert both.rows is None or both.rows.isfinite().all()


@pytest.mark.parametrize("method", INPUT_METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_features(method: str, dtype: torch.dtype) -> None:
    visuals = some_visuals(2, 20, 6)
    signals = {name: signal.to(dtype) for name, signal in visuals.signals.items()}
    visuals = mm.Visuals(visuals.features.to(dtype), visuals.layout, 6, signals, road=visuals.road)
    stage = mm.as_pipeline(method, keep=6).input_stages[0]
    selection = stage.select(visuals)
    taken = visuals.take(selection)
    assert taken.features.dtype == dtype and taken.features.isfinite().all()


def test_visionzip_merges_by_mean_or_sum() -> None:
    visuals = some_visuals(1, 12, 5)
    features = visuals["encoder_features"]
    for merge in ("sum", "mean"):
        selection = mm.VisionZip(keep=5, contextual=2, merge=merge).select(visuals)
        assert selection.rows is not None and selection.assign is not None
        for j in (3, 4):
            target = int(selection.keep[0, j])
            others = [i for i in range(12) if int(selection.assign[0, i]) == j and i != target]
            own = features[0, target]
            if others:
                mean = features[0, others].mean(0)
                own = own + mean if merge == "sum" else (own + features[0, others].sum(0)) / (1 + len(others))
            assert torch.allclose(selection.rows[0, j, :5], own, atol=1e-6)
        assert torch.equal(selection.rows[0, 0, :5], visuals["cls_feature"][0])


@pytest.mark.parametrize("cls", [True, False])
def test_visionzip_with_more_contextual_tokens_than_there_is_room_for(cls: bool) -> None:
    """All but one output are contextual; with CLS that one is CLS, at the lowest patch without an output of its own."""
    visuals = some_visuals(2, 12, 5, cls=cls)
    most = mm.VisionZip(keep=5, contextual=4).select(visuals)
    for contextual in (5, 99):
        found = mm.VisionZip(keep=5, contextual=contextual).select(visuals)
        assert torch.equal(found.keep, most.keep) and torch.equal(found.assign, most.assign)  # type: ignore[arg-type]
    for contextual in (0, 1, 4):
        found = mm.VisionZip(keep=5, contextual=contextual).select(visuals)
        dominant = 5 - contextual - cls
        for u in range(2):
            kept, score = found.keep[u].tolist(), visuals["cls_attention", "received_attention"][u]
            best = score.argsort(descending=True, stable=True)[:dominant].sort().values.tolist()
            assert kept[int(cls) : cls + dominant] == best
            rest = [i for i in range(12) if i not in best]
            step = max(1, len(rest) // contextual) if contextual else 1
            assert kept[cls + dominant :] == rest[: step * contextual : step]
            assert not cls or kept[0] == min(set(range(12)) - set(kept[1:]))


def test_tome_merges_half_at_most() -> None:
    """A token has one partner: of what is left a block merges half, whatever r says, and then there is nothing more."""
    assert mm.ToMe(r=9).schedule(16, 5, 1) == [8, 4, 2, 1, 0]
    assert mm.ToMe(r=(3, 9, 2, 9)).schedule(16, 5, 0) == [3, 6, 2, 2, 0]
    assert mm.ToMe(r=8).schedule(16, 2, 0) == [8, 4] and mm.ToMe(r=7).schedule(16, 2, 0) == [7, 4]


def test_gradients_flow_through_kept_tokens() -> None:
    for method in INPUT_METHODS:
        visuals = some_visuals(1, 12, 5)
        signals = {name: signal.clone().requires_grad_() for name, signal in visuals.signals.items()}
        features = visuals.features.clone().requires_grad_()
        visuals = mm.Visuals(features, visuals.layout, 5, signals, road=visuals.road)
        stage = mm.as_pipeline(method, keep=5).input_stages[0]
        visuals.take(stage.select(visuals)).features.sum().backward()
        source = signals["encoder_features"] if method == "visionzip" else features
        assert source.grad is not None and source.grad.abs().sum() > 0


# ---------------------------------------------------------------------- shared operations
def test_ties_go_to_the_lower_index() -> None:
    assert argmax_first(torch.tensor([[1.0, 3, 3], [2, 2, 2], [float("-inf")] * 3])).tolist() == [1, 0, 0]
    assert mm.Selection.top(torch.zeros(1, 6), 3).keep.tolist() == [[0, 1, 2]]


@given(st.integers(2, 33), st.integers(0, 1), st.integers(0, 99), st.data())
@settings(deadline=None, max_examples=60)
def test_bipartite_match_and_merge(tokens: int, protected: int, seed: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(0, (tokens - protected) // 2))
    g = torch.Generator().manual_seed(seed)
    keys, x, size = (
        torch.randn(2, tokens, 4, generator=g),
        torch.randn(2, tokens, 3, generator=g),
        torch.rand(2, tokens, generator=g) + 1,
    )
    target, count = bipartite_match(keys, r, protected)
    assert count == tokens - r
    for row in target:
        assert set(row.tolist()) == set(range(count))
        if protected:
            assert row[0] == 0 and (row[1:] > 0).all()
    merged, total = merge_mean(x, size, target, count)
    assert torch.allclose(total.sum(1), size.sum(1), atol=1e-4)
    assert torch.allclose((merged * total[..., None]).sum(1), (x * size[..., None]).sum(1), atol=1e-4)


def test_selection_follows_companions() -> None:
    x = torch.arange(12.0).view(1, 6, 2)
    chosen = mm.Selection.of(torch.tensor([[4, 1, 5]]))
    assert chosen.keep.tolist() == [[1, 4, 5]]
    assert torch.equal(chosen.apply(x), x[:, [1, 4, 5]])
    both = chosen.then(mm.Selection.of(torch.tensor([[0, 2]])), 6)
    assert both.keep.tolist() == [[1, 5]]
    spread = both.scatter(torch.tensor([[10.0, 20.0]]), 6)[0]
    assert spread.isnan().tolist() == [True, False, True, True, True, False]
    merged = mm.Selection(torch.tensor([[0, 3]]), torch.tensor([[0, 0, -1, 1, 1, 1]]))
    after = chosen.then(mm.Selection(torch.tensor([[0]]), torch.tensor([[0, -1, 0]])), 6)
    assert after.assign is not None and after.assign.tolist() == [[-1, 0, -1, -1, -1, 0]]
    assert merged.scatter(torch.tensor([[1.0, 2.0]]), 6)[0, [0, 1, 3, 4, 5]].tolist() == [1, 1, 2, 2, 2]


def test_who_speaks_for_a_cluster_that_keeps_several() -> None:
    """Five tokens for two clusters: the large one keeps more members, and its dropped ones go to its median, not to the last."""
    found = mm.Selection.of_clusters(torch.tensor([[7, 7, 7, 2, 7, 7, 7, 2]]), 5)
    # the medians 3 (of 3, 7) and 2 (of 0, 1, 2, 4, 5, 6), then members of the larger cluster in order
    assert found.keep.tolist() == [[0, 1, 2, 3, 4]]
    assert found.assign is not None and found.assign.tolist() == [[0, 1, 2, 3, 4, 2, 2, 3]]
    only = mm.Selection.of_clusters(torch.tensor([[5, 5, 5, 5, 9, 9]]), 1)  # the smaller cluster is dropped
    assert only.keep.tolist() == [[1]] and only.assign is not None and only.assign.tolist() == [[0, 0, 0, 0, -1, -1]]


# ---------------------------------------------------------------------- plans
@pytest.mark.parametrize(
    "text",
    [
        "visionzip(keep=0.25)",
        "visionzip(keep=0.25) >> fastv(layer=3, keep=0.5)",
        "tome(keep=0.5) >> divprune(keep=64) >> fastv(keep=0.5)",
        "plan(random(keep=0.25, seed=7) >> uniform(keep=3), positions='keep')",
        "plan(divprune(keep=0.25), structural='drop')",
        "plan(divprune(keep=0.25) >> fastv(layer=3, keep=0.5), positions='reindex', structural='drop')",
        "tome(keep=None, r=(4, 3))",
    ],
)
def test_plan_strings_round_trip(text: str) -> None:
    plan = mm.as_pipeline(text)
    assert repr(plan) == text
    assert mm.as_pipeline(repr(plan)) == plan
    assert mm.as_pipeline(json.loads(json.dumps(plan.to_dict()))) == plan


def test_plain_values_say_everything() -> None:
    plan = mm.as_pipeline("divprune(keep=64)", structural="drop")
    assert plan.to_dict() == {"stages": [{"method": "divprune", "keep": 64}], "positions": None, "structural": "drop"}
    assert mm.as_pipeline({"stages": [{"method": "divprune"}]}).structural == "keep"
    both = mm.as_pipeline("divprune", structural="drop") >> mm.as_pipeline("fastv")
    assert both.structural == "drop" and (mm.as_pipeline("divprune") >> mm.as_pipeline("fastv")).structural == "keep"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("divprune(keep=25%)", "divprune(keep=0.25)"),
        ("divprune(keep=.5%) >> fastv(layer=20 %, keep=50 %)", "divprune(keep=0.005) >> fastv(layer=0.2, keep=0.5)"),
        ("plan(random(keep=100%), positions='keep')", "plan(random(keep=1.0), positions='keep')"),
        ("random(keep='25%')", "random(keep=0.25)"),
        ({"stages": [{"method": "random", "keep": "25%"}]}, "random(keep=0.25)"),
    ],
)
def test_percent_in_plans(written: Any, meant: str) -> None:
    assert repr(mm.as_pipeline(written)) == meant
    assert mm.as_pipeline("random", keep="25%") == mm.as_pipeline("random(keep=0.25)")


def test_percent_signs_in_texts_stay() -> None:
    plan = mm.as_pipeline("explain_compress(weights='a 25% b', keep=25%)")
    assert (plan.stages[0].options()["weights"], plan.stages[0].options()["keep"]) == ("a 25% b", 0.25)


def test_one_token_is_warned_about() -> None:
    plans = [
        "divprune(keep=1)",
        mm.DivPrune(keep=1),
        mm.DivPrune(keep=0.5) >> mm.FastV(layer=2, keep=1),
        "pyramiddrop(keep=1)",
    ]
    for plan in plans:
        with pytest.warns(UserWarning, match="keep=1 is a count, one token; for all write keep=1.0 or 100%") as seen:
            mm.as_pipeline(plan)
        assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for plan in (
            "divprune(keep=1.0)",
            "divprune(keep=100%)",
            "divprune(keep=2)",
            "tome(keep=None, r=1)",
            "cmai",
            "fastv(layer=1)",
        ):
            mm.as_pipeline(plan)
    with warnings.catch_warnings(record=True) as told:  # as python shows warnings unless told otherwise: once
        warnings.simplefilter("default")
        for _ in range(3):
            mm.as_pipeline("divprune(keep=1)")
    assert len(told) == 1


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match=r"method 'divprune' is registered already, by mmcompress\.methods\.divprune"):
        mm.register("divprune")(mm.FastV)
    assert mm.FastV.name == "fastv" and mm.methods()["divprune"] is mm.DivPrune
    assert mm.register("divprune")(mm.DivPrune) is mm.DivPrune  # a module that is read again


def test_operators_and_defaults() -> None:
    plan = mm.VisionZip(keep=0.25) >> mm.FastV(layer=2, keep=0.5)
    assert plan == mm.as_pipeline("visionzip(keep=0.25) >> fastv(layer=2, keep=0.5)")
    assert mm.as_pipeline("visionzip").position_policy() == "reindex"
    assert mm.as_pipeline("fastv").position_policy() == "keep"
    assert mm.as_pipeline("visionzip", positions="keep").position_policy() == "keep"


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("visionzap(keep=0.25)", "unknown method 'visionzap': did you mean 'visionzip'"),
        ("visionzip(kep=0.25)", "no option 'kep': did you mean 'keep'"),
        ("visionzip(0.25)", "options by name"),
        ("visionzip(keep=__import__('os'))", "plain values"),
        ("visionzip(keep=", "cannot read the plan"),
        ("visionzip + fastv", "cannot read"),
        ("fastv(layer=2) >> visionzip(keep=0.5)", "encoder >> input >> layer"),
        ("tome >> tome", "one encoder stage"),
        ("plan(visionzip, positions='none')", "choose 'keep', 'reindex'"),
        ("", "cannot read the plan"),
        ("divprune(keep=150%)", "keep=1.5: a ratio must lie in"),
        ("divprune(keep=%)", "cannot read the plan"),
        ("divprune(keep=5 % 3)", "cannot read the plan"),
    ],
)
def test_bad_plans(plan: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("+", r"\+")):
        mm.as_pipeline(plan)


@pytest.mark.parametrize("plan", ["fastv(layer=3) >> fastv(layer=3)", "fastv(layer=0.5) >> fastv(layer=4)"])
def test_cuts_come_in_ascending_order(plan: str) -> None:
    with pytest.raises(ValueError, match="ascending order"):
        mm.as_pipeline(plan).cuts(10)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.5, 0, -3, True, "0.5", None, float("nan"), float("inf")])
def test_bad_keep(keep: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="keep="):
        mm.VisionZip(keep=keep)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mm.FastV(layer=0), "layer=0"),
        (lambda: mm.FastV(query="first"), "query='first'"),
        (lambda: mm.VisionZip(merge="max"), "merge='max'"),
        (lambda: mm.VisionZip(contextual=1.0), "contextual=1.0"),
        (lambda: mm.VisionZip(contextual=-1), "contextual=-1"),
        (lambda: mm.ToMe(keep=0.5, r=3), "give one of them"),
        (lambda: mm.Pipeline(()), "at least one stage"),
        (lambda: mm.as_pipeline(mm.FastV(), keep=0.3), "into the stage or inside"),
        (lambda: mm.as_pipeline("fastv >> fastv(layer=3)", keep=0.3), "into the stage or inside"),
        (lambda: mm.as_pipeline(3), "plan=3"),
    ],
)
def test_bad_options(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


# ---------------------------------------------------------------------- arithmetic
def test_flops_and_kv_of_published_models() -> None:
    """Totals of LLaVA-1.5-7B at 576, 192 and 64 visual tokens, and of Qwen2.5-7B (grouped queries)."""
    vicuna = Shape(4096, 11008, 32, 32, 32, 128)
    assert [round(prefill_flops(vicuna, [n] * 32) / 1e12, 3) for n in (576, 192, 64)] == [7.634, 2.506, 0.831]
    assert prefill_flops(vicuna, [64] * 32) == 831076171776
    assert kv_bytes(vicuna, [576] * 32) == 288 * 2**20
    qwen = Shape(3584, 18944, 28, 28, 4, 128)
    assert prefill_flops(qwen, [64] * 28) == 836881088512
