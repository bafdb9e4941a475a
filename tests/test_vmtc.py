# SPDX-License-Identifier: Apache-2.0
"""VMTC and the k-means under it: against slow twins, exact budgets, edges, and runs in every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.vmtc import VMTC
from mmcompress.ops import kmeans
from mmcompress.ops.kmeans import cluster_means, cosine_kmeans
from mmcompress.ops.shares import split_budget
from mmcompress.visuals import Layout, View

from .families import FAMILIES, build, image, prompts
from .tiny import GREEDY
from .watch import NoWaiting

LAYOUTS = {
    "one": Layout.raster(1, 4, 6),
    "frames": Layout.raster(3, 2, 4),
    "tiles": Layout((View((3, 3), role="thumbnail"), View((3, 5), role="tiles", seams=((1.7,), (2.0, 4.1))))),
    "one cell": Layout.raster(1, 1, 1),
    "cells": Layout((View((1, 1)),) * 5),
}


def road(x: Tensor) -> Tensor:
    return torch.cat([2 * x, x[..., :1]], -1)


def some_visuals(layout: Layout, k: int, seed: int = 0, kind: str = "random", u: int = 2) -> mm.Visuals:
    g = torch.Generator().manual_seed(seed)
    n = layout.cells
    score, x = torch.rand(u, n, generator=g) ** 3 / n, torch.randn(u, n, 5, generator=g)
    if kind == "equal":
        score, x = torch.ones_like(score), torch.ones_like(x)
    if kind == "zero":
        score, x = torch.zeros_like(score), torch.zeros_like(x)
    if kind == "pairs":  # half of the clusters have nothing to be about
        x = x[:, torch.arange(n) % 2]
    return mm.Visuals(road(x), layout, k, {"cls_attention": score, "encoder_features": x}, road=road)


# ---------------------------------------------------------------------- k-means
def slow_kmeans(x: Tensor, seeds: list[int]) -> list[int]:
    """As the card has it: until nothing changes, at most ten rounds."""
    unit = F.normalize(x.double(), dim=-1)
    centres, labels = [unit[s] for s in seeds], [-1] * len(x)
    for _ in range(10):
        new = []
        for v in unit:
            likeness = [float(v @ c) for c in centres]
            best = max(likeness)
            others = [a for i, a in enumerate(likeness) if i != likeness.index(best)]
            assume(not others or best - max(others) > 1e-5)  # near ties are decided by rounding
            new.append(likeness.index(best))
        if new == labels:
            break
        labels = new
        for m in range(len(centres)):
            own = [v for v, label in zip(unit, labels, strict=True) if label == m]
            if own:
                centres[m] = F.normalize(torch.stack(own).sum(0), dim=0)
    return labels


@given(st.integers(1, 30), st.integers(0, 10**6), st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_kmeans_equals_its_slow_twin(n: int, seed: int, data: st.DataObject) -> None:
    seeds = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n, unique=True))
    x = torch.randn(1, n, 4, generator=torch.Generator().manual_seed(seed))
    assert cosine_kmeans(x, torch.tensor([seeds]))[0].tolist() == slow_kmeans(x[0], seeds)


def test_kmeans_rounds_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(3))
    seeds = torch.arange(0, 40, 8).expand(2, -1)
    whole, long = cosine_kmeans(x, seeds), cosine_kmeans(x, seeds, rounds=50)
    assert torch.equal(cosine_kmeans(x, seeds, rounds=51), long)  # at rest
    assert not torch.equal(cosine_kmeans(x, seeds, rounds=1), whole)
    means = cluster_means(x, torch.rand(2, 40), whole, 5)
    weight = torch.rand(2, 40, generator=torch.Generator().manual_seed(4))
    means = cluster_means(x, weight, whole, 6)
    for u in range(2):
        for m in range(5):
            own = whole[u] == m
            expected = (weight[u, own, None] * x[u, own]).sum(0) / weight[u, own].sum()
            assert torch.allclose(means[u, m], expected, atol=1e-5)
    assert (means[:, 5] == 0).all()
    monkeypatch.setattr(kmeans, "_ELEMENTS", 35)
    assert torch.equal(cosine_kmeans(x, seeds), whole)


def test_means_of_tiny_weights() -> None:
    x, label = torch.randn(1, 4, 3), torch.tensor([[0, 0, 1, 1]])
    for w in (torch.zeros(1, 4), torch.full((1, 4), 1e-30), torch.full((1, 4), 1e-20)):
        assert torch.allclose(cluster_means(x, w, label, 2), x.unflatten(1, (2, 2)).mean(2), atol=1e-6)


# ---------------------------------------------------------------------- the method
def slow_vmtc(score: Tensor, x: Tensor, kept: int, clusters: int) -> tuple[list[int], list[list[int]]]:
    """Kept patches and members of the clusters in output order, with one more patch kept per empty cluster."""
    order = sorted(range(len(score)), key=lambda i: (-float(score[i]), i))
    keep, rest = set(order[:kept]), order[kept:]
    seeds = [int((m + 0.5) * len(rest) / clusters) for m in range(clusters)]
    label = dict(zip(rest, slow_kmeans(x[rest], seeds), strict=True))
    missing = clusters - len(set(label.values()))
    lowest = {label[i]: i for i in rest}  # the last of each in order of score
    for i in rest:
        if missing and i not in lowest.values():
            keep.add(i)
            del label[i]
            missing -= 1
    members = [sorted(i for i in label if label[i] == m) for m in set(label.values())]
    return sorted(keep), sorted(members)


@given(st.integers(2, 30), st.integers(0, 10**6), st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_vmtc_equals_its_slow_twin(n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(2, n))
    clusters = data.draw(st.integers(1, k - 1))
    visuals = some_visuals(Layout.raster(1, 1, n), k, seed)
    chosen = VMTC(k, clusters).select(visuals)
    assert chosen.rows is not None and chosen.assign is not None
    for u in range(2):
        score, x = visuals["cls_attention"][u], visuals["encoder_features"][u]
        keep, members = slow_vmtc(score, x, k - clusters, clusters)
        assert chosen.keep[u, : len(keep)].tolist() == keep and len(keep) + len(members) == k
        assert torch.equal(chosen.rows[u, : len(keep)], visuals.features[u, keep])
        for j, own in enumerate(members, start=len(keep)):
            mean = (score[own, None] * x[own]).sum(0) / score[own].sum()
            assert torch.allclose(chosen.rows[u, j], road(mean), atol=1e-4)
            assert chosen.keep[u, j] == max(own, key=lambda i: (float(score[i]), -i))
            assert (chosen.assign[u, own] == j).all()


def test_more_patches_are_kept_for_empty_clusters() -> None:
    visuals = some_visuals(LAYOUTS["one"], 12, kind="pairs")
    plain = VMTC.partition(visuals["cls_attention"], visuals["encoder_features"], 6, 6)
    assert [len(set(row[row >= 0].tolist())) for row in plain] == [2, 2]
    chosen = VMTC(12, 6).select(visuals)
    best = visuals["cls_attention"].sort(dim=1, descending=True).indices
    for u in range(2):
        assert sorted(chosen.keep[u, :10].tolist()) == sorted(best[u, :10].tolist())
        assert chosen.assign is not None and (chosen.assign[u] >= 10).sum() == 14


@given(st.data())
@settings(deadline=None, max_examples=80, derandomize=True)
def test_exact_budget_and_no_slot_twice(data: st.DataObject) -> None:
    named = st.sampled_from([*LAYOUTS.values()])
    layout = data.draw(st.one_of(named, st.integers(1, 40).map(lambda n: Layout.raster(1, 1, n))))
    k = data.draw(st.integers(1, layout.cells))
    clusters = data.draw(st.sampled_from([0, 1, 3, 100, 0.0, 1 / 9, 0.5, 0.99]))
    kind = data.draw(st.sampled_from(["random", "equal", "zero", "pairs"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    visuals = some_visuals(layout, k, k, kind)
    signals = {name: x.to(dtype) for name, x in visuals.signals.items()}
    visuals = replace(visuals, features=visuals.features.to(dtype), signals=signals)
    chosen = VMTC(k, clusters).select(visuals)
    assert chosen.keep.shape == (2, k) and chosen.keep.dtype == torch.int64 and chosen.assign is not None
    for row in chosen.keep.tolist():
        assert len(set(row)) == k and min(row) >= 0 and max(row) < layout.cells
    out = visuals.take(chosen).features
    assert out.shape == (2, k, 6) and out.dtype == dtype and out.isfinite().all()
    assert torch.equal(chosen.assign.gather(1, chosen.keep), torch.arange(k).expand(2, -1))
    if clusters == 0 or (len(layout.views) == 1 and k > 1):
        assert bool((chosen.assign < 0).any()) == (clusters == 0 and k < layout.cells)
    for u in range(2):
        alone = replace(
            visuals, features=visuals.features[u : u + 1], signals={n: s[u : u + 1] for n, s in signals.items()}
        )
        assert torch.equal(VMTC(k, clusters).select(alone).keep[0], chosen.keep[u])


def test_crops_are_alone_and_views_in_order() -> None:
    layout = LAYOUTS["tiles"]
    k = 16
    visuals = some_visuals(layout, k, seed=5)
    chosen = VMTC(k, 0.5).select(visuals)
    assert chosen.assign is not None and chosen.rows is not None
    view = layout.view_of()
    assert torch.equal(view[chosen.keep[0]], view[chosen.keep[0]].sort().values)
    crop = torch.cat([i * 100 + v.tiles() for i, v in enumerate(layout.views)])
    cells = [(crop == c).nonzero()[:, 0] for c in crop.unique()]
    found: dict[int, Tensor] = {}
    quotas = split_budget(k, [len(c) for c in cells])
    for own, quota in zip(cells, quotas, strict=True):
        if quota:
            part = {n: s[:, own] for n, s in visuals.signals.items()}
            one = mm.Visuals(visuals.features[:, own], Layout.raster(1, 1, len(own)), quota, part, road=road)
            rows = VMTC(quota, 0.5).select(one)
            assert rows.rows is not None
            found |= {int(own[slot]): row for slot, row in zip(rows.keep[0], rows.rows[0], strict=True)}
    assert sorted(found) == sorted(chosen.keep[0].tolist())
    for slot, row in zip(chosen.keep[0].tolist(), chosen.rows[0], strict=True):
        assert torch.allclose(found[slot], row, atol=1e-5)
    for v in range(2):  # kept patches of a view in raster order, then its clusters by their first patch
        mine = [j for j in range(k) if view[chosen.keep[0, j]] == v]
        members = [(chosen.assign[0] == j).nonzero()[:, 0].tolist() for j in mine]
        own = [j for j, m in zip(mine, members, strict=True) if len(m) == 1]
        assert torch.equal(chosen.rows[0, own[0]], visuals.features[0, chosen.keep[0, own[0]]])
        first = [m[0] for m in members]
        kept = sum(
            q - min(max(1, round(q / 2)), q - 1) for q, c in zip(quotas, cells, strict=True) if q and view[c[0]] == v
        )
        assert first[:kept] == sorted(first[:kept]) and first[kept:] == sorted(first[kept:]) and 1 < kept < len(mine)
        assert max(map(len, members[:kept])) == 1 < max(map(len, members[kept:]))


@pytest.mark.parametrize("name", LAYOUTS)
def test_nothing_waits(name: str) -> None:
    visuals = some_visuals(LAYOUTS[name], max(1, LAYOUTS[name].cells // 2))
    with NoWaiting():
        VMTC(visuals.k, 0.4).select(visuals)


def test_gradients_reach_all_that_is_left() -> None:
    visuals = some_visuals(LAYOUTS["one"], 10, seed=2)
    x = visuals["encoder_features"].requires_grad_()
    features = visuals.features.clone().requires_grad_()
    visuals = replace(visuals, features=features)
    chosen = VMTC(10, 4).select(visuals)
    visuals.take(chosen).features.sum().backward()
    kept = torch.zeros(2, 24, dtype=torch.bool).scatter(1, chosen.keep[:, :6], True)
    assert features.grad is not None and x.grad is not None
    assert torch.equal(features.grad.abs().sum(-1) > 0, kept) and torch.equal(x.grad.abs().sum(-1) > 0, ~kept)


def test_after_another_stage_the_visual_is_one_crop() -> None:
    visuals = some_visuals(LAYOUTS["tiles"], 15)
    thinned = replace(visuals.take(mm.Selection.of(torch.arange(2, 17).expand(2, -1))), k=6)
    part = {n: s[:, 2:17] for n, s in visuals.signals.items()}
    plain = mm.Visuals(visuals.features[:, 2:17], Layout.raster(1, 3, 5), 6, part, road=road)
    assert torch.equal(VMTC(6, 2).select(thinned).keep, VMTC(6, 2).select(plain).keep)
    other = {"received_attention": part["cls_attention"], "encoder_features": part["encoder_features"]}
    assert torch.equal(VMTC(6, 2).select(replace(plain, signals=other)).keep, VMTC(6, 2).select(plain).keep)


@pytest.mark.parametrize("clusters", [-1, 1.0, -0.1, True, "3", None])
def test_bad_options(clusters: Any) -> None:
    with pytest.raises(ValueError, match="clusters="):
        VMTC(0.5, clusters)


def test_plan_string() -> None:
    text = "vmtc(keep=144, clusters=16)"
    assert repr(mm.as_pipeline(text)) == text and mm.as_pipeline(text).position_policy() == "reindex"


# ---------------------------------------------------------------------- in a model
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family(family: str) -> None:
    model = build(family)
    parts: list[list[Any]] = [[5, image(family), 4], [3, image(family, True), 2, image(family), 6]]
    mm.compress(model, "vmtc(keep=5, clusters=2)")
    both = model.generate(**prompts(model, family, parts), **GREEDY)
    assert all(v.kept == 5 for v in mm.trace(model).visuals)
    seen = [(v.selection.keep, v.row) for v in mm.trace(model).visuals]
    uncached = model.generate(**prompts(model, family, parts), **{**GREEDY, "max_new_tokens": 2}, use_cache=False)
    assert torch.equal(uncached, both[:, : uncached.shape[1]])
    alone = model.generate(**prompts(model, family, parts[:1]), **GREEDY)
    assert torch.equal(alone[0, -6:], both[0, -6:])
    assert torch.equal(mm.trace(model).visuals[0].selection.keep, seen[0][0])


@torch.no_grad()
def test_decides_in_the_model_as_on_eager_attention() -> None:
    model = build("llava", attention="eager")
    inputs = prompts(model, "llava", [[5, image("llava"), 4]])
    seen = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
    attention, hidden = seen.attentions[-2].mean(1)[:, 0, 1:], seen.hidden_states[-2][:, 1:]
    features = model.model.multi_modal_projector(hidden)
    signals = {"cls_attention": attention, "encoder_features": hidden}
    visuals = mm.Visuals(features, Layout.raster(1, 4, 4), 7, signals, road=model.model.multi_modal_projector)
    expected = VMTC(7, 3).select(visuals)
    model.set_attn_implementation("sdpa")
    mm.compress(model, "vmtc(keep=7, clusters=3)")
    given: dict[str, Any] = {}
    tower = model.model.language_model
    handle = tower.register_forward_pre_hook(lambda m, a, k: given.update(k), with_kwargs=True)
    handle.remove()
    handle = tower.layers[0].register_forward_hook(lambda m, a, k, o: given.update(hidden=a[0]), with_kwargs=True)
    model(**inputs)
    handle.remove()
    chosen = mm.trace(model).visuals[0].selection
    assert torch.equal(chosen.keep, expected.keep)
    assert expected.assign is not None and chosen.assign is not None and torch.equal(chosen.assign, expected.assign)
    assert expected.rows is not None and torch.allclose(given["hidden"][:, 5:12], expected.rows, atol=1e-4)
