# SPDX-License-Identifier: Apache-2.0
"""Methods that merge tokens of videos over time: frames of any number, thinned out or not, exact budgets, known cases."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import replace

import pytest
import torch
from mmcompress.eval.cost.selection import Sizes, random_visuals
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.framefusion import needed
from mmcompress.ops.connected import Connected
from mmcompress.ops.levels import levels, links
from mmcompress.ops.links import as_one, linked
from mmcompress.ops.runs import longest_runs, windows_of
from mmcompress.ops.segments import Packed, Places, peaks, segments
from mmcompress.ops.still import best_windows
from mmcompress.stage import InputStage, LayerStage, Selecting

from .families import VIDEO_FAMILIES, build, image, prompts, video
from .watch import NoWaiting

PLANS = (
    "fastvid", "holitom", "prunevid", "flashvid", "framefusion", "llava_scissor", "fastvid(loop=True, ignore=0.9)",
    "flashvid(compat='reference')", "llava_scissor(tau=0.9)",
)  # fmt: skip
STAGES = {repr(part): part for plan in PLANS for part in mm.as_pipeline(plan).parts}
PLACES = (2, 3)
SIZES = Sizes(8, 8, 8, 2, 4)


def moving(stage: Selecting, frames: int, k: int, seed: int = 0, visuals: int = 2) -> mm.Visuals:
    """A video whose frames are like the one before, with a cut in the middle."""
    shown = random_visuals(stage, k, mm.Layout.raster(frames, *PLACES), SIZES, visuals, 1.0, seed)
    steps = shown.features.unflatten(1, (frames, -1)) * 0.2
    steps[:, 0] *= 5
    steps[:, frames // 2] *= 5
    layer = isinstance(stage, LayerStage)
    slots = torch.arange(shown.n).expand(visuals, -1) if layer else None
    return replace(shown, features=steps.cumsum(1).flatten(1, 2), slots=slots)


def decided(stage: Selecting, shown: mm.Visuals) -> tuple[mm.Selection, Tensor]:
    chosen = stage.select(shown)
    assert chosen.keep.shape == (len(shown.features), shown.k)
    for row in chosen.keep.tolist():
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < shown.n
    if chosen.assign is not None:
        assert int(chosen.assign.min()) >= -1 and int(chosen.assign.max()) < shown.k
        own = chosen.assign.gather(1, chosen.keep)
        assert torch.equal(own, torch.arange(shown.k).expand_as(own))
    if chosen.weight is not None and not getattr(stage, "compat", None):
        total = torch.zeros(chosen.keep.shape)
        assert chosen.assign is not None
        total.scatter_add_(1, chosen.assign.clamp_min(0), chosen.weight * (chosen.assign >= 0))
        assert torch.allclose(total, torch.ones_like(total), atol=1e-5)
    rows = replace(shown, signals={}).take(chosen).features
    assert rows.isfinite().all()
    return chosen, rows


@pytest.mark.parametrize("frames", [1, 2, 3, 9])
@pytest.mark.parametrize("name", STAGES)
def test_any_number_of_frames_and_exact_budgets(name: str, frames: int) -> None:
    stage, tokens = STAGES[name], frames * PLACES[0] * PLACES[1]
    assert isinstance(stage, Selecting)
    for k in sorted({1, 2, frames, tokens // 4 or 1, tokens // 2, tokens - 1, tokens}):
        shown = moving(stage, frames, k)
        together, rows = decided(stage, shown)
        for i in range(2):
            alone = replace(
                shown, features=shown.features[i : i + 1], slots=None if shown.slots is None else shown.slots[i : i + 1],
                signals={n: s[i : i + 1] for n, s in shown.signals.items()},
            )  # fmt: skip
            one, row = decided(stage, alone)
            assert torch.equal(one.keep, together.keep[i : i + 1])
            assert torch.allclose(row, rows[i : i + 1], atol=1e-5)


@pytest.mark.parametrize("name", [name for name, stage in STAGES.items() if isinstance(stage, InputStage)])
def test_frames_that_an_earlier_stage_has_thinned_out(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    for seed, left in ((1, 30), (2, 17), (3, 5)):
        shown = moving(stage, 7, 7 * 6, seed)
        order = torch.rand(2, shown.n, generator=torch.Generator().manual_seed(seed)).argsort(1)
        thinned = shown.take(mm.Selection.of(order[:, :left]))
        for k in (1, left // 3, left - 1):
            decided(stage, replace(thinned, k=k))


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_videos_that_do_not_change(name: str, value: float) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    for k in (1, 6, 13, 29):
        shown = moving(stage, 5, k)
        decided(stage, replace(shown, features=torch.full_like(shown.features, value)))
        still = shown.features[:, :6].repeat(1, 5, 1)
        _, rows = decided(stage, replace(shown, features=still))
        if isinstance(stage, InputStage) and stage.name.startswith("holitom") and k == 6:
            assert torch.allclose(rows, still[:, :6], atol=1e-5)  # one token for each place


@pytest.mark.parametrize("name", STAGES)
def test_nothing_waits_for_the_device(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    shown = moving(stage, 9, 20)
    with NoWaiting():
        stage.select(shown)


@pytest.mark.parametrize("name", STAGES)
def test_gradients_reach_what_is_kept(name: str) -> None:
    stage = STAGES[name]
    assert isinstance(stage, Selecting)
    shown = moving(stage, 4, 9)
    features = shown.features.requires_grad_()
    replace(shown, signals={}).take(stage.select(shown)).features.square().sum().backward()
    assert features.grad is not None and int((features.grad.abs().sum(2) > 0).sum(1).min()) >= 9


# ---------------------------------------------------------------------- in models
@torch.no_grad()
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("plan", PLANS[:6])
def test_in_families_with_videos(plan: str, family: str) -> None:
    model = build(family, num_hidden_layers=4)
    mixed = [4, image(family), 1, video(family), 2, video(family), 3]
    inputs = prompts(model, family, [mixed, [6, video(family), 2]])
    steps = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    mm.compress(
        model, repr(mm.as_pipeline(plan).parts[0])
    )  # what cuts in layers asks the last token, which is another one then
    both = model.generate(**inputs, **steps)[:, -3:]
    assert torch.equal(both, model.generate(**inputs, **steps, use_cache=False)[:, -3:])
    mm.compress(model, plan)
    both = model.generate(**inputs, **steps)[:, -3:]
    one = prompts(model, family, [mixed])
    assert torch.equal(model.generate(**one, **steps)[:, -3:], both[:1])


# ---------------------------------------------------------------------- parts
def test_segments_are_cut_where_frames_differ_and_where_they_are_least_alike() -> None:
    similar = torch.tensor([[0.99, 0.5, 0.97, 0.95, 0.98]])
    assert segments(similar, 1, 0.9).tolist() == [[0, 0, 1, 1, 1, 1]]
    assert segments(similar, 3, 0.9).tolist() == [[0, 0, 1, 1, 2, 2]]
    assert segments(similar, 99, 0.0).tolist() == [[0, 1, 2, 3, 4, 5]]
    assert segments(similar[:, :0], 8, 0.9).tolist() == [[0]]


def best_by_trying(same: Tensor) -> int:
    """The most tokens that any split of a video into windows saves."""
    if not len(same):
        return 0
    found = []
    for cut in range(len(same) + 1):
        first, rest = same[:cut], same[cut + 1 :]
        saved = int(first.all(0).sum()) * cut
        found.append(saved + (best_by_trying(rest) if cut < len(same) else 0))
    return max(found)


def test_windows_are_the_best_there_are() -> None:
    for seed in range(6):
        same = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(seed)) > 0.35
        window, saved = best_windows(same, 99)
        assert saved.tolist() == [best_by_trying(one) for one in same]
        assert (window.diff(dim=1) >= 0).all() and (window <= torch.arange(7)).all()
    window, _ = best_windows(torch.ones(1, 6, 5, dtype=torch.bool), 3)
    assert torch.unique_consecutive(window[0], return_counts=True)[1].max() <= 3


def test_runs_of_frames() -> None:
    labels = torch.tensor([[0, 0, 0, 1, 0, 2, 2], [0, 1, 2, 3, 4, 5, 6], [1, 1, 0, 0, 1, 1, 3]])
    assert longest_runs(labels).tolist() == [[0, 0, 0, 0, 0, 2, 2], [0] * 7, [1, 1, 0, 0, 1, 1, 1]]
    assert windows_of(labels[:1]).tolist() == [[0, 0, 0, 3, 4, 5, 5]]


def test_peaks_by_group() -> None:
    """As one group after the other, whatever the order of the tokens."""
    x = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(0))
    groups = torch.arange(20).expand(2, -1) % 3 - (torch.arange(20) == 7).long()
    whole = peaks(x, Packed(groups, 3, 20), 4)
    for visual in range(2):
        for group in range(3):
            mine = (groups[visual] == group).nonzero()[:, 0]
            alone = peaks(x[visual, mine][None], Packed(torch.zeros(1, len(mine), dtype=torch.int64), 1, 20), 4)
            assert torch.allclose(whole[visual, mine], alone[0])
    mixed = peaks(x, Packed(groups, 3, 20), torch.tensor([[4, 4, 4], [4, 4, 4]]))
    assert torch.equal(mixed, whole)
    pair = peaks(
        torch.tensor([[[0.0], [1.0], [9.0]]]), Packed(torch.zeros(1, 3, dtype=torch.int64), 1, 3), torch.tensor([[2]])
    )
    assert pair[0, 0] == pair[0, 1] > pair[0, 2]


def test_places_of_frames() -> None:
    shown = moving(STAGES[next(iter(STAGES))], 3, 4)
    at = Places.of(shown)
    assert at.frame[0].tolist() == sorted([0, 1, 2] * 6) and at.cell[0].tolist() == [*range(6)] * 3


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("fastvid(segments=0)", "segments=0"), ("fastvid(ignore=0.9)", "loop=True"), ("fastvid(beta=2.0)", "beta=2.0"),
        ("holitom_merge(longest=0)", "longest=0"), ("holitom_merge(beta=-1.0)", "beta=-1.0"), ("holitom(layer=0)", "layer=0"),
        ("prunevid_merge(windows=0.0)", "windows=0.0"), ("prunevid(keep=2.0)", "keep=2.0"),
        ("flashvid_merge(alpha=1.5)", "alpha=1.5"), ("flashvid(expansion=0.5)", "expansion=0.5"),
        ("flashvid_merge(compat='x')", "compat='x'"), ("flashvid_merge(segments=0)", "segments=0"),
        ("framefusion(merged=(1.5,))", "merged=(1.5,)"), ("framefusion(merged=())", "one part"),
        ("framefusion(keep=3)", "give keep as a ratio"), ("llava_scissor(tau=2.0)", "tau=2.0"),
        ("llava_scissor(probes=0)", "probes=0"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(plan: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        mm.as_pipeline(plan)


def test_framefusion_spends_its_budget() -> None:
    """The mean over all layers is `keep`, as the reference counts it; what the input leaves is the first part of it."""
    for keep in (0.15, 0.3, 0.45, 0.5, 0.8):
        first, layers = mm.as_pipeline(f"framefusion(keep={keep})").parts
        assert isinstance(first, Selecting) and isinstance(layers, LayerStage)
        entering = first.budget(1000)
        counts = layers.budgets(entering, 28)
        means = [entering, *counts]
        total = sum(means[:-1]) + means[-1] * (28 - len(counts))
        assert abs(total / 28 - 1000 * keep) <= 1, (keep, means)
    assert needed([], 0.3, 28) == pytest.approx(0.7)
    with pytest.raises(ValueError, match="mean over all layers"):
        mm.FrameFusionLayers(0.1).budgets(100, 4)


def test_tokens_go_into_those_before_them() -> None:
    x = torch.eye(4)[[0, 1, 0, 2, 0, 2]][None]  # two places, three frames
    parent, cosine = linked(x, torch.tensor([[0, 1, 0, 1, 0, 1]]))
    assert parent[0, 2:].tolist() == [0, 1, 2, 3]
    assert cosine[0].tolist() == [float("-inf"), -3.0, 1.0, 0.0, 1.0, 1.0]
    into, share = as_one(parent, cosine > 0.5)
    assert into.tolist() == [[0, 1, 0, 3, 0, 3]] and share[0].tolist() == pytest.approx(
        [1 / 3, 1, 1 / 3, 0.5, 1 / 3, 0.5]
    )


def test_components_of_a_video() -> None:
    """What is connected in a frame is one token, and over frames; k tokens whatever is connected."""
    kinds = torch.tensor([0, 0, 1, 1, 2, 0, 0, 3, 3, 3])
    x = torch.eye(6)[kinds] + 0.01 * torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    given = mm.Visuals(x[None], mm.Layout.raster(2, 1, 5), 4)
    chosen = mm.LLaVAScissor(tau=0.9).select(given)
    assert chosen.assign is not None and chosen.assign.tolist() == [[0, 0, 1, 1, 2, 0, 0, 3, 3, 3]]
    again = mm.LLaVAScissor().select(given)
    assert torch.equal(again.keep, chosen.keep) and torch.equal(again.assign, chosen.assign)  # type: ignore[arg-type]
    for k in range(1, 11):
        assert decided(mm.LLaVAScissor(tau=0.9), replace(given, k=k))[0].k == k


def thinned(seed: int) -> tuple[Tensor, Places]:
    """Tokens of a video with frames of any sizes: drawn ones, whole numbers with many ties, zeros, one token again and again."""
    drawn = torch.Generator().manual_seed(seed)
    frames, most = 1 + seed % 5, 1 + seed * 7 % 13
    slots = torch.randperm(frames * most, generator=drawn)[: 1 + seed * 11 % (frames * most)].sort().values[None]
    x = torch.randn(1, slots.shape[1], 4, generator=drawn)
    x = (2 * x).round() if seed % 2 else x
    x[0, :: 3 + seed % 4] *= seed % 3 > 0
    return (x[:, :1].expand_as(x) if seed % 7 == 0 else x), Places(slots // most, slots % most, frames, most)


@pytest.mark.parametrize("pairs", [1 << 24, 300, 50, 7])
def test_levels_count_the_components_of_frames_at_any_threshold(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether a frame's cosines are held, several frames together, or made anew in each round."""
    monkeypatch.setattr("mmcompress.ops.levels.PAIRS", pairs)
    for seed in range(24):
        x, at = thinned(seed)
        level = levels(x, at)
        for tau in (-1.01, *(2 * torch.rand(5, generator=torch.Generator().manual_seed(seed)) - 1).tolist(), 1.01):
            assert at.tokens - int((level > tau).sum()) == len(Connected.of(x, at, tau).firsts), (seed, tau)


