# SPDX-License-Identifier: Apache-2.0
"""Pictures, pixel by pixel, and what became of every cell."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import mmcompress as mm
from mmcompress.explain import Pane
from mmcompress.explain.fates import DROPPED, KEPT, MERGED, Step, step_of_layer
from mmcompress.visualize import animation, contact_sheet, kept_overlay, steps
from mmcompress.visualize.colours import SEAM, cluster_colour, heat, unit
from mmcompress.visualize.figure import new_figure
from mmcompress.visualize.overlay import fate_overlay, heat_overlay, laid_out

from .families import build, image, prompts

GREY = 180


def scene(width: int = 160, height: int = 80) -> Image.Image:
    return Image.new("RGB", (width, height), (GREY, GREY, GREY))


def pane(rows: int = 2, columns: int = 4, **more: Any) -> Pane:
    return Pane(torch.arange(rows * columns).view(rows, columns), **more)


def middle(picture: Image.Image, row: int, column: int, rows: int = 2, columns: int = 4) -> np.ndarray:
    """Mean colour around the middle of a cell."""
    pixels = np.asarray(picture, dtype=float)
    y, x = (round((i + 0.5) * n / k) for i, n, k in ((row, picture.height, rows), (column, picture.width, columns)))
    return pixels[y - 4 : y + 4, x - 4 : x + 4].mean((0, 1))


# ---------------------------------------------------------------------- overlays
def test_dropped_is_dark_kept_is_as_it_was_and_clusters_share_a_colour() -> None:
    step = Step("x", None, torch.tensor([0, 0, 2, -1, 5, 5, 6, 0]))
    assert step.fate.tolist() == [KEPT, MERGED, KEPT, DROPPED, MERGED, KEPT, KEPT, MERGED]
    assert step.share.tolist() == [3, 3, 1, 0, 2, 2, 1, 3]
    assert step.tokens == 4
    found = fate_overlay(scene(), pane(), step)
    colour = {i: middle(found, i // 4, i % 4) for i in range(8)}
    assert colour[3].max() < 0.3 * GREY
    for alone in (2, 6):
        np.testing.assert_allclose(colour[alone], GREY, atol=1)
    for one, other in ((0, 1), (0, 7), (4, 5)):
        np.testing.assert_allclose(colour[one], colour[other], atol=1)
    assert np.abs(colour[0] - colour[4]).max() > 40
    np.testing.assert_allclose(colour[0], 0.5 * GREY + 0.5 * np.asarray(cluster_colour(0)), atol=2)
    pixels = np.asarray(found)
    assert (pixels[40, 80] == 255).all(), "the frame of a kept cell is white"
    assert not (pixels[0, 120] == 255).all(), "a dropped cell has none"


def test_a_visual_is_found_among_the_cells_of_all() -> None:
    step = Step("x", None, torch.tensor([0, 1, 2, -1, -1, 5]))
    found = fate_overlay(scene(80, 40), pane(1, 2), step, first=4)
    assert middle(found, 0, 0, 1, 2).max() < 0.3 * GREY
    np.testing.assert_allclose(middle(found, 0, 1, 1, 2), GREY, atol=1)


def test_what_the_pane_does_not_reach_is_dark() -> None:
    step = Step("x", None, torch.arange(1))
    found = np.asarray(fate_overlay(scene(100, 100), pane(1, 1, box=(0.25, 0.25, 0.75, 0.75)), step), dtype=float)
    assert found[10, 10].max() < 0.3 * GREY < found[50, 50].min() == GREY
    # a padded picture: the grid reaches over the edge, and its cells are cut off there
    wide = Step("x", None, torch.tensor([-1, 1]))
    found = np.asarray(fate_overlay(scene(100, 100), pane(2, 1, box=(0.0, -0.5, 1.0, 1.0)), wide), dtype=float)
    assert found[10, 50].max() < 0.3 * GREY < found[60, 50].min()


def test_heat_is_lighter_where_it_is_more_and_hatched_where_nothing_is_known() -> None:
    values = torch.tensor([0.0, 0.25, 0.5, 1.0, float("nan"), 0.0, 0.0, 0.0])
    found = heat_overlay(scene(), pane(), values)
    light = [middle(found, 0, i) @ [0.3, 0.6, 0.1] for i in range(4)]
    assert light[3] > light[0] + 20
    for i, value in enumerate((0.0, 0.25, 0.5, 1.0)):
        part = 0.35 + 0.5 * value
        np.testing.assert_allclose(middle(found, 0, i), (1 - part) * GREY + part * heat(np.float32(value)), atol=2)
    red = Image.new("RGB", (40, 40), (200, 0, 0))
    (lowest,) = np.unique(np.asarray(heat_overlay(red, pane(1, 1), torch.zeros(1))).reshape(-1, 3), axis=0)
    assert tuple(lowest) == (130, 0, 1), "the picture keeps its colours"
    hatched = np.asarray(found.crop((4, 44, 36, 76)), dtype=float)[..., 0]
    assert hatched.mean() < 0.35 * GREY
    assert hatched.std() > 5, "stripes"


def test_colours_get_lighter_all_the_way() -> None:
    shades = heat(np.linspace(0, 1, 64, dtype=np.float32)) @ np.asarray([0.299, 0.587, 0.114], dtype=np.float32)
    assert (np.diff(shades) > 0).all()


def test_scores_become_0_to_1() -> None:
    inf, nan = float("inf"), float("nan")
    found = unit(torch.tensor([2.0, 4.0, 3.0, inf, -inf, nan]))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 0.5, 1.0, 0.0, nan]), equal_nan=True)
    assert unit(torch.full((3,), 7.0)).tolist() == [0.5] * 3


def test_seams_and_thumbnail_are_there() -> None:
    tiles = pane(4, 4, role="tiles", seams=((2.0,), (1.0,)))
    small = Pane(16 + torch.arange(4).view(2, 2), role="thumbnail")
    step = Step("x", None, torch.tensor([*range(16), -1, -1, -1, -1]))
    found = laid_out([scene(160, 160)], [tiles, small], lambda p, one: fate_overlay(p, one, step), side=160)
    assert found.size == (160 + 8 + 72, 160)
    pixels = np.asarray(found)
    assert (pixels[80, 60] == SEAM).all()
    assert (pixels[60, 40] == SEAM).all()
    assert not (pixels[120, 60] == SEAM).all()
    assert pixels[36, 168 + 18].max() < 0.3 * GREY, "tokens of the thumbnail are dropped"


def test_a_video_shows_the_frame_asked_for(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), (shade, shade, shade)) for shade in (60, 120, 180, 240)]
    both = [Pane(torch.tensor([[i]]), role="frame", frame=i) for i in range(2)]
    step = Step("x", None, torch.arange(2))
    drawn = [laid_out(frames, both, lambda p, one: fate_overlay(p, one, step), side=40, frame=i) for i in range(2)]
    assert [np.asarray(one)[20, 20, 0] for one in drawn] == [60, 180]  # two frames to a token: the first of them
    sheet = Image.open(contact_sheet(drawn * 2, tmp_path / "sheet.png"))
    assert sheet.width > 80 < sheet.height
    for name in ("a.gif", "a.png", "a.webp"):
        moving = Image.open(animation(drawn, tmp_path / name))
        assert moving.n_frames == 2
        moving.seek(1)
        assert abs(np.asarray(moving.convert("RGB"), dtype=int)[20, 20, 0] - 180) < 4


# ---------------------------------------------------------------------- stages
@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen3_vl"])
def test_steps_say_what_the_trace_says(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, [[3, image(family), 2, image(family, other=True), 5]])
    plan = "divprune(keep=0.6) >> uniform(keep=0.5) >> fastv(layer=2, keep=0.5)"
    with mm.compressed(model, plan):
        model(**inputs)
        trace = mm.trace(model)
    found = steps(trace)
    assert [step.layer for step in found] == [None, None, None, 2]
    assert found[0].stands.equal(torch.arange(sum(v.tokens for v in trace.visuals)))
    first = 0
    for visual in trace.visuals:
        for layer in (0, 2):
            fate = found[step_of_layer(found, layer)].fate[first : first + visual.tokens]
            assert (fate == KEPT).nonzero()[:, 0].equal(visual.kept_cells(layer))
        first += visual.tokens
    assert found[2].tokens == sum(v.kept for v in trace.visuals)


@torch.no_grad()
def test_scores_are_those_that_decided() -> None:
    model = build("llava_next")
    inputs = prompts(model, "llava_next", [[3, image("llava_next"), 5]])
    with mm.compressed(model, "visionzip(keep=0.6) >> fastv(layer=2, keep=0.5)"):
        model(**inputs)
        before, cut = steps(mm.trace(model))[1:]
    assert before.stage.startswith("visionzip")
    assert before.scores is not None
    assert not before.scores.isnan().any()
    assert cut.scores is not None
    entered = before.stands >= 0
    assert cut.scores[~entered].isnan().all()
    stays = cut.scores[entered & (cut.stands >= 0)]
    leaves = cut.scores[entered & (cut.stands < 0)]
    assert stays.min() >= leaves.max()


@torch.no_grad()
def test_merged_in_a_layer_and_drawn() -> None:
    model = build("llava")
    inputs = prompts(model, "llava", [[3, image("llava"), 5]])
    with mm.compressed(model, "tome(keep=0.5)"):
        model(**inputs)
        (visual,) = mm.trace(model).visuals
        found = steps(mm.trace(model))
    assert (found[-1].fate != DROPPED).all(), "tome drops nothing"
    assert found[-1].stands.unique().numel() == visual.kept
    picture = kept_overlay(scene(80, 80), visual, side=80)
    step = found[-1]
    cells = {i: middle(picture, i // 4, i % 4, 4, 4) for i in range(16) if step.share[i] > 1 and step.fate[i] == MERGED}
    assert cells
    for i, colour in cells.items():
        expected = 0.5 * GREY + 0.5 * np.asarray(cluster_colour(int(step.stands[i])))
        np.testing.assert_allclose(colour, expected, atol=3)


def test_without_matplotlib_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"mmcompress\[viz\]"):
        new_figure(1, 1)
