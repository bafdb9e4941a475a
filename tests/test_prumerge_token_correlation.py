# SPDX-License-Identifier: Apache-2.0
"""PruMerge, TokenCorrelation and the operations they share: properties, and naive twins from the cards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm
from mmcompress.methods import prumerge as prumerge_module
from mmcompress.methods.prumerge import PruMerge
from mmcompress.methods.token_correlation import TokenCorrelation
from mmcompress.ops.correlation import absorb, first_of, similar_count
from mmcompress.ops.outliers import iqr_threshold
from mmcompress.ops.shares import split_budget
from mmcompress.stage import InputStage
from mmcompress.visuals import Layout, View

from .watch import NoWaiting

PRUMERGE: list[Callable[[int], InputStage]] = [
    PruMerge,
    lambda k: PruMerge(k, plus=True),
    lambda k: PruMerge(k, plus=True, neighbours=3, order="raster"),
    lambda k: PruMerge(k, neighbours=0),
]
CORRELATION: list[Callable[[int], InputStage]] = [
    TokenCorrelation,
    lambda k: TokenCorrelation(k, tau=0.3, window=3),
    lambda k: TokenCorrelation(k, tau=-1, alpha=0, aggregate=False),
    lambda k: TokenCorrelation(k, sampling="gumbel", seed=3, whole_thumbnail=True),
]
STAGES = [*PRUMERGE, *CORRELATION]
LAYOUTS = {
    "one": Layout.raster(1, 4, 6),
    "frames": Layout.raster(3, 2, 4),
    "tiles": Layout((View((3, 3), role="thumbnail"), View((3, 5), role="tiles", seams=((1.7,), (2.0, 4.1))))),
    "tiles first": Layout((View((2, 3), role="tile"), View((2, 3), role="tile"), View((4, 3), role="thumbnail"))),
}
ATTENTION = ("cls_joint_attention@-1", "cls_attention@0.21", "cls_attention")
PER_TOKEN = (*ATTENTION, "joint_keys@-1", "joint_keys@0.21", "encoder_features")


def road(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :1]], -1)


def some_visuals(layout: Layout, k: int, seed: int = 0, u: int = 2, kind: str = "random") -> mm.Visuals:
    g = torch.Generator().manual_seed(seed)
    n = layout.cells
    attention = {name: torch.rand(u, n, generator=g) ** 4 / n for name in ATTENTION}
    vectors = {name: torch.randn(u, n, 5, generator=g) for name in PER_TOKEN[3:]}
    signals = {**attention, **vectors}
    if kind == "equal":
        signals = {name: torch.ones_like(x) / n for name, x in signals.items()}
    if kind == "zero":
        signals = {name: torch.zeros_like(x) for name, x in signals.items()}
    if kind == "peak":
        signals |= {name: F.one_hot(torch.tensor([n // 2] * u), n).float() for name in ATTENTION}
    return mm.Visuals(torch.randn(u, n, 6, generator=g), layout, k, signals, road=road)


def part_of(visuals: mm.Visuals, rows: slice, cells: Tensor | slice, layout: Layout, k: int) -> mm.Visuals:
    signals = {name: x[rows][:, cells] for name, x in visuals.signals.items()}
    return mm.Visuals(visuals.features[rows][:, cells], layout, k, signals, road=road)


# ---------------------------------------------------------------------- both of them
@pytest.mark.parametrize("stage", STAGES)
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_exact_budget_and_no_slot_twice(stage: Callable[[int], InputStage], data: st.DataObject) -> None:
    named = st.sampled_from([*LAYOUTS.values()])
    layout = data.draw(st.one_of(named, st.integers(1, 40).map(lambda n: Layout.raster(1, 1, n))))
    k = data.draw(st.integers(1, layout.cells))
    kind = data.draw(st.sampled_from(["random", "equal", "zero", "peak"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    visuals = some_visuals(layout, k, seed=k, kind=kind)
    signals = {name: x.to(dtype) for name, x in visuals.signals.items()}
    visuals = mm.Visuals(visuals.features.to(dtype), layout, k, signals, road=road)
    made = stage(k)
    selection = made.select(visuals)
    assert selection.keep.shape == (2, k) and selection.keep.dtype == torch.int64
    for row in selection.keep.tolist():
        assert len(set(row)) == k and min(row) >= 0 and max(row) < layout.cells
        if made.name == "token_correlation":
            assert row == sorted(row)
    out = visuals.take(selection).features
    assert out.shape == (2, k, 6) and out.dtype == dtype and out.isfinite().all()
    if selection.assign is not None:
        assert selection.assign.min() >= -1 and selection.assign.max() < k
        assert torch.equal(selection.assign.gather(1, selection.keep), torch.arange(k).expand(2, -1))
    alone = [made.select(part_of(visuals, slice(i, i + 1), slice(None), layout, k)).keep for i in range(2)]
    assert torch.equal(torch.cat(alone), selection.keep)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_synchronisation(stage: Callable[[int], InputStage], name: str) -> None:
    layout = LAYOUTS[name]
    visuals = some_visuals(layout, layout.cells // 2)
    made = stage(visuals.k)
    with NoWaiting():
        made.select(visuals)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_reach_all_that_is_merged(stage: Callable[[int], InputStage]) -> None:
    visuals = some_visuals(LAYOUTS["one"], 10)
    source = visuals.features if not made_rows(stage) else visuals["encoder_features"]
    source.requires_grad_()
    selection = stage(10).select(visuals)
    visuals.take(selection).features.sum().backward()
    assert source.grad is not None
    assert torch.equal(source.grad.abs().sum(-1) > 0, selection.assignment(24) >= 0)


def made_rows(stage: Callable[[int], InputStage]) -> bool:
    return "encoder_features" in stage(1).needs


@pytest.mark.parametrize("stage", STAGES)
def test_after_another_stage_the_visual_is_one_crop(stage: Callable[[int], InputStage]) -> None:
    visuals = some_visuals(LAYOUTS["tiles"], 15)
    thinned = visuals.take(mm.Selection.of(torch.arange(2, 17).expand(2, -1)))
    thinned = mm.Visuals(thinned.features, thinned.layout, 6, thinned.signals, thinned.slots, road)
    plain = part_of(visuals, slice(None), slice(2, 17), Layout.raster(1, 3, 5), 6)
    assert torch.equal(stage(6).select(thinned).keep, stage(6).select(plain).keep)


@pytest.mark.parametrize("stage", STAGES)
def test_without_cls_the_received_attention_counts(stage: Callable[[int], InputStage]) -> None:
    visuals = some_visuals(LAYOUTS["one"], 9)
    names = {"cls_joint_attention@-1": "received_attention"} if stage in PRUMERGE else {}
    for name in ATTENTION[1:] if not names else ():
        names[name] = name.replace("cls", "received")
    signals = {names.get(name, name): x for name, x in visuals.signals.items() if name in names or "cls" not in name}
    other = mm.Visuals(visuals.features, visuals.layout, 9, signals, road=road)
    assert torch.equal(stage(9).select(other).keep, stage(9).select(visuals).keep)


@pytest.mark.parametrize(
    "text",
    [
        "prumerge(keep=0.125)",
        "prumerge(keep=64, plus=True, order='raster')",
        "token_correlation(keep=0.67)",
        "token_correlation(keep=0.5, low=5, deep=-1, aggregate=False, window=None)",
    ],
)
def test_plan_strings(text: str) -> None:
    assert repr(mm.as_pipeline(text)) == text
    assert mm.as_pipeline(text).position_policy() == "reindex"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prumerge", {"plus": "yes"}),
        ("prumerge", {"neighbours": -1}),
        ("prumerge", {"neighbours": 3.5}),
        ("prumerge", {"order": "random"}),
        ("token_correlation", {"tau": 1.5}),
        ("token_correlation", {"alpha": -0.1}),
        ("token_correlation", {"outlier": -1}),
        ("token_correlation", {"low": None}),
        ("token_correlation", {"low": 1.5}),
        ("token_correlation", {"deep": True}),
        ("token_correlation", {"sampling": "multi"}),
        ("token_correlation", {"window": 0}),
    ],
)
def test_bad_options_say_what_is_allowed(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        mm.as_pipeline(method, **options)


# ---------------------------------------------------------------------- operations
@given(st.integers(1, 60), st.integers(0, 10**6), st.floats(0, 4))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_iqr_threshold(n: int, seed: int, factor: float) -> None:
    x = torch.rand(3, n, generator=torch.Generator().manual_seed(seed)) ** 4
    low, high = np.percentile(x.double().numpy(), [25, 75], axis=1)
    found = iqr_threshold(x, factor)
    assert torch.allclose(found[:, 0], torch.from_numpy(high + factor * (high - low)).float(), atol=1e-6)
    assert ((x > found).sum(1) <= -(-(n - 1) // 4)).all()
    assert not (torch.ones(1, n) > iqr_threshold(torch.ones(1, n), factor)).any()


@given(st.integers(1, 30), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60, derandomize=True)
def test_absorb_and_similar_count(n: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    keys, kept = torch.randn(2, n, 3, generator=g), torch.rand(2, n, generator=g) < 0.4
    count, (target, weight) = similar_count(keys, 0.5), absorb(keys, kept)
    unit = F.normalize(keys.double(), dim=-1)
    for b in range(2):
        mine = torch.zeros(n, dtype=torch.float64)
        own = [j for j in range(n) if kept[b, j]]
        for i in range(n):
            cosine = [float(unit[b, i] @ unit[b, j]) for j in range(n)]
            assert count[b, i] == sum(c > 0.5 for j, c in enumerate(cosine) if j != i)
            if own:
                goal = i if kept[b, i] else max(own, key=lambda j: (cosine[j], -j))
                assert target[b, i] == goal
                mine[i] = 1 if kept[b, i] else max(0, cosine[goal])
        total = torch.zeros(n, dtype=torch.float64).scatter_add(0, target[b], mine).clamp_min(1)
        assert torch.allclose(weight[b].double(), mine / total[target[b]], atol=1e-6)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    visuals = some_visuals(LAYOUTS["one"], 10, seed=4)
    stage = PruMerge(10, plus=True, neighbours=4)
    expected = stage.select(visuals)
    monkeypatch.setattr(prumerge_module, "_ELEMENTS", 2 * 24 * 2)
    found = stage.select(visuals)
    assert torch.equal(found.keep, expected.keep) and found.rows is not None and expected.rows is not None
    assert torch.allclose(found.rows, expected.rows, atol=1e-6)
    assert found.assign is not None and expected.assign is not None and torch.equal(found.assign, expected.assign)


# ---------------------------------------------------------------------- PruMerge
def naive_prumerge(w: Tensor, x: Tensor, keys: Tensor, centres: list[int], neighbours: int) -> Tensor:
    unit = F.normalize(keys.double(), dim=-1)
    n, rows = len(w), []
    for i in centres:
        near = sorted((j for j in range(n) if j != i), key=lambda j: (-float(unit[i] @ unit[j]), j))[:neighbours]
        rows.append(x[i].double() + sum((w[j].double() * x[j].double() for j in near), torch.zeros(x.shape[1])))
    rest = [w[j].double() * x[j].double() for j in range(n) if j not in centres]
    return torch.stack([*rows, sum(rest, torch.zeros(x.shape[1], dtype=torch.float64))]).float()


def naive_centres(w: Tensor, b: int, plus: bool) -> list[int]:
    by_w = sorted(range(len(w)), key=lambda i: (-float(w[i]), i))
    if not plus:
        return by_w[:b]
    low, high = np.percentile(w.numpy(), [25, 75])
    outliers = [i for i in by_w if w[i] > high + 1.5 * (high - low)]
    if len(outliers) >= b:
        return outliers[:b]
    rest = sorted(set(range(len(w))) - set(outliers))
    more = b - len(outliers)
    return outliers + [rest[int((i + 0.5) * len(rest) / more)] for i in range(more)]


@given(st.integers(1, 45), st.integers(0, 10**6), st.booleans(), st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_prumerge_equals_its_naive_twin(n: int, seed: int, plus: bool, data: st.DataObject) -> None:
    k, neighbours = data.draw(st.integers(1, n)), data.draw(st.sampled_from([0, 1, 5, 32]))
    visuals = some_visuals(Layout.raster(1, 1, n), k, seed)
    selection = PruMerge(k, plus, neighbours).select(visuals)
    assert selection.rows is not None
    for i in range(2):
        w, x = visuals["cls_joint_attention@-1"][i], visuals["encoder_features"][i]
        centres = naive_centres(w, k - 1, plus)
        assert selection.keep[i, :-1].tolist() == centres
        rest = [j for j in range(n) if j not in centres]
        assert selection.keep[i, -1] == max(rest, key=lambda j: (w[j], -j))
        expected = naive_prumerge(w, x, visuals["joint_keys@-1"][i], centres, neighbours)
        assert torch.allclose(selection.rows[i, :, :5], expected, atol=1e-5)


@pytest.mark.parametrize("stage", PRUMERGE)
def test_prumerge_crops_are_merged_one_by_one(stage: Callable[[int], InputStage]) -> None:
    for layout in LAYOUTS.values():
        k = 11
        visuals = some_visuals(layout, k, seed=3)
        both = stage(k).select(visuals)
        crop = torch.cat([i * 100 + view.tiles() for i, view in enumerate(layout.views)])
        cells = [(crop == c).nonzero()[:, 0] for c in crop.unique()]
        slots, rows = [], []
        for own, quota in zip(cells, split_budget(k, [len(c) for c in cells]), strict=True):
            if quota:
                one = stage(quota).select(part_of(visuals, slice(None), own, Layout.raster(1, 1, len(own)), quota))
                assert one.rows is not None
                slots.append(own[one.keep])
                rows.append(one.rows)
        assert both.rows is not None
        assert torch.equal(both.keep, torch.cat(slots, 1)) and torch.allclose(both.rows, torch.cat(rows, 1), atol=1e-6)


def test_prumerge_in_raster_order_has_the_same_tokens() -> None:
    visuals = some_visuals(LAYOUTS["one"], 9, seed=2)
    plain, sorted_ = (PruMerge(9, plus=True, order=order).select(visuals) for order in ("attention", "raster"))
    assert plain.rows is not None and sorted_.rows is not None
    order = plain.keep[:, :-1].argsort(1)
    assert torch.equal(plain.keep[:, :-1].gather(1, order), sorted_.keep[:, :-1])
    assert torch.allclose(mm.selection.gather(plain.rows, order), sorted_.rows[:, :-1], atol=1e-6)
    assert torch.equal(plain.keep[:, -1], sorted_.keep[:, -1])


def test_prumerge_scales_received_attention_to_sum_one() -> None:
    visuals = some_visuals(LAYOUTS["frames"], 3, seed=2)
    signals = {**visuals.signals, "received_attention": 7 * visuals["cls_joint_attention@-1"]}
    del signals["cls_joint_attention@-1"]
    rows = PruMerge(3).select(mm.Visuals(visuals.features, visuals.layout, 3, signals, road=road)).rows
    for i in range(3):  # one token for each frame: the mean by w
        cells = slice(8 * i, 8 * i + 8)
        w, x = signals["received_attention"][:, cells], signals["encoder_features"][:, cells]
        mean = (w[..., None] * x).sum(1) / w.sum(1)[:, None]
        assert rows is not None and torch.allclose(rows[:, i, :5], mean, atol=1e-5)


def test_prumerge_adaptive_centres() -> None:
    w = torch.full((1, 24), 0.01)
    w[0, [5, 20, 8]] = torch.tensor([0.3, 0.2, 0.1])
    assert PruMerge().adaptive(w).tolist() == [[5, 20, 8]]
    # one centre for 8 patches, so every second place, the last patch left out
    assert PruMerge(plus=True).adaptive(w).tolist() == [[5, 20, 8, 0, 2, 4, 6, 10, 12, 14, 16, 18, 22]]
    assert PruMerge(plus=True, order="raster").adaptive(w).tolist() == [sorted([0, 2, 4, 5, 6, 8, *range(10, 24, 2)])]
    assert PruMerge(plus=True).adaptive(w, 0.125).tolist() == [[5, 20, 8, 4, 12, 20]]
    # no outliers: one centre at least, where the reference divides by zero
    assert PruMerge().adaptive(torch.ones(1, 24)).tolist() == [[0]]
    assert PruMerge(plus=True).adaptive(torch.ones(1, 24)).tolist() == [[0, 8, 16]]
    assert PruMerge(plus=True).adaptive(torch.ones(1, 1)).tolist() == [[0]]
    # 196 * (16 / 196) is less than 16
    w = torch.full((1, 196), 0.001)
    w[0, :16] = torch.arange(16, 0, -1) / 10
    assert [PruMerge().adaptive(w, compat=c).shape[1] for c in (None, "reference")] == [16, 15]


def test_prumerge_plus_at_the_adaptive_number_keeps_the_outliers() -> None:
    w = some_visuals(Layout.raster(1, 1, 64), 1, seed=5)["cls_joint_attention@-1"] ** 2
    stage = PruMerge(plus=True)
    for row in w.split(1):
        chosen, count = stage.adaptive(row), PruMerge().adaptive(row).shape[1]
        assert torch.equal(stage.centres(row, chosen.shape[1])[:, :count], chosen[:, :count])


# ---------------------------------------------------------------------- TokenCorrelation
@given(st.integers(1, 40), st.integers(0, 10**6), st.booleans(), st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_token_correlation_equals_its_naive_twin(n: int, seed: int, aggregate: bool, data: st.DataObject) -> None:
    k, tau = data.draw(st.integers(1, n)), data.draw(st.sampled_from([-1.0, 0.3, 0.8]))
    visuals = some_visuals(Layout.raster(1, 1, n), k, seed)
    stage = TokenCorrelation(k, tau=tau, window=None, aggregate=aggregate)
    selection = stage.select(visuals)
    for i in range(2):
        low, deep = visuals["cls_attention@0.21"][i], visuals["cls_attention"][i]
        quarter, third = np.percentile(deep.numpy(), [25, 75])
        stands_out = {j for j in range(n) if deep[j] > third + 1.5 * (third - quarter)}
        order = sorted(range(n), key=lambda j: (j not in stands_out, -deep[j] if j in stands_out else -low[j], j))
        assert selection.keep[i].tolist() == sorted(order[:k])
    if aggregate:
        kept = torch.zeros(2, n, dtype=torch.bool).scatter(1, selection.keep, True)
        target, weight = absorb(visuals["joint_keys@0.21"], kept)
        x = visuals["encoder_features"]
        dense = torch.zeros_like(x).scatter_add(1, target[..., None].expand_as(x), weight[..., None] * x)
        assert selection.rows is not None
        assert torch.allclose(selection.rows[..., :5], mm.selection.gather(dense, selection.keep), atol=1e-6)


@pytest.mark.parametrize("sampling", ["top", "gumbel"])
@pytest.mark.parametrize("tau", [0.2, 0.6, 0.9])
def test_a_budget_of_the_adaptive_number_keeps_the_adaptive_choice(sampling: str, tau: float) -> None:
    for seed in range(10):
        visuals = some_visuals(Layout.raster(1, 5, 8), 1, seed, u=1)
        stage = TokenCorrelation(tau=tau, sampling=sampling, seed=seed)
        names = ("encoder_features", "joint_keys@0.21", "cls_attention@0.21", "cls_attention")
        kept, tokens = stage.adaptive(*(visuals[name] for name in names))
        k = int(kept.sum())
        selection = stage.select(part_of(visuals, slice(None), slice(None), visuals.layout, k))
        assert torch.equal(selection.keep[0], kept[0].nonzero()[:, 0])
        assert selection.rows is not None and torch.allclose(selection.rows[0, :, :5], tokens[kept], atol=1e-6)


def test_crops_share_the_budget_by_what_is_not_redundant() -> None:
    visuals = some_visuals(Layout.raster(2, 4, 4), 12, seed=1)
    keys = visuals["joint_keys@0.21"]
    keys[:, :12] = keys[:, :1]  # of the first frame 4 of 16 are unlike the others
    keys[:, 12:] = torch.randn(2, 20, 5) + 10 * F.one_hot(torch.arange(20) % 5, 5)
    keys = torch.cat([keys, 50 * torch.eye(32).expand(2, -1, -1) * (torch.arange(32) >= 12)], -1)
    signals = {**visuals.signals, "joint_keys@0.21": keys}
    visuals = mm.Visuals(visuals.features, visuals.layout, 10, signals, road=road)
    kept = TokenCorrelation(10, tau=0.9).select(visuals).keep
    assert ((kept < 16).sum(1) == 2).all()  # worth 4 and 16


def test_a_whole_thumbnail_comes_first() -> None:
    for k in (5, 9, 14, 23):
        visuals = some_visuals(LAYOUTS["tiles"], k, seed=k)
        kept = TokenCorrelation(k, whole_thumbnail=True).select(visuals).keep
        assert ((kept < 9).sum(1) == min(9, k)).all()


def test_large_grids_are_cut_into_windows() -> None:
    stage = TokenCorrelation(window=16)
    for grid, windows in (((32, 32), (1, 1)), ((33, 8), (2, 1)), ((64, 40), (4, 2)), ((1, 100), (1, 6))):
        seams = stage._cut(View(grid)).seams
        assert tuple(len(s) + 1 for s in seams) == windows
    tiles = View((48, 48), role="tiles", seams=((24,), (24,)))
    assert stage._cut(tiles) is tiles
    assert TokenCorrelation(window=None)._cut(View((64, 64))) == View((64, 64))


def test_the_lot_follows_attention() -> None:
    """How often a patch is drawn first is its probability."""
    attention = torch.tensor([[0.6, 0.3, 0.1, 0.0]])
    first = [int(TokenCorrelation(1, sampling="gumbel", seed=seed)._drawn(attention).argmax()) for seed in range(2000)]
    share = torch.bincount(torch.tensor(first), minlength=4) / 2000
    assert torch.allclose(share, attention[0], atol=0.04) and share[3] == 0


def test_first_of() -> None:
    order = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert first_of(order, torch.tensor([[1], [2]])).tolist() == [[False, False, True], [False, True, True]]