def test_cosines_of_copies_may_be_beyond_one() -> None:
    stage, layout = mm.as_pipeline("llava_scissor").parts[0], mm.Layout.raster(1, 12, 10)
    assert isinstance(stage, InputStage)
    beyond = 0
    for k in range(44, 60, 2):
        visuals = random_visuals(stage, k, layout, Sizes(features=64))
        few = torch.randn(1 + k % 5, visuals.features.shape[2], generator=torch.Generator().manual_seed(k))
        copies = few[torch.arange(visuals.n) % len(few)].expand_as(visuals.features).contiguous()
        beyond += float(levels(copies[:1], Places.of(visuals)).max()) > 1
        found = stage.select(replace(visuals, features=copies))
        assert found.keep.shape[1] == k
    assert beyond  # float32 rounds some of them up


def test_levels_of_what_has_no_cosine() -> None:
    x, at = thinned(4)
    x[0, 2] = float("nan")
    assert at.tokens - int((levels(x, at) > 0.3).sum()) == len(Connected.of(x, at, 0.3).firsts)


def test_links_to_the_frame_before() -> None:
    x, at = thinned(8)
    unit, frame = torch.nn.functional.normalize(x[0], dim=-1), at.frame[0]
    cosine = (unit @ unit.T).masked_fill(frame[:, None] != frame + 1, float("-inf"))
    assert torch.allclose(links(x, at).sort().values, cosine.amax(1).sort().values, atol=1e-6)


