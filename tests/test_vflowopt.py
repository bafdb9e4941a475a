# SPDX-License-Identifier: Apache-2.0
"""VFlowOpt: its signal, recycling and cuts against slow twins, exact budgets and averages, edges, and runs in every family."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.vflowopt import VFlowOpt
from mmcompress.methods.vflowopt_cuts import VFlowOptCuts, last_ratio
from mmcompress.methods.vflowopt_prune import VFlowOptPrune, importance
from mmcompress.ops.entropy import patch_entropy
from mmcompress.ops.marginals import hub_attention, hubs
from mmcompress.ops.recycle import grid_cells, recycle
from mmcompress.visuals import Layout, View

from .families import FAMILIES, VIDEO_FAMILIES, build, image, prompts, video
from .tiny import GREEDY
from .watch import NoWaiting

LAYOUTS = {
    "one": Layout.raster(1, 5, 6),
    "tiles": Layout((View((3, 3), role="thumbnail"), View((4, 5), role="tiles", seams=((1.7,), (2.0, 4.1))))),
    "one cell": Layout.raster(1, 1, 1),
    "no tiles left": Layout((View((3, 3), role="thumbnail"), View((0, 4), role="tiles"))),
    "two frames": Layout.raster(2, 3, 4),
}


def some_visuals(stage: VFlowOptPrune, layout: Layout, k: int, seed: int = 0, kind: str = "random") -> mm.Visuals:
    g = torch.Generator().manual_seed(seed)
    n = layout.cells
    score, x = torch.rand(2, n, generator=g) ** 3 / n, torch.randn(2, n, 6, generator=g)
    if kind == "equal":
        score, x = torch.ones_like(score), torch.ones_like(x)
    if kind == "zero":
        score, x = torch.zeros_like(score), torch.zeros_like(x)
    return mm.Visuals(x, layout, k, {str(stage.needs[0]): score})


# ---------------------------------------------------------------------- the signal
@given(st.integers(1, 20), st.integers(0, 1), st.integers(0, 10**6), st.sampled_from([0.0, 0.9, 1.2, 2.0, 99.0]))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_hub_attention_equals_its_slow_twin(n: int, prefix: int, seed: int, t: float) -> None:
    g = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(2, 3, n + prefix, 4, generator=g) for _ in "qk")
    whole = (q @ k.transpose(2, 3) * 0.4).softmax(-1).mean(1)[:, prefix:, prefix:].double()
    for a, row in zip(whole, hub_attention(q, k, 0.4, t, prefix), strict=True):
        received = a.mean(0)
        if ((received / received.mean() - t).abs() < 1e-5).any():
            continue  # decided by rounding
        chosen = [i for i in range(n) if received[i] > t * received.mean()] or list(range(n))
        assert torch.allclose(row.double(), a[chosen].mean(0), atol=1e-6)


def test_hubs() -> None:
    received = torch.tensor([[0.1, 0.5, 0.1, 0.1], [0.2, 0.2, 0.2, 0.2], [0.0, 0.0, 0.0, 0.0]])
    assert hubs(received, 2.0).tolist() == [[False, True, False, False], [True] * 4, [True] * 4]


@mm.register("hub_spy")
@dataclass(frozen=True, repr=False)
class HubSpy(mm.InputStage):
    """Keeps what it is shown, for the tests."""

    keep: float | int = 0.5
    needs: ClassVar[tuple] = ("hub_attention:1.05", "hub_attention:1000.0@-1", "received_attention@-1")
    seen: ClassVar[dict[str, mm.Visuals]] = {}

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        self.seen["visuals"] = visuals
        return mm.Selection.top(visuals["received_attention@-1"], visuals.k)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_signal_takes_the_road_of_the_others(family: str) -> None:
    model = build(family)
    with mm.compressed(model, "hub_spy"):
        model(**prompts(model, family, [[4, image(family), 3]]))
    seen = HubSpy.seen["visuals"]
    hub, every, received = (seen[name] for name in HubSpy.needs)
    assert hub.shape == every.shape == received.shape and hub.isfinite().all() and (hub > 0).all()
    if family in ("llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"):  # all tokens are patches
        assert torch.allclose(every, received, atol=1e-6)
        assert not torch.allclose(hub, every, atol=1e-6)


def test_not_behind_proportional_attention() -> None:
    model = build("llava")
    mm.compress(model, "tome(keep=0.5, proportional=True) >> vflowopt_prune(keep=0.5)")
    with pytest.raises(NotImplementedError, match="hub_attention behind an encoder stage"):
        model(**prompts(model, "llava", [[4, image("llava"), 3]]))


# ---------------------------------------------------------------------- entropy
def test_entropy_equals_a_histogram() -> None:
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2, 3, 8, 12), generator=g, dtype=torch.uint8)
    pixels[0, :, :4, :4] = 77
    found = patch_entropy(pixels, 4)
    assert found.shape == (2, 2, 3) and found[0, 0, 0] == 0
    for n in range(2):
        for r in range(2):
            for c in range(3):
                part = pixels[n, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].double().numpy()
                counts = np.bincount(np.rint(0.3333 * part.sum(0)).astype(int).ravel(), minlength=256)
                p = counts[counts > 0] / 16
                assert abs(found[n, r, c].item() + (p * np.log2(p)).sum()) < 1e-5
    with pytest.raises(ValueError, match="patch=5"):
        patch_entropy(pixels, 5)
    given = torch.rand(2, 6)
    assert torch.equal(importance(given, found.flatten(1), 0.0), given)
    more = importance(given, found.flatten(1), -0.5)
    assert torch.allclose(more, given - 0.5 * found.flatten(1).softmax(1))


# ---------------------------------------------------------------------- recycling
def taken(score: list[float], cell: list[int], count: int) -> list[int]:
    """The `count` least important tokens."""
    return sorted(range(len(score)), key=lambda i: (score[i], -i))[:count]


def folded_away(score: list[float], cell: list[int], low: list[int]) -> tuple[list[int], dict[int, list[int]]]:
    """What is left when the tokens `low` are folded, and who is in each token that stands for a cell."""
    members: dict[int, list[int]] = {}
    for i in low:
        members.setdefault(cell[i], []).append(i)
    spoken = {max(own, key=lambda i: (score[i], -i)): own for own in members.values()}
    return sorted({*range(len(score))} - {*low} | {*spoken}), spoken


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 4)), min_size=1, max_size=25), st.data())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_recycling_equals_its_slow_twin(tokens: list[tuple[int, int]], data: st.DataObject) -> None:
    """Also with ties: scores are small whole numbers."""
    score, cell = [float(s) for s, _ in tokens], [c for _, c in tokens]
    n = len(tokens)
    k = data.draw(st.integers(1, n))
    keep, assign, folded = recycle(torch.tensor([score]), torch.tensor([cell]), 5, k)
    for count in range(n + 1):  # one token more at a time, until k are left
        low = taken(score, cell, count)
        left, spoken = folded_away(score, cell, low)
        if len(left) == k:
            break
    else:  # more cells than k
        left = sorted(sorted(left, key=lambda i: (-score[i], i))[:k])
    assert keep[0].tolist() == left
    assert {i for i in range(n) if folded[0, i]} == {*low}
    for j, slot in enumerate(left):
        assert [i for i in range(n) if assign[0, i] == j] == sorted(spoken.get(slot, [slot]))


@given(st.integers(2, 30), st.integers(0, 10**6), st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_the_counts_of_the_reference_give_the_same_tokens(n: int, seed: int, data: st.DataObject) -> None:
    """Whatever number it takes away: with as many left, so are the tokens."""
    g = torch.Generator().manual_seed(seed)
    score, cell = torch.rand(1, n, generator=g), torch.randint(0, 4, (1, n), generator=g)
    low = taken(score[0].tolist(), cell[0].tolist(), data.draw(st.integers(0, n)))
    left, _ = folded_away(score[0].tolist(), cell[0].tolist(), low)
    assert recycle(score, cell, 4, len(left))[0][0].tolist() == left


def test_cells_of_grids() -> None:
    cell, count = grid_cells([(3, 4), (2, 2)], 1.5)
    assert count == 7 and cell.tolist() == [0, 0, 1, 2, 0, 0, 1, 2, 3, 3, 4, 5, *[6] * 4]
    assert grid_cells([(2, 3)], 1)[0].tolist() == list(range(6))


@given(st.data())
@settings(deadline=None, max_examples=80, derandomize=True)
def test_exact_budget_and_merged_tokens(data: st.DataObject) -> None:
    layout = LAYOUTS[data.draw(st.sampled_from([*LAYOUTS]))]
    k = data.draw(st.integers(1, layout.cells))
    stage = VFlowOptPrune(k, cell=data.draw(st.sampled_from([1, 2.0, 2.5, 17.0])))
    kind = data.draw(st.sampled_from(["random", "equal", "zero"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    seen = some_visuals(stage, layout, k, k, kind)
    seen = replace(seen, features=seen.features.to(dtype), signals={n: s.to(dtype) for n, s in seen.signals.items()})
    chosen = stage.select(seen)
    score = seen[str(stage.needs[0])].float()
    assert chosen.scores is not None and torch.equal(chosen.scores, score)
    assert chosen.keep.shape == (2, k) and torch.equal(chosen.keep, chosen.keep.sort(dim=1).values)
    assert all(len(set(row)) == k for row in chosen.keep.tolist())
    out = seen.take(chosen).features
    assert out.shape == (2, k, 6) and out.dtype == dtype and out.isfinite().all()
    if layout.views[0].role == "frame":
        assert chosen.assign is None and torch.equal(chosen.keep, mm.Selection.top(score, k).keep)
        return
    assert chosen.assign is not None
    for u in range(2):
        for j, slot in enumerate(chosen.keep[u].tolist()):
            own = (chosen.assign[u] == j).nonzero()[:, 0]
            assert slot in own.tolist()
            w = score[u, own] if score[u, own].sum() > 0 else torch.ones(len(own))
            mean = (w[:, None] * seen.features[u, own].float()).sum(0) / w.sum()
            assert torch.allclose(out[u, j].float(), mean, atol={torch.float32: 1e-5}.get(dtype, 2e-2))
            if len(own) == 1:
                assert torch.equal(out[u, j], seen.features[u, slot])
        alone = replace(
            seen,
            features=seen.features[u : u + 1],
            signals={n: s[u : u + 1] for n, s in seen.signals.items()},
        )
        assert torch.equal(stage.select(alone).keep[0], chosen.keep[u])


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_waits(name: str) -> None:
    stage = VFlowOptPrune(0.5, cell=2.5)
    seen = some_visuals(stage, LAYOUTS[name], stage.budget(LAYOUTS[name].cells))
    with NoWaiting():
        stage.select(seen)


def test_gradients_reach_every_token() -> None:
    stage = VFlowOptPrune(8, cell=2.5)
    seen = some_visuals(stage, LAYOUTS["one"], 8)
    seen.features.requires_grad_()
    seen.take(stage.select(seen)).features.sum().backward()
    assert seen.features.grad is not None and (seen.features.grad.abs().sum(-1) > 0).all()


def test_after_another_stage_cells_are_those_of_the_picture() -> None:
    stage = VFlowOptPrune(4, cell=3)
    seen = some_visuals(stage, LAYOUTS["tiles"], 20)
    thinned = replace(seen.take(mm.Selection.of(torch.arange(0, 29, 2).expand(2, -1))), k=4)
    chosen = stage.select(thinned)
    cell = grid_cells([(3, 3), (4, 5)], 3)[0][::2]
    assert chosen.assign is not None
    for row in chosen.assign:
        for j in range(4):
            assert len(set(cell[row == j].tolist())) == 1


# ---------------------------------------------------------------------- cuts and presets
def test_places_of_the_cuts() -> None:
    assert VFlowOptCuts().cuts(28) == (9, 18) and VFlowOptCuts().cuts(32) == (10, 20)
    assert VFlowOptCuts(layers=(3, 5)).cuts(8) == (3, 5)


@given(st.integers(30, 3000), st.integers(6, 80), st.floats(0.02, 1.0))
@settings(deadline=None, max_examples=200, derandomize=True)
def test_the_average_over_layers_is_what_was_asked_for(n: int, depth: int, keep: float) -> None:
    prune, cuts = VFlowOpt(keep=keep).expand()
    assert isinstance(prune, VFlowOptPrune) and isinstance(cuts, VFlowOptCuts)
    first, second = cuts.cuts(depth)
    enter = prune.budget(n)
    middle, last = cuts.budgets(enter, depth)
    assert n >= enter >= middle >= last >= 1
    average = (first * enter + (second - first) * middle + (depth - second) * last) / depth
    assert abs(average - keep * n) <= 1 or last == 1


@pytest.mark.parametrize(
    ("keep", "r1", "r2", "r3", "t", "cell"),
    [
        (0.5, 0.7233, 0.7487, 0.487, 28.68, 11.76),
        (0.25, 0.2651, 0.9833, 0.8773, 34.76, 15.58),
        (0.1, 0.1166, 1.0, 0.6011, 39.26, 17.39),
    ],
)
def test_published_numbers(keep: float, r1: float, r2: float, r3: float, t: float, cell: float) -> None:
    assert VFlowOpt(keep=keep).settings() == {"r1": r1, "r2": r2, "t": t, "cell": cell}
    assert abs(last_ratio(keep, r1, r1 * r2, (9, 9, 10)) - r3) < 0.008
    prune, cuts = VFlowOpt(keep=keep).expand()
    assert isinstance(cuts, VFlowOptCuts) and isinstance(prune, VFlowOptPrune)
    enter = prune.budget(7290)
    middle, last = cuts.budgets(enter, 28)
    assert abs(last / middle - r3) < 0.008 and (enter, middle) == (round(r1 * 7290), round(r2 * round(r1 * 7290)))


def test_between_the_published_numbers() -> None:
    keeps = [0.03, 0.07, 0.1, 0.15, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 0.95, 1.0]
    found = [VFlowOpt(keep=keep).settings() for keep in keeps]
    r1 = [own["r1"] for own in found]
    assert r1 == sorted(r1) and r1[-1] == 1 and all(a <= b for a, b in zip(keeps, r1, strict=True))
    assert found[0]["t"] == found[2]["t"] and found[-1]["r2"] == 1
    own = VFlowOpt(keep=0.3, r2=0.8, cell=4).settings()
    assert own["r2"] == 0.8 and own["cell"] == 4 and own["t"] == VFlowOpt(keep=0.3).settings()["t"]
    for keep in keeps:
        space = VFlowOpt(keep=keep).search_space()
        inside = VFlowOpt(keep=keep).settings()
        assert all(low <= inside[name] <= high for name, (low, high) in space.items())
    assert VFlowOpt(keep=0.25).search_space()["r1"] == (0.25, 0.375)


@pytest.mark.parametrize(
    ("plan", "error", "message"),
    [
        ("vflowopt(keep=64)", TypeError, "keep=64: give a ratio"),
        ("vflowopt(keep=1.5)", ValueError, "keep=1.5"),
        ("vflowopt(r1=2.0)", ValueError, "a ratio"),
        ("vflowopt(keep=0.5, r1=0.4)", ValueError, "fewer tokens than their average"),
        ("vflowopt(alpha=0.3)", ValueError, "alpha=0.3.*normalised pixels"),
        ("vflowopt(t=-1)", ValueError, "t=-1"),
        ("vflowopt(cell=0.5)", ValueError, "cell=0.5"),
        ("vflowopt(cell='wide')", ValueError, "cell='wide'"),
        ("vflowopt(layers=3)", ValueError, "layers=3"),
        ("vflowopt(layers=(0.2, 0.4, 0.6))", ValueError, "the two places"),
        ("vflowopt(layers=(0, 4))", ValueError, "layers=0"),
        ("vflowopt_prune(keep=0.2, t='a')", ValueError, "t='a'"),
        ("vflowopt_cuts(r2=0.0)", ValueError, "a ratio"),
    ],
)
def test_bad_options(plan: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message.replace("(", r"\(")):
        mm.as_pipeline(plan)


def test_plans_that_a_model_cannot_run() -> None:
    model = build("llava")
    with pytest.raises(ValueError, match="of 4 layers, cut before layers 1 and 3, there are more"):
        mm.compress(model, "vflowopt(keep=0.3, r1=1.0, r2=1.0)")
    with pytest.raises(ValueError, match="ascending order"):
        mm.compress(model, "vflowopt(layers=(2, 2))")
    with pytest.raises(NotImplementedError, match="input_scores"):
        mm.compress(model, "vflowopt_cuts")
    mm.compress(model, "pool(keep=0.5) >> vflowopt_cuts")
    with pytest.raises(NotImplementedError, match="gives no scores"):
        model(**prompts(model, "llava", [[4, image("llava"), 3]]))


def test_plans_as_text_and_values(tmp_path: Path) -> None:
    plan = mm.as_pipeline("vflowopt(keep=0.5)")
    assert repr(plan) == "vflowopt(keep=0.5)"
    acting = " >> ".join(map(repr, plan.parts))
    assert acting.startswith("vflowopt_prune(keep=0.7233, t=28.68, cell=11.76) >> vflowopt_cuts(keep=0.69")
    assert mm.as_pipeline(acting).parts == plan.parts
    assert mm.as_pipeline(repr(plan)) == plan
    assert mm.as_pipeline(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.position_policy() == "reindex" and plan.layer_stages[0].positions == "keep"


# ---------------------------------------------------------------------- in a model
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(family: str) -> None:
    model = build(family, num_hidden_layers=8)
    parts: list[list[Any]] = [[5, image(family), 4], [3, image(family, True), 2, image(family), 6]]
    mm.compress(model, "vflowopt(keep=0.5, cell=2.5, t=1.05)")
    both = model.generate(**prompts(model, family, parts), **GREEDY)
    trace = mm.trace(model)
    for row in range(2):
        mine = [v for v in trace.visuals if v.row == row]
        full = sum(v.tokens for v in mine)
        gone = [trace.call.counts[row] - left for left in trace.tokens_per_layer(row)]
        assert len(set(gone)) == 3
        assert abs(full - sum(gone) / 8 - full / 2) <= len(mine)
    few = {**GREEDY, "max_new_tokens": 2}
    uncached = model.generate(**prompts(model, family, parts), **few, use_cache=False)
    assert torch.equal(uncached, both[:, : uncached.shape[1]])
    alone = model.generate(**prompts(model, family, parts[:1]), **GREEDY)
    assert torch.equal(alone[0, -6:], both[0, -6:])


@torch.no_grad()
def test_cuts_read_the_scores_of_the_last_stage_before_them() -> None:
    model = build("llava", num_hidden_layers=8)
    mm.compress(model, "uniform(keep=0.75) >> vflowopt_prune(keep=0.7, cell=3) >> vflowopt_cuts")
    model(**prompts(model, "llava", [[5, image("llava"), 4]]))
    (visual,) = mm.trace(model).visuals
    decision = visual.span.decisions[-1]
    assert decision.scores is not None
    by = dict(zip(decision.before.keep[0].tolist(), decision.scores[0].tolist(), strict=True))
    entered, left = visual.kept_cells(0).tolist(), visual.kept_cells(7).tolist()
    assert len(entered) == 8 and 0 < len(left) < 8
    assert left == sorted(sorted(entered, key=lambda cell: -by[cell])[: len(left)])


@torch.no_grad()
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_videos_keep_their_best_tokens(family: str) -> None:
    model = build(family, num_hidden_layers=8)
    mm.compress(model, "vflowopt(keep=0.5)")
    model.generate(**prompts(model, family, [[3, video(family), 4]]), **GREEDY)
    (visual,) = mm.trace(model).visuals
    assert visual.selection.assign is None and visual.kept == round(0.7233 * visual.tokens)


@torch.no_grad()
def test_decides_in_the_model_as_on_eager_attention() -> None:
    model = build("llava", attention="eager", num_hidden_layers=8)
    inputs = prompts(model, "llava", [[5, image("llava"), 4]])
    seen = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    weights = seen.attentions[-2].mean(1)[0, 1:, 1:]  # between patches
    received = weights.mean(0)
    asked = received > 1.1 * received.mean()
    assert 0 < asked.sum() < 16
    score = weights[asked].mean(0)
    features = model.model.multi_modal_projector(seen.hidden_states[-2][:, 1:])[0]
    low = taken(score.tolist(), [0] * 16, 16)
    cell = [(i // 4) // 3 * 2 + (i % 4) // 3 for i in range(16)]
    k = round(0.7 * 16)
    left, spoken = next(
        found
        for n in range(17)
        if len((found := folded_away(score.tolist(), cell, taken(score.tolist(), cell, n)))[0]) == k
    )
    model.set_attn_implementation("sdpa")
    mm.compress(model, "vflowopt(keep=0.5, r1=0.7, r2=0.8, t=1.1, cell=3)")
    entered: list[Tensor] = []
    first = model.model.language_model.layers[0]
    handle = first.register_forward_hook(lambda m, a, k, o: entered.append(a[0]), with_kwargs=True)
    model(**inputs)
    handle.remove()
    (visual,) = mm.trace(model).visuals
    assert visual.kept_cells(0).tolist() == left and len(low) == 16
    for j, slot in enumerate(left):
        own = spoken.get(slot, [slot])
        mean = (score[own, None] * features[own]).sum(0) / score[own].sum()
        assert torch.allclose(entered[0][0, 5 + j], mean, atol=1e-4)
    after = sorted(sorted(left, key=lambda i: -score[i].item())[: round(0.8 * k)])
    assert visual.kept_cells(3).tolist() == after and visual.kept_cells(2).tolist() == left
    third = round((8 * 8 - 3 * k - 2 * len(after)) / 3)
    assert visual.kept_cells(5).tolist() == sorted(sorted(left, key=lambda i: -score[i].item())[:third])
    assert visual.kept_cells(4).tolist() == after and 0 < third < len(after)
