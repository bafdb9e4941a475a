# SPDX-License-Identifier: Apache-2.0
"""Time in layouts: frames, what was at the same place before, budgets over frames, and where tokens lie in layer stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import mmcompress as mm
from mmcompress.ops.frames import Frames, evenly, largest_remainder, motion, similarity_before, spend
from mmcompress.plan import register
from mmcompress.stage import LayerStage

from .families import QWEN, VIDEO_FAMILIES, build, image, prompts, video

SEEN: list[mm.Visuals] = []


@register("sees_where")
@dataclass(frozen=True, repr=False)
class SeesWhere(LayerStage):
    """Keeps the last tokens, and notes what it was shown."""

    keep: float | int = 0.5
    layer: int | float = 2
    lays: ClassVar[bool] = True

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        SEEN.append(visuals)
        last = torch.arange(visuals.n - visuals.k, visuals.n)
        return mm.Selection.of(last.expand(len(visuals.features), -1))


def test_what_was_before() -> None:
    film, still = mm.Layout.raster(3, 2, 2), mm.Layout.raster(1, 2, 2)
    both = mm.Layout.joined([film, still, film])
    assert (film.frames, still.frames, both.frames) == (3, 1, 1)
    assert film.before().tolist() == [-1] * 4 + list(range(8))
    assert both.before().tolist() == [-1] * 4 + list(range(8)) + [-1] * 8 + list(range(16, 24))


@pytest.mark.parametrize("block", [1, 1 << 23])
@pytest.mark.parametrize("thinned", [False, True])
def test_tokens_by_frame(thinned: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mmcompress.ops.frames.ELEMENTS", block)
    x = torch.randn(2, 12, 8)
    slots = torch.tensor([[0, 2, 3, 5, 6, 9], [11, 1, 2, 3, 4, 5]]) if thinned else None
    features = x if slots is None else x.gather(1, slots[..., None].expand(-1, -1, 8))
    frames = Frames.of(features, 3, 4, slots)
    there = frames.full
    assert torch.equal(frames.x[there], x.unflatten(1, (3, 4))[there]) and not frames.x[~there].any()
    cosine, both = similarity_before(frames)
    for u, t, p in both.nonzero().tolist():
        mine, last = x[u, 4 * t + p], x[u, 4 * t + p - 4]
        assert torch.allclose(cosine[u, t, p], torch.cosine_similarity(mine, last, 0), atol=1e-6)
    assert bool((both[:, 1:] == (there[:, 1:] & there[:, :-1])).all()) and not both[:, 0].any()
    worth = motion(frames)
    for k in range(3, 7):
        counts = spend(worth, frames.room, k)
        assert counts.sum(1).tolist() == [k, k] and bool((counts <= frames.room).all())
        chosen = frames.chosen(frames.best_of_each(frames.lay(features[..., 0]), counts), k)
        assert all(len(set(row)) == k for row in chosen.tolist())
    best = frames.best(frames.lay(features[..., 0]), 2)
    top = features[..., 0].topk(2).indices
    assert [sorted(row) for row in best.tolist()] == [sorted(row) for row in top.tolist()]


def test_budgets_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        room = torch.randint(0, 9, (4, 7), generator=generator)
        k = int(room.sum(1).min())
        worth = torch.rand(4, 7, generator=generator)
        found = largest_remainder(worth / worth.sum(1, keepdim=True) * k, room, k)
        assert found.sum(1).tolist() == [k] * 4 and bool((found <= room).all()) and int(found.min()) >= 0
        mask = torch.rand(3, 11, generator=generator) < 0.6
        assert evenly(mask, 4).sum(1).tolist() == mask.sum(1).clamp_max(4).tolist()
    assert largest_remainder(torch.tensor([[1.5, 2.25, 1.25]]), torch.full((1, 3), 9), 5).tolist() == [[2, 2, 1]]


@torch.no_grad()
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_layer_stages_see_where_tokens_lie(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, [[4, video(family), 3, image(family), 2], [3, video(family), 5]])
    SEEN.clear()
    with mm.compressed(model, "divprune(keep=0.5) >> sees_where(keep=0.5)"):
        model(**inputs)
        kept = list(mm.trace(model).visuals)
    assert len(SEEN) == 2
    for seen in SEEN:
        (row,) = {v.row for v in kept if sum(w.kept for w in kept if w.row == v.row) == seen.n}
        mine = sorted((v for v in kept if v.row == row), key=lambda v: int(v.span.patches[0]))
        assert seen.layout == mm.Layout.joined([v.span.layout for v in mine])
        first, cells = 0, []
        for v in mine:
            cells += (first + v.kept_cells()).tolist()
            first += v.span.layout.cells
        assert seen.slots is not None and seen.slots[0].tolist() == cells


@torch.no_grad()
@pytest.mark.parametrize("family", QWEN)
def test_seconds_from_frame_to_frame(family: str) -> None:
    model = mm.compress(build(family), "divprune(keep=0.5)")
    inputs = prompts(model, family, [[4, video(family), 3, video(family), 2]])
    if "second_per_grid_ts" in inputs:
        inputs["second_per_grid_ts"] = torch.tensor([0.5, 2.0])
    model(**inputs)
    wanted = [0.5, 2.0] if family == "qwen2_5_vl" else [None, None]
    assert [visual.span.layout.seconds for visual in mm.trace(model).visuals] == wanted
    model.generate(**inputs, max_new_tokens=1)
    assert [visual.span.layout.seconds for visual in mm.trace(model).visuals] == wanted
