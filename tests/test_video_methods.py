# SPDX-License-Identifier: Apache-2.0
"""Methods that know time, beside plain loops over their cards; every method before the LLM on videos of few and of odd frames."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mmcompress as mm

from .families import QWEN, VIDEO, VIDEO_FAMILIES, build, image, prompts, video
from .test_crossed import INPUT, STAGES, chosen, some
from .tiny import GREEDY

TEMPORAL = ["evs", "vidcom2", "timechat_dtd", "vcast", "dycoke"]
EACH = ("vidcom2", "vcast")
"""Those that keep a token of each frame at least."""
COUNTS = (1, 2, 3, 5)


def film(frames: int, rows: int = 2, columns: int = 3, seed: int = 0, width: int = 32) -> Tensor:
    """Tokens [2, T * P, D] of two videos in which some places move and some stay."""
    generator = torch.Generator().manual_seed(seed)
    step = torch.rand(2, frames, rows * columns, 1, generator=generator)
    noise = torch.randn(2, frames, rows * columns, width, generator=generator)
    return (noise * step).cumsum(1).flatten(1, 2) + torch.randn(width, generator=generator)


def shown(frames: int, k: int, seed: int = 0) -> mm.Visuals:
    return mm.Visuals(film(frames, seed=seed), mm.Layout.raster(frames, 2, 3), k)


# ---------------------------------------------------------------------- every method on videos
@pytest.mark.parametrize("name", [name for name in STAGES if name.partition("-")[0] in INPUT])
def test_every_input_stage_on_few_and_odd_frames(name: str) -> None:
    stage: Any = STAGES[name]
    for frames in COUNTS:
        layout = mm.Layout.raster(frames, 2, 3)
        for k in {frames, 2 * frames + 1, layout.cells - 1, layout.cells}:
            if k <= layout.cells:
                both = some(stage, k, layout)
                found = chosen(stage, both)
                one = mm.Visuals(
                    both.features[1:], layout, k, {n: s[1:] for n, s in both.signals.items()}, road=both.road
                )
                assert torch.equal(chosen(stage, one).keep, found.keep[1:])


@pytest.mark.parametrize(
    "host", ["divprune", "visionzip", "tokenflex", "pool", "aim_merge", "prumerge", "absorb", "holov"]
)
def test_methods_for_pictures_frame_by_frame(host: str) -> None:
    """As if each frame were a picture, with exact budgets; and the whole video as one."""
    alone: Any = mm.as_pipeline(host).parts[0]
    if hasattr(alone, "weights"):
        with pytest.raises(ValueError, match="not trained"):
            mm.as_pipeline(f"per_frame(host='{host}')")
        return
    each: Any = mm.as_pipeline(f"per_frame(host='{host}')").parts[0]
    layout, still = mm.Layout.raster(3, 3, 4), mm.Layout.raster(1, 3, 4)
    for k in (3, 7, 9, 35):
        visuals = some(each, k, layout)
        found = chosen(each, visuals)
        counts = [k // 3 + (frame < k % 3) for frame in range(3)]
        made = mm.Visuals.take(mm.Visuals(visuals.features, layout, k), found).features
        for frame, count in enumerate(counts):
            part = slice(12 * frame, 12 * frame + 12)
            signals = {n: s[:, part] if s.shape[1:2] == (36,) else s for n, s in visuals.signals.items()}
            if "cls_features" in signals:
                signals["cls_feature"] = signals.pop("cls_features")[:, frame]
            mine = found.keep[(found.keep >= part.start) & (found.keep < part.stop)].view(2, -1) - part.start
            shown_ = mm.Visuals(visuals.features[:, part], still, count, signals, road=visuals.road)
            wanted = alone.select(shown_)
            order = wanted.keep.sort(dim=1)
            assert torch.equal(mine, order.values)
            tokens = shown_.take(wanted).features if wanted.rows is None else wanted.rows
            tokens = tokens.gather(1, order.indices[..., None].expand_as(tokens))
            first = sum(counts[:frame])
            assert torch.allclose(made[:, first : first + count], tokens, atol=1e-6)
            if wanted.assign is not None and found.assign is not None:
                mapped = torch.where(
                    wanted.assign < 0, -1, first + order.indices.argsort(1).gather(1, wanted.assign.clamp_min(0))
                )
                assert torch.equal(found.assign[:, part], mapped)
    whole: Any = mm.as_pipeline(f"per_frame(host='{host}', over='whole')").parts[0]
    visuals = some(whole, 9, layout)
    of_first = {"cls_feature": visuals["cls_features"][:, 0]} if "cls_features" in visuals.signals else {}
    one = mm.Visuals(visuals.features, mm.Layout.raster(1, 9, 4), 9, {**visuals.signals, **of_first}, road=visuals.road)
    assert torch.equal(chosen(whole, visuals).keep, alone.select(one).keep)


@torch.no_grad()
def test_each_frame_has_its_own_cls(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host reads of CLS: its feature, and its attention; in a model, of two videos with other frames."""
    family, given = "llava_next_video", []
    model, host = build(family), mm.VisionZip
    plain = host.select

    def seen(self: Any, visuals: mm.Visuals) -> mm.Selection:
        given.append(visuals)
        return plain(self, visuals)

    monkeypatch.setattr(host, "select", seen)
    inputs = prompts(model, family, [[3, video(family), 5], [4, video(family), 4]])
    with mm.compressed(model, "per_frame(host='visionzip', keep=0.5)"):
        model(**inputs)
        assert all(v.kept == round(0.5 * v.tokens) for v in mm.trace(model).visuals)
    pixels = inputs["pixel_values_videos"].flatten(0, 1)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[
        model.config.vision_feature_layer
    ]
    found = torch.cat([visuals["cls_feature"].unflatten(0, (2, -1)) for visuals in given], 1)
    assert torch.allclose(found, states[:, 0].unflatten(0, (2, -1)), atol=1e-5)
    attention = torch.cat([visuals["cls_attention"].unflatten(0, (2, -1)) for visuals in given], 1)
    assert len(attention.flatten(0, 1).unique(dim=0)) == len(pixels) == 6


