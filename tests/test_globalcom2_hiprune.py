# SPDX-License-Identifier: Apache-2.0
"""GlobalCom2 and HiPrune: properties, naive twins from the cards, and the road through models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcompress.adapters.layouts import AnyRes, tiled
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.globalcom2 import LOGITS, GlobalCom2, global_scores, has_thumbnail, tiling
from mmcompress.methods.hiprune import HiPrune
from mmcompress.ops.crops import alike_crops
from mmcompress.ops.shares import split_budget
from mmcompress.stage import InputStage
from mmcompress.visuals import Layout, View

from .families import FAMILIES, VIDEO_FAMILIES, build, image, prompts, video
from .watch import NoWaiting

MIDDLE, DEEP = "received_attention@0.35", "received_attention"
STAGES: list[Callable[[int], InputStage]] = [
    GlobalCom2,
    lambda k: GlobalCom2(k, score="cosine", tau=0.5, alpha=0.3),
    lambda k: GlobalCom2(k, score="cls", alpha=1.0),
    HiPrune,
    lambda k: HiPrune(k, alpha=1.0, clamp="reference"),
    lambda k: HiPrune(k, alpha=0.6),
]
NEXT = AnyRes((20, 50), ((56, 56),), 28, 7).layout()
LAYOUTS = {
    "one": Layout.raster(1, 4, 6),
    "cell": Layout.raster(1, 1, 1),
    "frames": Layout.raster(3, 2, 4),
    "next": Layout(NEXT.views),
    "tiles": Layout((View((3, 3), role="thumbnail"), View((3, 5), role="tiles", seams=((1.7,), (2.0, 4.1))))),
    "uneven": Layout((View((5, 7), role="thumbnail"), View((6, 6), role="tiles", seams=((3.0,), (2.0, 4.0))))),
    "empty tiles": Layout((View((3, 2), role="thumbnail"), View((4, 4), role="tiles", seams=((0.0, 4.0), (1.0,))))),
    "more tiles than cells": Layout((View((1, 1), role="thumbnail"), View((2, 3), role="tiles", seams=((1,), (1, 2))))),
    "internvl": tiled(2, 3, 2),
    "shapes": Layout((View((3, 4), role="tile"), View((4, 3), role="tile"), View((2, 3), role="thumbnail"))),
}


def some_visuals(layout: Layout, k: int, seed: int = 0, u: int = 2, kind: str = "random") -> mm.Visuals:
    g = torch.Generator().manual_seed(seed)
    n = layout.cells
    features, encoder = torch.randn(u, n, 6, generator=g), torch.randn(u, n, 5, generator=g)
    logits, middle, deep = 3 * torch.randn(u, n, generator=g), *(torch.rand(2, u, n, generator=g) ** 4)
    if kind == "equal":
        features, encoder, logits, middle, deep = (
            torch.ones_like(x) for x in (features, encoder, logits, middle, deep)
        )
    if kind == "zero":
        features, encoder, logits, middle, deep = (0 * x for x in (features, encoder, logits, middle, deep))
    if kind == "large":
        logits = 1000 * logits
    return mm.Visuals(features, layout, k, {LOGITS: logits, "encoder_features": encoder, MIDDLE: middle, DEEP: deep})


# ---------------------------------------------------------------------- both
@pytest.mark.parametrize("stage", STAGES)
@given(st.data())
@settings(deadline=None, max_examples=50, derandomize=True)
def test_exact_budget_and_no_slot_twice(stage: Callable[[int], InputStage], data: st.DataObject) -> None:
    named = st.sampled_from([*LAYOUTS.values()])
    layout = data.draw(st.one_of(named, st.integers(1, 40).map(lambda n: Layout.raster(1, 1, n))))
    k = data.draw(st.integers(1, layout.cells))
    kind = data.draw(st.sampled_from(["random", "equal", "zero", "large"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    visuals = some_visuals(layout, k, seed=k, kind=kind)
    signals = {name: x.to(dtype) for name, x in visuals.signals.items()}
    visuals = mm.Visuals(visuals.features.to(dtype), layout, k, signals)
    made = stage(k)
    selection = made.select(visuals)
    assert selection.keep.shape == (2, k) and selection.keep.dtype == torch.int64
    for row in selection.keep.tolist():
        assert row == sorted(set(row)) and len(row) == k and min(row) >= 0 and max(row) < layout.cells
    assert selection.scores is not None and selection.scores.shape == (2, layout.cells)
    assert visuals.take(selection).features.dtype == dtype
    alone = [
        made.select(mm.Visuals(visuals.features[i : i + 1], layout, k, {n: s[i : i + 1] for n, s in signals.items()}))
        for i in range(2)
    ]
    assert torch.equal(torch.cat([a.keep for a in alone]), selection.keep)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_synchronisation(stage: Callable[[int], InputStage], name: str) -> None:
    layout = LAYOUTS[name]
    visuals = some_visuals(layout, max(1, layout.cells // 2))
    made = stage(visuals.k)
    with NoWaiting():
        made.select(visuals)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_reach_kept_tokens_only(stage: Callable[[int], InputStage]) -> None:
    visuals = some_visuals(LAYOUTS["next"], 10)
    features = visuals.features.requires_grad_()
    selection = stage(10).select(visuals)
    visuals.take(selection).features.sum().backward()
    assert features.grad is not None
    real = selection.assignment(visuals.n).ge(0)
    assert torch.equal(features.grad, real[..., None].float().expand_as(features))


@pytest.mark.parametrize("stage", STAGES)
def test_equal_scores_keep_lower_slots(stage: Callable[[int], InputStage]) -> None:
    visuals = some_visuals(Layout.raster(1, 1, 30), 3, kind="equal")
    assert stage(3).select(visuals).keep.tolist() in ([[0, 1, 2]] * 2, [[0, 1, 29]] * 2)


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ("globalcom2(keep=0.25)", ((LOGITS, "encoder_features"),)),
        ("globalcom2(keep=64, score='cls', tau=5.0)", (LOGITS,)),
        ("globalcom2(keep=0.1, score='cosine', alpha=0.3)", ("encoder_features",)),
        ("hiprune(keep=0.25)", (MIDDLE, DEEP)),
        ("hiprune(keep=192, object_layer=8, clamp='reference')", ("received_attention@8", DEEP)),
        ("hiprune(keep=0.5, object_layer=1e-05)", ("received_attention@0.0", DEEP)),
    ],
)
def test_plan_strings(text: str, needs: tuple) -> None:
    plan = mm.as_pipeline(text)
    assert repr(plan) == text and plan.position_policy() == "reindex"
    assert plan.stages[0].needs == needs


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GlobalCom2(score="received"), "choose 'cls', 'cosine' or None"),
        (lambda: GlobalCom2(tau=0), "temperature > 0"),
        (lambda: GlobalCom2(alpha=1.5), "in \\[0, 1\\]"),
        (lambda: HiPrune(alpha=-0.1), "in \\[0, 1\\]"),
        (lambda: HiPrune(object_layer=1.0), "in \\[0, 1\\)"),
        (lambda: HiPrune(object_layer=True), "object_layer=True"),
        (lambda: HiPrune(clamp="wrap"), "'drop' or 'reference'"),
    ],
)
def test_wrong_options(make: Callable[[], InputStage], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


# ---------------------------------------------------------------------- globalcom2
def naive_counts(s0: Tensor, rows: int, columns: int, sizes: list[int], ratio: float, tau: float) -> list[int]:
    """How many of its `sizes` tokens each tile keeps at a ratio, as the paper rounds."""
    height, width = s0.shape
    down, across = max(height // rows, 1), max(width // columns, 1)
    sums = []
    for r in range(rows):
        for c in range(columns):
            y1 = height if r == rows - 1 else (r + 1) * down
            x1 = width if c == columns - 1 else (c + 1) * across
            cells = [
                float(s0[y, x]) for y in range(r * down, min(y1, height)) for x in range(c * across, min(x1, width))
            ]
            sums.append(math.fsum(cells))
    powers = [math.exp((s - max(sums)) / tau) for s in sums]
    part = [p / (sum(powers) + 1e-8) for p in powers]
    mean = sum(part) / len(part)
    return [int(n * min(1.0, ratio * (1 + p - mean))) for n, p in zip(sizes, part, strict=True)]


@given(st.integers(0, 10**6), st.floats(0.02, 0.99), st.sampled_from([0.01, 0.3, 3.0, 300.0]), st.data())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_globalcom2_keeps_what_the_paper_rounds_down_to(
    seed: int, ratio: float, strength: float, data: st.DataObject
) -> None:
    named = ["next", "tiles", "uneven", "empty tiles", "more tiles than cells", "internvl"]
    layout = LAYOUTS[data.draw(st.sampled_from(named))]
    rows, columns, _ = tiling(layout.views)
    number = torch.cat(
        [
            torch.full((v.cells,), {"thumbnail": 0, "tile": 1 + i}.get(v.role, 1)) + v.tiles()
            for i, v in enumerate(layout.views)
        ]
    )
    score = strength * torch.randn(1, layout.cells, generator=torch.Generator().manual_seed(seed))
    thumbnail = next(v for v in layout.views if v.role == "thumbnail")
    s0 = score[0][number == 0].view(thumbnail.grid)
    sizes = [int((number == 1 + j).sum()) for j in range(rows * columns)]
    counts = [int(thumbnail.cells * ratio), *naive_counts(s0, rows, columns, sizes, ratio, 10.0)]
    k = sum(counts)
    if not k:
        return
    kept = GlobalCom2(k).select(mm.Visuals(torch.zeros(1, layout.cells, 1), layout, k, {LOGITS: score})).keep[0]
    assert torch.bincount(number[kept], minlength=len(counts)).tolist() == counts
    guide = global_scores(layout.views, score)[0]
    for part, count in enumerate(counts):
        own = (number == part).nonzero()[:, 0]
        mixed = F.normalize(score[0, own], dim=0) + F.normalize(guide[own], dim=0)
        best = own[mixed.argsort(descending=True, stable=True)[:count]]
        assert sorted(best.tolist()) == kept[number[kept] == part].tolist()


def test_tiles_laid_together_and_one_by_one_keep_the_same() -> None:
    rows, columns, side = 2, 3, 4
    seams = ((4.0,), (4.0, 8.0))
    together = Layout((View((side, side), role="thumbnail"), View((8, 12), role="tiles", seams=seams)))
    apart = tiled(rows, columns, side)
    assert has_thumbnail(together.views) and has_thumbnail(apart.views)
    assert tiling(together.views) == (2, 3, [0, 1, 2, 3, 4, 5, 6]) and tiling(apart.views) == (
        2,
        3,
        [1, 2, 3, 4, 5, 6, 0],
    )
    merged = torch.arange(96).view(rows, side, columns, side).permute(0, 2, 1, 3).flatten() + side * side
    order = torch.cat([merged, torch.arange(side * side)])  # slot together of each slot apart
    score = 4 * torch.randn(3, 112, generator=torch.Generator().manual_seed(1))
    assert torch.equal(global_scores(apart.views, score[:, order]), global_scores(together.views, score)[:, order])
    for k in (1, 13, 40, 111, 112):
        one = GlobalCom2(k).select(mm.Visuals(torch.zeros(3, 112, 1), together, k, {LOGITS: score}))
        other = GlobalCom2(k).select(mm.Visuals(torch.zeros(3, 112, 1), apart, k, {LOGITS: score[:, order]}))
        assert torch.equal(order[other.keep].sort(1).values, one.keep)


def test_globalcom2_without_a_thumbnail_is_top_k() -> None:
    layouts = [LAYOUTS["one"], LAYOUTS["frames"], Layout((View((3, 3), role="thumbnail"),))]
    layouts.append(Layout((View((2, 2), role="tile"), View((2, 2), role="tile"))))
    for layout in layouts:
        visuals = some_visuals(layout, 3)
        assert not has_thumbnail(layout.views)
        assert torch.equal(GlobalCom2(3).select(visuals).keep, mm.Selection.top(visuals[LOGITS], 3).keep)


def test_globalcom2_without_cls_asks_how_untypical_a_token_is() -> None:
    visuals = some_visuals(LAYOUTS["frames"], 5)
    x = visuals["encoder_features"].unflatten(1, (3, 8))
    expected = -F.cosine_similarity(x, x.mean(2, keepdim=True).expand_as(x), dim=-1).flatten(1)
    without = replace(visuals, signals={"encoder_features": visuals["encoder_features"]})
    for selection in (GlobalCom2(5, score="cosine").select(visuals), GlobalCom2(5).select(without)):
        assert selection.scores is not None and torch.allclose(selection.scores, expected, atol=1e-6)
        assert torch.equal(selection.keep, mm.Selection.top(expected, 5).keep)
    with pytest.raises(ValueError, match="cls_logits@-1"):
        GlobalCom2(5, score="cls").select(without)


def test_globalcom2_after_another_stage_is_top_k() -> None:
    visuals = some_visuals(LAYOUTS["next"], 20)
    thinned = replace(visuals.take(mm.Selection.of(torch.arange(2, 22).expand(2, -1))), k=7)
    assert torch.equal(GlobalCom2(7).select(thinned).keep, mm.Selection.top(thinned[LOGITS], 7).keep)


# ---------------------------------------------------------------------- hiprune
def naive_hiprune(m: Tensor, g: Tensor, width: int, k: int, alpha: float, clamp: str) -> list[int]:
    n = len(m)
    anchors = sorted(range(n), key=lambda i: -float(m[i]))[: round(k * alpha / 5)]
    near: list[int] = []
    for a in anchors:
        if clamp == "reference":
            near += [min(max(b, 0), n - 1) for b in (a - 1, a + 1, a - width, a + width)]
        else:
            near += [a - 1] * (a % width > 0) + [a + 1] * (a % width < width - 1)
            near += [b for b in (a - width, a + width) if 0 <= b < n]
    by_g = sorted(range(n), key=lambda i: -float(g[i]))
    order = [*anchors, *(i for i in by_g if i in near), *by_g]
    return sorted(list(dict.fromkeys(order))[:k])


@given(st.integers(1, 7), st.integers(1, 9), st.integers(0, 10**6), st.data())
@settings(deadline=None, max_examples=150, derandomize=True)
def test_hiprune_equals_its_naive_twin(rows: int, columns: int, seed: int, data: st.DataObject) -> None:
    k, alpha = data.draw(st.integers(1, rows * columns)), data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
    clamp = data.draw(st.sampled_from(["drop", "reference"]))
    visuals = some_visuals(Layout.raster(1, rows, columns), k, seed)
    kept = HiPrune(k, alpha, clamp=clamp).select(visuals).keep
    for i in range(2):
        expected = naive_hiprune(visuals[MIDDLE][i], visuals[DEEP][i], columns, k, alpha, clamp)
        assert kept[i].tolist() == expected


@pytest.mark.parametrize("clamp", ["drop", "reference"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_hiprune_prunes_every_crop_alone(name: str, clamp: str) -> None:
    layout = LAYOUTS[name]
    for k in (1, layout.cells // 2, layout.cells):
        if not k:
            continue
        visuals = some_visuals(layout, k, seed=k)
        expected: list[list[int]] = [[], []]
        for whole in alike_crops(layout.views, layout.cells, layout.cells, torch.device("cpu")):
            for own in whole.cells:
                view = int(layout.view_of()[own[0]])
                start, columns = sum(v.cells for v in layout.views[:view]), layout.views[view].grid[1]
                width = int(((own - start) // columns == (own[0] - start) // columns).sum())
                quotas = split_budget(k, [len(c) for c in crops_of(layout)])
                quota = next(q for q, c in zip(quotas, crops_of(layout), strict=True) if c[0] == int(own[0]))
                for i in range(2):
                    m, g = visuals[MIDDLE][i, own], visuals[DEEP][i, own]
                    expected[i] += [int(own[j]) for j in naive_hiprune(m, g, width, quota, 1.0, clamp) if quota]
        kept = HiPrune(k, 1.0, clamp=clamp).select(visuals).keep
        assert kept.tolist() == [sorted(row) for row in expected]


def crops_of(layout: Layout) -> list[list[int]]:
    whole = alike_crops(layout.views, layout.cells, layout.cells, torch.device("cpu"))
    return [own.tolist() for part in whole for own in part.cells]


def test_hiprune_at_the_edges_of_the_picture() -> None:
    middle, deep = torch.zeros(1, 36), torch.arange(36.0)[None] / 100
    middle[0, 12] = 1  # the third row begins
    visuals = mm.Visuals(torch.zeros(1, 36, 1), Layout.raster(1, 6, 6), 7, {MIDDLE: middle, DEEP: deep})
    assert HiPrune(7, 0.7).anchors(visuals).tolist() == [[12]]
    assert HiPrune(7, 0.7).select(visuals).keep.tolist() == [[6, 12, 13, 18, 33, 34, 35]]
    assert HiPrune(7, 0.7, clamp="reference").select(visuals).keep.tolist() == [[6, 11, 12, 13, 18, 34, 35]]


def test_hiprune_takes_neighbours_that_an_earlier_stage_has_left() -> None:
    visuals = some_visuals(Layout.raster(2, 3, 4), 20)
    middle = torch.zeros(2, 24).index_fill(1, torch.tensor([13]), 1.0)  # row 0, column 1 of the second frame
    deep = torch.linspace(0.9, 0.1, 24).expand(2, -1)
    visuals = replace(visuals, signals={MIDDLE: middle, DEEP: deep})
    left = torch.tensor([0, 1, 2, 3, 9, 12, 13, 17, 18, 20]).expand(2, -1)
    thinned = replace(visuals.take(mm.Selection.of(left)), k=4)
    kept = HiPrune(4, alpha=1.0).select(thinned).keep  # 12 is left of 13, 17 below; 14 is gone, 9 in another frame
    assert left.gather(1, kept).tolist() == [[0, 12, 13, 17]] * 2
    again = thinned.take(mm.Selection.of(torch.tensor([[0, 5, 6, 7]] * 2)))
    kept = HiPrune(3, alpha=1.0).select(replace(again, k=3)).keep
    assert kept.tolist() == [[1, 2, 3]] * 2


def test_hiprune_default_is_the_ninth_of_24_blocks() -> None:
    assert round(HiPrune().object_layer * 24) == 8


# ---------------------------------------------------------------------- models
@torch.no_grad()
@pytest.mark.parametrize("plan", ["globalcom2(keep=0.4)", "hiprune(keep=0.4, alpha=0.5)"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, plan: str) -> None:
    model = build(family)
    parts = [image(family), image(family, True), *([video(family)] if family in VIDEO_FAMILIES else [])]
    with mm.compressed(model, plan):
        for part in parts:
            out = model(**prompts(model, family, [[4, part, 3], [2, part, 5]]))
            assert out.logits.isfinite().all()


@torch.no_grad()
def test_globalcom2_reads_the_last_block() -> None:
    """LLaVA-NeXT reads the output of the block before; the scores are those of the last one, in the layout of the tokens."""
    model, seen = build("llava_next"), []
    inputs = prompts(model, "llava_next", [[4, image("llava_next"), 3]])
    original = GlobalCom2.select

    class Spy(GlobalCom2):
        def select(self, visuals: mm.Visuals) -> mm.Selection:
            seen.append(visuals)
            return original(self, visuals)

    with mm.compressed(model, Spy(0.5)):
        model(**inputs)
    (visuals,) = seen
    layer, kept = model.model.vision_tower.encoder.layers[-1].self_attn, {}
    hooks = [
        getattr(layer, f"{name}_proj").register_forward_hook(lambda m, a, out, name=name: kept.update({name: out}))
        for name in "qk"
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    q, k = kept["q"], kept["k"]
    logits = (k[:, 1:] @ q[:, 0, :, None])[..., 0] / (4 * 8**0.5)
    assert has_thumbnail(visuals.layout.views)
    assert torch.allclose(visuals[LOGITS][0, :16], logits[0], atol=1e-5)
    cut = AnyRes((20, 50), ((28, 56), (56, 28), (56, 56)), 28, 7)
    assert torch.allclose(visuals[LOGITS][0], cut.pack(logits[..., None])[:, 0], atol=1e-5)
