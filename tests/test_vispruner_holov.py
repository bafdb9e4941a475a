# SPDX-License-Identifier: Apache-2.0
"""VisPruner, FasterVLM, HoloV and the operations they share: properties, and naive twins from the cards."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm
from mmcompress.methods import holov as holov_module
from mmcompress.methods.fastervlm import FasterVLM
from mmcompress.methods.holov import HoloV, local_variety
from mmcompress.methods.vispruner import VisPruner
from mmcompress.ops.crops import alike_crops
from mmcompress.ops.shares import _on_device, split_budget, worth_shares
from mmcompress.stage import InputStage
from mmcompress.visuals import Layout, View

from .watch import NoWaiting

STAGES: list[Callable[[int], InputStage]] = [
    FasterVLM,
    VisPruner,
    lambda k: VisPruner(k, important=0.0, step=3),
    lambda k: VisPruner(k, important=1.0),
    HoloV,
    lambda k: HoloV(k, strips=3, variety=0),
    lambda k: HoloV(k, strips=7, compat="reference"),
]
LAYOUTS = {
    "one": Layout.raster(1, 4, 6),
    "frames": Layout.raster(3, 2, 4),
    "tiles": Layout((View((3, 3), role="thumbnail"), View((3, 5), role="tiles", seams=((1.7,), (2.0, 4.1))))),
    "tiles first": Layout((View((2, 3), role="tile"), View((2, 3), role="tile"), View((4, 3), role="thumbnail"))),
}


def some_visuals(layout: Layout, k: int, seed: int = 0, u: int = 2, kind: str = "random") -> mm.Visuals:
    g = torch.Generator().manual_seed(seed)
    n = layout.cells
    features, encoder = torch.randn(u, n, 6, generator=g), torch.randn(u, n, 5, generator=g)
    attention = torch.rand(u, n, generator=g) ** 4
    if kind == "equal":
        features, encoder, attention = torch.ones(u, n, 6), torch.ones(u, n, 5), torch.ones(u, n) / n
    if kind == "zero":
        features, encoder, attention = torch.zeros(u, n, 6), torch.zeros(u, n, 5), torch.zeros(u, n)
    if kind == "peak":
        attention = torch.zeros(u, n).index_fill(1, torch.tensor([n // 2]), 1.0)
    return mm.Visuals(features, layout, k, {"cls_attention": attention, "encoder_features": encoder})


# ---------------------------------------------------------------------- all of them
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
    visuals = mm.Visuals(visuals.features.to(dtype), layout, k, signals)
    made = stage(k)
    selection = made.select(visuals)
    assert selection.keep.shape == (2, k) and selection.keep.dtype == torch.int64
    for row in selection.keep.tolist():
        assert len(set(row)) == k and min(row) >= 0 and max(row) < layout.cells
        if selection.assign is None:
            assert row == sorted(row)
    out = visuals.take(selection).features
    assert out.dtype == dtype and out.isfinite().all()
    alone = [
        made.select(mm.Visuals(visuals.features[i : i + 1], layout, k, {n: s[i : i + 1] for n, s in signals.items()}))
        for i in range(2)
    ]
    assert torch.equal(torch.cat([a.keep for a in alone]), selection.keep)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_synchronisation(stage: Callable[[int], InputStage], name: str) -> None:
    layout = LAYOUTS[name]
    visuals = some_visuals(layout, layout.cells // 2)
    made = stage(visuals.k)
    with NoWaiting():
        made.select(visuals)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_reach_kept_tokens_only(stage: Callable[[int], InputStage]) -> None:
    visuals = some_visuals(LAYOUTS["one"], 10)
    features = visuals.features.requires_grad_()
    selection = stage(10).select(visuals)
    visuals.take(selection).features.sum().backward()
    assert features.grad is not None
    real = selection.assignment(24).ge(0)
    assert torch.equal(features.grad, real[..., None].float().expand_as(features))


@pytest.mark.parametrize("stage", STAGES)
def test_after_another_stage_the_visual_is_one_crop(stage: Callable[[int], InputStage]) -> None:
    visuals = some_visuals(LAYOUTS["tiles"], 15)
    thinned = visuals.take(mm.Selection.of(torch.arange(2, 17).expand(2, -1)))
    thinned = mm.Visuals(thinned.features, thinned.layout, 6, thinned.signals, thinned.slots)
    plain = mm.Visuals(thinned.features, Layout.raster(1, 1, 15), 6, thinned.signals)
    assert torch.equal(stage(6).select(thinned).keep, stage(6).select(plain).keep)


@pytest.mark.parametrize("stage", STAGES)
def test_crops_are_chosen_one_by_one(stage: Callable[[int], InputStage]) -> None:
    for layout in LAYOUTS.values():
        k = 11
        visuals = some_visuals(layout, k, seed=3)
        kept = stage(k).select(visuals).keep
        crop = torch.cat([i * 100 + view.tiles() for i, view in enumerate(layout.views)])
        cells = [(crop == c).nonzero()[:, 0] for c in crop.unique()]
        parts = []
        for own, quota in zip(cells, split_budget(k, [len(c) for c in cells]), strict=True):
            if quota:
                signals = {n: s[:, own] for n, s in visuals.signals.items()}
                one = mm.Visuals(visuals.features[:, own], Layout.raster(1, 1, len(own)), quota, signals)
                parts.append(own[stage(quota).select(one).keep])
        expected = torch.cat(parts, 1)
        reference = getattr(stage(k), "compat", None) is not None
        assert torch.equal(kept, expected if reference else expected.sort(1).values)


def test_without_cls_the_received_attention_counts() -> None:
    for stage in STAGES:
        visuals = some_visuals(LAYOUTS["one"], 9)
        signals = {**visuals.signals, "received_attention": visuals.signals["cls_attention"]}
        del signals["cls_attention"]
        other = mm.Visuals(visuals.features, visuals.layout, 9, signals)
        assert torch.equal(stage(9).select(other).keep, stage(9).select(visuals).keep)


@pytest.mark.parametrize(
    "text",
    [
        "fastervlm(keep=0.25)",
        "vispruner(keep=64, important=0.75)",
        "vispruner(keep=0.25, step=16)",
        "holov(keep=0.5, strips=16, variety=0, compat='reference')",
    ],
)
def test_plan_strings(text: str) -> None:
    assert repr(mm.as_pipeline(text)) == text
    assert mm.as_pipeline(text).position_policy() == "reindex"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("vispruner", {"important": 1.5}),
        ("vispruner", {"important": -0.1}),
        ("vispruner", {"step": 0}),
        ("vispruner", {"step": 8.0}),
        ("holov", {"strips": 0}),
        ("holov", {"strips": 2.5}),
        ("holov", {"variety": -1}),
        ("holov", {"compat": "paper"}),
    ],
)
def test_bad_options_say_what_is_allowed(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        mm.as_pipeline(method, **options)


# ---------------------------------------------------------------------- VisPruner and FasterVLM
def naive_vispruner(score: Tensor, features: Tensor, k: int, ratio: float, step: int) -> list[int]:
    n = len(score)
    order = sorted(range(n), key=lambda i: (-score[i].item(), i))
    important = int(k * ratio)
    rest = order[important:]
    unit = F.normalize(features.double(), dim=-1)
    while len(rest) > k - important:
        a, b = rest[0::2], rest[1::2]
        m = min(step, len(rest) - (k - important), len(a))
        closest = {i: max(((unit[i] @ unit[j]).item() for j in b), default=0.0) for i in a}
        rest = sorted(a, key=lambda i: -closest[i])[m:] + b
    return sorted(order[:important] + rest)


@given(st.integers(1, 45), st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_vispruner_equals_its_naive_twin(n: int, data: st.DataObject) -> None:
    k, step = data.draw(st.integers(1, n)), data.draw(st.sampled_from([1, 3, 8]))
    ratio = data.draw(st.sampled_from([0.0, 0.3, 0.5, 0.75, 1.0]))
    visuals = some_visuals(Layout.raster(1, 1, n), k, seed=n)
    kept = VisPruner(k, ratio, step).select(visuals).keep
    for row, score, features in zip(kept, visuals["cls_attention"], visuals["encoder_features"], strict=True):
        assert row.tolist() == naive_vispruner(score, features, k, ratio, step)


def test_vispruner_with_all_important_is_fastervlm() -> None:
    for layout in LAYOUTS.values():
        visuals = some_visuals(layout, 9, seed=1)
        assert torch.equal(VisPruner(9, important=1.0).select(visuals).keep, FasterVLM(9).select(visuals).keep)


def test_vispruner_deletes_a_duplicate() -> None:
    encoder = torch.eye(8)[None].clone()
    encoder[0, 5] = encoder[0, 2]
    attention = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])  # 2 and 5 stand at places 1 and 4 of the rest
    visuals = mm.Visuals(encoder, Layout.raster(1, 2, 4), 7, {"cls_attention": attention, "encoder_features": encoder})
    assert VisPruner(7, important=0.15).select(visuals).keep.tolist() == [[0, 1, 2, 3, 4, 6, 7]]


# ---------------------------------------------------------------------- HoloV
def naive_shares(worth: list[float], room: list[int], k: int) -> list[int]:
    """Give by worth, cap, give what is left over to the others; round down, then one by one to the largest worth."""
    share = [0.0] * len(worth)
    free = list(range(len(worth)))
    while free:
        left = k - sum(room[i] for i in range(len(room)) if i not in free)
        total = sum(worth[i] for i in free)
        full = [i for i in free if left * worth[i] / total >= room[i]]
        for i in free:
            share[i] = left * worth[i] / total
        for i in full:
            share[i] = room[i]
        if not full:
            break
        free = [i for i in free if i not in full]
    parts = [math.floor(s) for s in share]
    for i in sorted((i for i in range(len(parts)) if parts[i] < room[i]), key=lambda i: -worth[i])[: k - sum(parts)]:
        parts[i] += 1
    return parts


@given(st.integers(1, 20), st.integers(0, 10**6), st.floats(0.1, 6), st.data())
@settings(deadline=None, max_examples=300, derandomize=True)
def test_worth_shares(parts: int, seed: int, power: float, data: st.DataObject) -> None:
    g = torch.Generator().manual_seed(seed)
    worth = torch.rand(3, parts, generator=g, dtype=torch.float64).pow(power).float()
    room = torch.randint(0, 9, (parts,), generator=g)
    k = data.draw(st.integers(0, int(room.sum())))
    found = worth_shares(worth, room, k)
    assert torch.equal(found, _on_device(worth, room.expand(3, -1), torch.full((3, 1), k)))
    assert (found.sum(1) == k).all() and (found >= 0).all() and (found <= room).all()
    for row, weights in zip(found.tolist(), worth.double().tolist(), strict=True):
        if min(weights) > 1e-6:
            assert row == naive_shares(weights, room.tolist(), k)
    for odd in (torch.zeros(2, parts), torch.ones(2, parts), torch.full((2, parts), 1e-38), worth[:2] * 1e30):
        found = worth_shares(odd, room, k)
        assert torch.equal(found, _on_device(odd, room.expand(2, -1), k))
        assert (found.sum(1) == k).all() and (found >= 0).all() and (found <= room).all()


def test_worth_shares_by_hand() -> None:
    room = torch.tensor([3, 3, 3])
    assert worth_shares(torch.tensor([[10.0, 2, 1]]), room, 6).tolist() == [[3, 2, 1]]
    assert worth_shares(torch.tensor([[10.0, 0, 0]]), room, 6).tolist() == [[3, 2, 1]]
    assert worth_shares(torch.tensor([[1.0, 1, 1]]), room, 4).tolist() == [[2, 1, 1]]
    assert worth_shares(torch.tensor([[1.0, 5, 4]]), room, 2).tolist() == [[0, 2, 0]]


def naive_holov(score: Tensor, x: Tensor, k: int, strips: int, variety: float, compat: bool) -> list[int]:
    """Slots in output order, -1 for a zero vector."""
    n = len(score)
    runs = [c.tolist() for c in torch.arange(n).tensor_split(min(strips, n))]
    a = 1000 * score.double()
    unit = x.double() / (x.double().norm(dim=-1, keepdim=True) + 1e-6)
    v = torch.zeros(n, dtype=torch.float64)
    for run in runs:
        for i in run:
            other = [float(unit[i] @ unit[j]) for j in run if j != i]
            if other:
                mean = sum(other) / len(other)
                v[i] = (sum((s - mean) ** 2 for s in other) + (mean**2 if compat else 0)) / len(other)
    if compat:
        scaled = torch.cat([v[r] * a[r].mean() / (v[r].mean() + 1e-6) for r in runs])
        worth = [float((a[r] + variety * scaled[r]).mean()) if len(r) > 1 else float(score[r[0]]) for r in runs]
    else:
        scaled = v * a.mean() / (v.mean() + 1e-6)
        worth = [float((a[r] + variety * scaled[r]).mean()) for r in runs]
    kept = []
    if compat:
        weight = [w / (sum(worth) + 1e-6) for w in worth]
        share = [math.floor(w * k) for w in weight]
        for i in sorted(range(len(runs)), key=lambda i: -weight[i])[: k - sum(share)]:
            share[i] += 1
    else:
        share = naive_shares(worth, [len(r) for r in runs], k)
    for run, m in zip(runs, share, strict=True):
        by_score = sorted(run, key=lambda i: -float(score[i]))
        kept += run if m >= len(run) else by_score[:m]
    return (kept + [-1] * k)[:k] if compat else sorted(kept)


@given(st.integers(1, 60), st.integers(0, 10**6), st.data())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_holov_equals_its_naive_twin(n: int, seed: int, data: st.DataObject) -> None:
    k, strips = data.draw(st.integers(1, n)), data.draw(st.sampled_from([None, 1, 2, 3, 7, 16]))
    compat, variety = data.draw(st.sampled_from([None, "reference"])), data.draw(st.sampled_from([0.0, 0.09, 1.0]))
    visuals = some_visuals(Layout.raster(1, 1, n), k, seed)
    selection = HoloV(k, strips, variety, compat).select(visuals)
    for i in range(2):
        expected = naive_holov(
            visuals["cls_attention"][i],
            visuals.features[i],
            k,
            strips or max(1, int(1024 / 576 * n / k)),
            variety,
            compat is not None,
        )
        keep = selection.keep[i]
        real = selection.assignment(n)[i, keep] >= 0
        assert keep.masked_fill(~real, -1).tolist() == expected


def test_holov_has_the_strips_of_the_paper() -> None:
    assert [max(1, 16 * 576 // (9 * k)) for k in (64, 128, 192)] == [16, 8, 5]


def test_holov_hands_on_what_a_full_strip_cannot_take() -> None:
    attention = torch.full((1, 12), 0.001)
    attention[0, 4:8] = torch.tensor([0.4, 0.1, 0.3, 0.2])
    visuals = mm.Visuals(torch.randn(1, 12, 4), Layout.raster(1, 3, 4), 6, {"cls_attention": attention})
    assert HoloV(6, strips=3, variety=0).select(visuals).keep.tolist() == [[0, 4, 5, 6, 7, 8]]
    padded = HoloV(6, strips=3, variety=0, compat="reference").select(visuals)
    assert padded.keep.tolist() == [[4, 5, 6, 7, 0, 1]]
    assert padded.assign is not None and padded.assign.tolist() == [[-1, -1, -1, -1, 0, 1, 2, 3, -1, -1, -1, -1]]
    out = padded.apply(visuals.features)
    assert torch.equal(out[:, :4], visuals.features[:, 4:8]) and not out[:, 4:].any()


def test_holov_variety_moves_the_budget() -> None:
    g = torch.Generator().manual_seed(0)
    features = torch.cat([torch.ones(1, 8, 6), torch.randn(1, 8, 6, generator=g)], 1)
    visuals = mm.Visuals(features, Layout.raster(1, 2, 8), 8, {"cls_attention": torch.full((1, 16), 1 / 16)})
    by_variety = [(HoloV(8, 2, v).select(visuals).keep >= 8).sum().item() for v in (0.0, 0.2, 1.0)]
    assert by_variety[0] == 4 and by_variety[2] > by_variety[1] > 4


def test_holov_variety_cancels_in_the_reference() -> None:
    visuals = some_visuals(Layout.raster(1, 6, 8), 20, seed=5)
    expected = HoloV(20, 6, 0, "reference").select(visuals).keep
    assert torch.equal(HoloV(20, 6, 1.0, "reference").select(visuals).keep, expected)


def test_local_variety_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 11, 5)
    for itself in (False, True):
        expected = local_variety(x, itself)
        with monkeypatch.context() as patch:
            patch.setattr(holov_module, "_ELEMENTS", 2 * 3 * 11 * 4)
            assert torch.allclose(local_variety(x, itself), expected, atol=1e-6)
    unit = F.normalize(x.double(), dim=-1)
    for i in range(11):
        others = [j for j in range(11) if j != i]
        variance = (unit[:, :, i : i + 1] @ unit[:, :, others].transpose(2, 3))[:, :, 0].var(-1, correction=0)
        assert torch.allclose(local_variety(x, False)[:, :, i].double(), variance, atol=1e-5)


# ---------------------------------------------------------------------- crops
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(sum), st.data())
def test_split_budget(sizes: list[int], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, sum(sizes)))
    parts = split_budget(k, sizes)
    assert sum(parts) == k
    for part, size in zip(parts, sizes, strict=True):
        assert 0 <= part <= size and abs(part - k * size / sum(sizes)) < 1


@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_crops_agree_with_the_tiles_of_a_view(rows: int, columns: int, data: st.DataObject) -> None:
    edges = [sorted(data.draw(st.lists(st.floats(0.1, n), max_size=3))) for n in (rows, columns)]
    view = View((rows, columns), role="tiles", seams=(tuple(edges[0]), tuple(edges[1])))
    layout = Layout((View((2, 2), role="thumbnail"), view))
    crops = alike_crops(layout.views, layout.cells, layout.cells, torch.device("cpu"))
    cells = [row for crop in crops for row in crop.cells]
    assert sorted(torch.cat(cells).tolist()) == list(range(layout.cells))
    assert cells[0].tolist() == [0, 1, 2, 3]
    numbers = [view.tiles()[own - 4].unique().tolist() for own in cells[1:]]
    assert all(len(number) == 1 for number in numbers)
    assert sorted(numbers) == numbers and len({n[0] for n in numbers}) == len(numbers)


def test_frames_are_one_batch_or_two() -> None:
    views = Layout.raster(10, 3, 3).views
    crops = alike_crops(views, 90, 24, torch.device("cpu"))
    assert [(len(c.cells), c.k) for c in crops] == [(4, 3), (6, 2)]
    assert [(len(c.cells), c.k) for c in alike_crops(views, 90, 3, torch.device("cpu"))] == [(3, 1)]