@torch.no_grad()
def test_frames_that_are_given_as_pictures_are_pictures() -> None:
    """InternVL: each frame has a budget of its own, as if it were alone, and a plan for videos is refused."""
    model = build("internvl")
    inputs = prompts(model, "internvl", [[3, image("internvl"), 9, image("internvl"), 5]])
    frames = len(inputs["pixel_values"])
    inputs["pixel_values"] = inputs["pixel_values"][: frames // 2].repeat(2, 1, 1, 1)
    with mm.compressed(model, "evs(keep=0.5)"):
        model(**inputs)
        first, second = mm.trace(model).visuals
        assert first.modality == "image" and first.kept == second.kept == round(0.5 * first.tokens)
        assert torch.equal(
            first.kept_cells(), second.kept_cells()
        )  # of a video the second, which is the same, would go
    with pytest.raises(NotImplementedError, match="no video"):
        mm.compress(model, "evs(keep=0.5, on='video')")


# ---------------------------------------------------------------------- beside plain loops
def plain_evs(x: Tensor, frames: int, k: int) -> list[int]:
    x = x.unflatten(0, (frames, -1))
    change = 1 - F.cosine_similarity(x[1:], x[:-1], dim=2, eps=1e-8).flatten()
    places = x.shape[1]
    order = sorted(range(len(change)), key=lambda i: -float(change[i]))
    return sorted([*range(places), *(places + i for i in order[: k - places])])


def plain_dtd(x: Tensor, frames: int, k: int) -> list[int]:
    x, kept = x.unflatten(0, (frames, -1)), list(range(x.shape[0] // frames))
    places = x.shape[1]
    share, rest = divmod(k - places, max(1, frames - 1))
    for t in range(1, frames):
        alike = F.cosine_similarity(x[t], x[t - 1], dim=1)
        order = sorted(range(places), key=lambda i: float(alike[i]))
        kept += [t * places + i for i in sorted(order[: share + (t <= rest)])]
    return kept


def plain_vidcom2(x: Tensor, frames: int, k: int) -> list[int]:
    ratio, places = k / len(x), len(x) // frames
    quiet = x.var(0, correction=0).sort(stable=True).indices[: x.shape[1] // 2]
    y = F.normalize(x[:, quiet], dim=1).unflatten(0, (frames, -1))

    def like(centre: Tensor) -> Tensor:
        d = (y - centre).square().sum(2)
        return sum((-d / (2 * a)).exp() for a in (0.125, 0.25, 0.5, 1, 2))  # type: ignore[return-value]

    v, f = like(y.mean((0, 1))), like(y.mean(1, keepdim=True))
    p = (-v.mean(1) / 0.01).softmax(0)
    counts = [max(1, round(places * min(1.0, float(ratio * (1 + q - p.mean()))))) for q in p]
    score = (v + f).tolist()
    kept = {(t, i) for t in range(frames) for i in sorted(range(places), key=lambda i: score[t][i])[: counts[t]]}
    order = sorted(((t, i) for t in range(frames) for i in range(places)), key=lambda at: score[at[0]][at[1]])
    best = [at for at in order if at in kept] + [at for at in order if at not in kept]
    return sorted(t * places + i for t, i in best[:k])


def plain_vcast(x: Tensor, frames: int, k: int) -> list[int]:
    x = x.unflatten(0, (frames, -1))
    places, means = x.shape[1], F.normalize(x.mean(1), dim=1)
    turns = [1.0] * frames
    for t in range(1, frames - 1):
        steps = means[t] - means[t - 1], means[t + 1] - means[t]
        turns[t] = 1 - float(F.cosine_similarity(*steps, dim=0, eps=1e-6))
    raw = ((torch.tensor(turns) / 0.7).softmax(0) * (k - frames)).tolist()
    counts = [1 + min(places - 1, int(r)) for r in raw]
    for t in sorted(range(frames), key=lambda t: -(raw[t] - counts[t] + 1)):
        if sum(counts) < k and counts[t] < places:
            counts[t] += 1
    assert sum(counts) == k
    kept = []
    for t in range(frames):
        length = x[t].norm(dim=1)
        score = 1 - F.cosine_similarity(x[t], means[t][None], dim=1)
        score = score + (length - length.min()) / (length.max() - length.min() + 1e-6)
        kept += [t * places + int(i) for i in score.topk(counts[t]).indices.sort().values]
    return kept


def plain_dycoke(x: Tensor, frames: int, k: int) -> list[int]:
    x, blocks = x.unflatten(0, (frames, -1)), -(-frames // 4)
    places, kept, number = x.shape[1], [], 0
    share, rest = divmod(k - blocks * places, max(1, frames - blocks))
    for t in range(frames):
        if t % 4 == 0:
            kept += range(t * places, (t + 1) * places)
            continue
        alike = F.cosine_similarity(x[t], x[t - (2 if t % 4 == 2 else 1)], dim=1)
        order = sorted(range(places), key=lambda i: float(alike[i]))
        kept += [t * places + i for i in sorted(order[: share + (number < rest)])]
        number += 1
    return kept


PLAIN = {
    "evs": plain_evs, "timechat_dtd": plain_dtd, "vidcom2": plain_vidcom2, "vcast": plain_vcast, "dycoke": plain_dycoke,
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_as_the_card_says(name: str) -> None:
    stage: Any = mm.as_pipeline(name).parts[0]
    for seed in range(4):
        for frames in (2, 3, 5, 8):
            for k in (6, frames * 3, frames * 3 + 1):
                if k >= (frames if name in EACH else 6 * -(-frames // 4) if name == "dycoke" else 6):
                    if name == "vcast" and k > 3 * frames:
                        continue  # full frames share what is left in another order than the loop
                    visuals = shown(frames, k, seed)
                    found = stage.select(visuals).keep.tolist()
                    assert found == [PLAIN[name](x, frames, k) for x in visuals.features], (seed, frames, k)


def test_a_picture_or_too_small_a_budget_is_thinned_evenly() -> None:
    for name in ("evs", "timechat_dtd", "timechat_dtd(share='video')", "dycoke"):
        stage: Any = mm.as_pipeline(name).parts[0]
        assert stage.select(shown(1, 3)).keep.tolist() == [[1, 3, 5]] * 2
        assert stage.select(shown(4, 2)).keep.tolist() == [[2, 5]] * 2
    assert torch.equal(
        mm.as_pipeline("timechat_dtd(share='video')").parts[0].select(shown(5, 13)).keep,  # type: ignore[attr-defined]
        mm.as_pipeline("evs").parts[0].select(shown(5, 13)).keep,  # type: ignore[attr-defined]
    )


# ---------------------------------------------------------------------- in models
def parts(family: str) -> list[list[Any]]:
    kind = video(family)
    more = int(family in QWEN)  # the others are given all videos as one tensor
    other = (*kind[:1], kind[1] + more, *kind[2:])  # type: ignore[index,operator]
    return [[4, kind, 3, other, 5], [3, image(family), 2, kind, 6]]


@torch.no_grad()
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
@pytest.mark.parametrize("name", TEMPORAL)
def test_in_models(name: str, family: str) -> None:
    """Exact budgets, padded batch = alone, cached = uncached; several videos of other lengths, and a picture beside a video."""
    model, samples = build(family), parts(family)
    inputs = prompts(model, family, samples)
    plan = f"{name}(keep=0.5)"
    with mm.compressed(model, plan):
        out = model.generate(**inputs, **GREEDY)
        visuals = mm.trace(model).visuals
        cells = [(v.row, v.modality, v.kept_cells().tolist()) for v in visuals]
        assert all(v.kept == round(0.5 * v.tokens) == len(v.kept_cells()) for v in visuals)
        assert torch.equal(out, model.generate(**inputs, **GREEDY, use_cache=False))
        model(**prompts(model, family, samples[:1]))  # the same pixels, since they are drawn in order
        alone = [(v.row, v.modality, v.kept_cells().tolist()) for v in mm.trace(model).visuals]
        assert alone == [found for found in cells if found[0] == 0]
    stage: Any = mm.as_pipeline(plan).parts[0]
    with mm.compressed(model, plan[:-1] + ", on='video')"):
        model(**inputs)
        assert all(v.kept == v.tokens for v in mm.trace(model).visuals if v.modality == "image")
    with mm.compressed(model, f"divprune(keep=0.75) >> {plan}"):
        assert model(**inputs).logits.isfinite().all()
        assert all(v.kept == stage.budget(round(0.75 * v.tokens)) for v in mm.trace(model).visuals)


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["llava_scissor", "flashvid_merge", "fastvid", "framefusion_merge", "voronoi", "absorb"]
)
def test_masses_of_videos(name: str) -> None:
    """Every token of a video weighs once, alone as in a batch, decoded with a cache as without."""
    family = "qwen3_vl"
    model, samples = build(family), parts(family)
    inputs = prompts(model, family, samples)
    with mm.compressed(model, name, keep=0.4, mass=True):
        out = model.generate(**inputs, **GREEDY)
        sizes = [visual.sizes for visual in mm.trace(model).visuals]
        assert all(
            len(s) == v.kept and s.sum() == v.tokens for s, v in zip(sizes, mm.trace(model).visuals, strict=True)
        )
        assert any(s.max() > 1 for s in sizes)
        assert torch.equal(out, model.generate(**inputs, **GREEDY, use_cache=False))
        weighed = model(**inputs).logits
    with mm.compressed(model, name, keep=0.4, mass=False):
        assert not torch.allclose(model(**inputs).logits, weighed)


@torch.no_grad()
@pytest.mark.parametrize("name", [*EACH, "per_frame"])
def test_fewer_tokens_than_frames(name: str) -> None:
    family = "llava_onevision"
    model = mm.compress(build(family), name, keep=4)
    with pytest.raises(ValueError, match=r"leaves 4 of 20 tokens of a video of 5 frames.*keep 5 \(25%\) or more"):
        model(**prompts(model, family, [[4, ("video", 5, 28, 28), 3]]))


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ("timechat_dtd(share='all')", "choose 'frame'"),
        ("vcast(temperature=0.0)", "above 0"),
        ("vcast(compat='paper')", "choose 'reference' or None"),
        ("vidcom2(channels=0.0)", "share of channels"),
        ("vidcom2(temperature=-1.0)", "above 0"),
        ("evs(keep=0)", "at least 1"),
        ("dycoke_decode(drop=1.5)", r"drop=1.5: give a number in \[0, 1\]"),
        ("dycoke_decode(mode='paper')", "choose 'reuse'"),
        ("dycoke_decode(layer=0)", "layer=0"),
        ("seats_layers(drops=())", "as a tuple"),
        ("per_frame(over='all')", "choose 'frames'"),
        ("per_frame(host='fastv')", "acts before the language model"),
        ("per_frame(host='divprune(keep=0.1)')", "give keep to per_frame"),
        ("seats_layers(frames=0)", "make a window"),
        ("seats_layers(scale=1.0)", "above 1"),
    ],
)
def test_options_that_mean_nothing(plan: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mm.as_pipeline(plan)


# ---------------------------------------------------------------------- in layers
def test_seats_between_layers_as_published() -> None:
    stage: Any = mm.as_pipeline("seats_layers").parts[0]
    assert stage.cuts(28) == (17, 19, 21, 24) and stage.budgets(10_000, 28) == (9298, 7391, 2207, 0)
    other: Any = mm.as_pipeline("seats_layers(drops=(28, 32, 36), gone=40)").parts[0]
    assert other.cuts(48) == (28, 32, 36, 40) and other.budgets(10_000, 48) == (9255, 7231, 1728, 0)
    assert stage.cuts(4) == (2, 3) and stage.budgets(20, 4)[-1] == 0
    layout = mm.Layout.joined([mm.Layout.raster(3, 1, 2), mm.Layout.raster(1, 1, 3)])
    assert stage.windows(layout) == [0, 0, 0, 0, 1, 1, 2, 2, 2]


def test_seats_spreads_its_budget_over_windows() -> None:
    stage: Any = mm.as_pipeline("seats_layers").parts[0]
    layout = mm.Layout.raster(4, 1, 4)
    score = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) / 100
    for k in (1, 2, 5, 8, 15):
        kept = stage.select(mm.Visuals(torch.zeros(2, 16, 8), layout, k, {"last_attention": score})).keep
        for row, mine in enumerate(kept.tolist()):
            counts = [sum(i // 8 == w for i in mine) for w in (0, 1)]
            assert abs(counts[0] - counts[1]) <= 1  # nearly even, since attention is small
            for w in (0, 1):
                best = score[row, 8 * w : 8 * w + 8].topk(counts[w]).indices + 8 * w
                assert sorted(best.tolist()) == [i for i in mine if i // 8 == w]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_seats_leaves_no_visual_token_in_late_layers(family: str) -> None:
    model = build(family)
    inputs = prompts(model, family, parts(family))
    with mm.compressed(model, "seats(keep=0.75) >> seats_layers(drops=(1, 2), gone=3)"):
        out = model.generate(**inputs, **GREEDY)
        assert torch.equal(out, model.generate(**inputs, **GREEDY, use_cache=False))
        model(**inputs)
        plan: Any = mm.as_pipeline("seats_layers(drops=(1, 2), gone=3)").parts[0]
        for row in range(2):
            counts = mm.trace(model).tokens_per_layer(row)
            visual = sum(v.kept for v in mm.trace(model).visuals if v.row == row)
            assert [counts[0] - n for n in counts[1:]] == [visual - n for n in plan.budgets(visual, 4)]


# ---------------------------------------------------------------------- while decoding
class ByHand:
    """A stock model with eager attention whose layers from `layer` on see in each step of decoding only what dycoke shows them."""

    def __init__(self, model: Any, visual: Tensor, layer: int, drop: float, threshold: float, reuse: bool) -> None:
        self.visual, self.drop, self.threshold, self.reuse = visual, drop, threshold, reuse
        self.before: Tensor | None = None
        self.hidden: set[int] = set()
        self.sizes: list[int] = []
        self.likeness: list[float] = []
        layers = model.model.language_model.layers
        layers[layer - 1].self_attn.register_forward_hook(self.look)
        for part in layers[layer:]:
            part.register_forward_pre_hook(self.hide, with_kwargs=True)

    def look(self, module: Any, args: Any, output: Any) -> None:
        if output[1].shape[2] == 1:
            places = self.visual.nonzero()[:, 0]
            now = output[1][0, :, 0].float().mean(0)[places]
            alike = 0.0 if self.before is None else float(F.cosine_similarity(now, self.before, dim=0))
            self.before = now
            self.likeness.append(alike)
            if alike < self.threshold:
                order = sorted(range(len(now)), key=lambda i: -float(now[i]))
                self.hidden = {int(places[i]) for i in order[int(len(now) * (1 - self.drop)) :]}
            elif not self.reuse:
                self.hidden = set()
            self.sizes.append(len(self.hidden))

    def hide(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.shape[1] > 1:
            return args, kwargs
        mask = kwargs["attention_mask"].clone()
        mask[..., sorted(self.hidden)] = torch.finfo(torch.float32).min
        return args, {**kwargs, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("mode", ["reuse", "reference"])
@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_dycoke_while_decoding(family: str, mode: str) -> None:
    steps: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 8,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    model = build(family)
    inputs = prompts(model, family, [[4, video(family), 3]])
    stock = model.generate(**inputs, **steps)
    plan = f"dycoke_decode(layer=2, drop=0.5, threshold=0.3, mode='{mode}')"
    with mm.compressed(model, plan):
        found = model.generate(**inputs, **steps)
        again = model.generate(**inputs, **steps)  # nothing is left of the sample before
    with mm.compressed(model, plan.replace("drop=0.5", "drop=0.0")):
        same = model.generate(**inputs, **steps)
    assert torch.equal(stock.sequences, same.sequences) and torch.equal(found.sequences, again.sequences)
    by_hand = build(family, attention="eager")
    hand = ByHand(by_hand, inputs["input_ids"][0] == VIDEO, 2, 0.5, 0.3, mode == "reuse")
    if family == "llava_onevision":
        hand.visual[inputs["input_ids"][0].eq(VIDEO).nonzero()[-1]] = False  # the newline is no token of a patch
    wanted = by_hand.generate(**inputs, **steps)
    assert any(x >= 0.3 for x in hand.likeness) and any(x < 0.3 for x in hand.likeness[1:]), hand.likeness
    for one, other in zip(found.logits, wanted.logits, strict=True):
        assert (one - other).abs().max() < 2e-3
    assert max((one - other).abs().max() for one, other in zip(found.logits, stock.logits, strict=True)) > 1e-2


@torch.no_grad()
def test_dycoke_while_decoding_behind_its_first_part() -> None:
    family = "qwen3_vl"
    model = build(family)
    inputs = prompts(model, family, [[4, video(family), 3, image(family), 5], [3, video(family), 6]])
    with mm.compressed(model, "dycoke(keep=0.5) >> dycoke_decode(layer=1, drop=0.6)"):
        out = model.generate(**inputs, **GREEDY)
        assert torch.equal(out, model.generate(**inputs, **GREEDY))