@pytest.mark.parametrize("free", [0, 4096])
def test_second_steps_are_bounded(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a video that changes no threshold is tried that leaves many components of the first step, but for one; of a still one a
    token of each place stays."""
    tried: list[int] = []
    plain = Connected.of

    def counted(x: Tensor, at: Places, tau: float) -> Connected:
        found = plain(x, at, tau)
        tried.append(len(found.firsts))
        return found

    monkeypatch.setattr(importlib.import_module("mmcompress.methods.llava_scissor"), "FREE", free)
    monkeypatch.setattr(Connected, "of", staticmethod(counted))
    drawn = torch.Generator().manual_seed(0)
    for k in (2, 12, 40, 100):
        tried.clear()
        decided(mm.LLaVAScissor(), mm.Visuals(torch.randn(1, 240, 32, generator=drawn), mm.Layout.raster(6, 5, 8), k))
        assert len(tried) <= 9
        assert free or sorted(tried)[-2:][0] <= max(6, math.isqrt(240 * k) + 1)
    still = torch.randn(1, 1, 40, 32, generator=drawn) + 0.01 * torch.randn(1, 6, 40, 32, generator=drawn)
    shown = mm.Visuals(still.flatten(1, 2), mm.Layout.raster(6, 5, 8), 40)
    found = mm.LLaVAScissor().select(shown)
    assert found.assign is not None and torch.equal(found.assign[0].view(6, 40), found.assign[0, :40].expand(6, -1))
    assert len(tried) and found.assign.unique().tolist() == [*range(40)]


def test_packed_farthest_points_are_counted() -> None:
    """flashvid picks in frames that are packed behind each other; its report said nothing but an IndexError."""
    from mmcompress.kernels.diverse import max_min
    from torch.utils.flop_counter import FlopCounterMode

    from mmcompress.flops import OPERATORS

    x, ends = torch.randn(12, 5), torch.tensor([0, 4, 8, 12])
    with FlopCounterMode(display=False, custom_mapping=OPERATORS) as packed:
        max_min(x, 6, first=ends[:3], cu_seqlens=ends, cu_picks=torch.tensor([0, 2, 4, 6]))
    with FlopCounterMode(display=False, custom_mapping=OPERATORS) as alone:
        max_min(x.view(3, 4, 5), 2)
    assert packed.get_total_flops() == alone.get_total_flops() > 0
