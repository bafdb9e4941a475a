# SPDX-License-Identifier: Apache-2.0
"""DART and AIM: naive twins from the cards, the decision in models, and cuts that leave no visual token."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.aim_merge import AIMMerge
from mmcompress.methods.dart import DART
from mmcompress.ops.bipartite import halvings, merge_in_steps
from mmcompress.ops.pivots import least_similar
from mmcompress.ops.shares import split_budget
from mmcompress.runtime.cache import is_pruned
from mmcompress.stage import Selecting
from mmcompress.visuals import Layout, View

from . import tiny
from .families import FAMILIES, IMAGE, VIDEO_FAMILIES, build, image, prompts, video
from .flash import FlashStandIn
from .reference import captured, score
from .test_families import alone, kept_places, samples, visual_places
from .tiny import GREEDY
from .watch import NoWaiting

LAYOUTS = {
    "one": Layout.raster(1, 4, 6),
    "odd": Layout.raster(1, 5, 5),
    "cell": Layout.raster(1, 1, 1),
    "frames": Layout.raster(3, 2, 4),
    "odd frames": Layout.raster(3, 1, 7),
    "tiles": Layout((View((3, 3), role="thumbnail"), View((3, 5), role="tiles", seams=((1.7,), (2.0, 4.1))))),
    "tiles first": Layout((View((2, 3), role="tile"), View((2, 3), role="tile"), View((4, 3), role="thumbnail"))),
}
STAGES: dict[str, Callable[[int], Selecting]] = {
    "dart": lambda k: DART(keep=k),
    "dart, few pivots": lambda k: DART(keep=k, image_pivots=1, text_pivots=0),
    "dart, many pivots": lambda k: DART(keep=k, image_pivots=9, text_pivots=7),
    "aim": AIMMerge,
    "aim, keys": lambda k: AIMMerge(k, "keys"),
    "aim, features": lambda k: AIMMerge(k, "features"),
    "aim, prune": lambda k: mm.AIMPrune(),
}
MERGING = ["aim", "aim, keys", "aim, features"]


def road(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :1]], -1)


def some_visuals(layout: Layout, k: int, seed: int = 0, kind: str = "random", text: int = 6, u: int = 2) -> mm.Visuals:
    g = torch.Generator().manual_seed(seed)
    n = layout.cells
    signals = {
        "key_norms": torch.rand(u, n, generator=g),
        "text_key_norms": torch.rand(u, text, generator=g),
        "final_states": torch.randn(u, n, 7, generator=g),
        "text_final_states": torch.randn(u, text, 7, generator=g),
        "joint_keys@-1": torch.randn(u, n, 8, generator=g),
        "encoder_features": torch.randn(u, n, 5, generator=g),
        "pagerank": torch.rand(u, n, generator=g),
    }
    features = torch.randn(u, n, 6, generator=g)
    if kind == "equal":
        signals, features = {name: torch.ones_like(x) for name, x in signals.items()}, torch.ones_like(features)
    if kind == "zero":
        signals, features = {name: torch.zeros_like(x) for name, x in signals.items()}, torch.zeros_like(features)
    return mm.Visuals(features, layout, k, signals, road=road)


def row_of(visuals: mm.Visuals, i: int) -> mm.Visuals:
    signals = {name: x[i : i + 1] for name, x in visuals.signals.items()}
    return mm.Visuals(visuals.features[i : i + 1], visuals.layout, visuals.k, signals, road=visuals.road)


def outputs(visuals: mm.Visuals, selection: mm.Selection) -> Tensor:
    return selection.rows if selection.rows is not None else selection.apply(visuals.features)


# ---------------------------------------------------------------------- all of them
@pytest.mark.parametrize("name", STAGES)
@given(st.data())
@settings(deadline=None, max_examples=30)
def test_exact_budget_and_no_slot_twice(name: str, data: st.DataObject) -> None:
    named = st.sampled_from([*LAYOUTS.values()])
    layout = data.draw(st.one_of(named, st.integers(1, 40).map(lambda n: Layout.raster(1, 1, n))))
    k = data.draw(st.integers(1, layout.cells))
    kind = data.draw(st.sampled_from(["random", "equal", "zero"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    visuals = some_visuals(layout, k, k, kind, text=data.draw(st.integers(0, 6)))
    signals = {name: x.to(dtype) for name, x in visuals.signals.items()}
    visuals = mm.Visuals(visuals.features.to(dtype), layout, k, signals, road=road)
    stage = STAGES[name](k)
    selection = stage.select(visuals)
    assert selection.keep.shape == (2, k) and selection.keep.dtype == torch.int64
    for row in selection.keep.tolist():
        assert row == sorted(set(row)) and min(row) >= 0 and max(row) < layout.cells
    out = outputs(visuals, selection)
    assert out.shape == (2, k, 6) and out.dtype == dtype and out.isfinite().all()
    if selection.assign is not None:
        assert selection.assign.min() >= -1 and selection.assign.max() < k
        assert torch.equal(selection.assign.gather(1, selection.keep), torch.arange(k).expand(2, -1))
    single = [stage.select(row_of(visuals, i)).keep for i in range(2)]
    assert torch.equal(torch.cat(single), selection.keep)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_synchronisation(name: str, layout: Layout) -> None:
    visuals = some_visuals(layout, -(-layout.cells // 2))
    with NoWaiting():
        STAGES[name](visuals.k).select(visuals)


@pytest.mark.parametrize(
    ("text", "positions"),
    [
        ("dart(keep=0.25)", "keep"),
        ("dart(layer=5, keep=64, image_pivots=2, text_pivots=0)", "keep"),
        ("aim_merge(keep=0.125, metric='features')", "reindex"),
        ("aim_prune(l1=13, l2=21)", "keep"),
        ("aim_merge(keep=0.25) >> aim_prune()", "reindex"),
    ],
)
def test_plan_strings(text: str, positions: str) -> None:
    assert repr(mm.as_pipeline(text)) == text
    assert mm.as_pipeline(text).position_policy() == positions


def test_aim_stands_for_its_parts() -> None:
    assert mm.as_pipeline("aim").parts == mm.as_pipeline("aim_merge(keep=0.25) >> aim_prune()").parts
    made = mm.as_pipeline("aim", keep=72, metric="keys", l1=13, l2=21)
    assert made.parts == mm.as_pipeline("aim_merge(keep=72, metric='keys') >> aim_prune(l1=13, l2=21)").parts
    assert mm.as_pipeline(made.to_dict()) == made
    assert [stage.positions for stage in made.parts] == ["reindex", "keep"]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("dart", {"keep": 2.0}, "keep"),
        ("dart", {"layer": 0}, "layer"),
        ("dart", {"image_pivots": 0}, "image_pivots"),
        ("dart", {"text_pivots": -1}, "text_pivots"),
        ("dart", {"text_pivots": True}, "text_pivots"),
        ("aim_merge", {"metric": "values"}, "metric"),
        ("aim_prune", {"l1": -1}, "l1"),
        ("aim_prune", {"l2": 1.5}, "l2"),
        ("aim_prune", {"l1": True}, "l1"),
        ("aim_prune", {"l1": 0.8, "l2": 0.8}, "l2 must be larger"),
        ("aim", {"keep": 0}, "keep"),
        ("aim", {"metric": "none"}, "metric"),
        ("aim", {"l1": 9, "l2": 4}, "l2 must be larger"),
    ],
)
def test_bad_options_say_what_is_allowed(method: str, options: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        mm.as_pipeline(method, **options)


# ---------------------------------------------------------------------- DART
def naive_dart(signals: dict[str, Tensor], k: int, first: int, words: int) -> list[int]:
    """One visual, by the card: order of the pivots, then pick after pick."""
    norm, text_norm = (signals[name].double().tolist() for name in ("key_norms", "text_key_norms"))
    x, text = signals["final_states"].double(), signals["text_final_states"].double()
    image = sorted(range(len(norm)), key=lambda i: (-norm[i], i))[: min(first, k)]
    spoken = sorted(range(len(text_norm)), key=lambda i: (-text_norm[i], i))[:words]
    pivots = [x[i] for i in image] + [text[i] for i in spoken]
    kept, pool = list(image), [i for i in range(len(norm)) if i not in image]
    for number, pivot in enumerate(pivots):
        each, more = divmod(k - len(image), len(pivots))
        alike = {i: float(F.cosine_similarity(pivot, x[i], dim=0)) for i in pool}
        picks = sorted(pool, key=lambda i: (alike[i], i))[: each + (number < more)]
        kept += picks
        pool = [i for i in pool if i not in picks]
    return sorted(kept)


@given(st.integers(1, 40), st.integers(0, 10**6), st.integers(0, 7), st.data())
@settings(deadline=None, max_examples=80, derandomize=True)
def test_dart_equals_its_naive_twin(n: int, seed: int, text: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    first, words = data.draw(st.sampled_from([(4, 4), (1, 0), (6, 2)]))
    visuals = some_visuals(Layout.raster(1, 1, n), k, seed, text=text)
    found = DART(keep=k, image_pivots=first, text_pivots=words).select(visuals).keep
    for i in range(2):
        signals = {name: x[i] for name, x in visuals.signals.items()}
        assert found[i].tolist() == naive_dart(signals, k, first, words)


def test_dart_keeps_what_is_unlike_its_pivots() -> None:
    """One pivot, and of the others those that point away from it."""
    states = torch.tensor([[1.0, 0.0], [0.9, 0.1], [-1.0, 0.0], [0.0, 1.0], [0.8, 0.0]])[None]
    none = torch.empty(1, 0, 2)
    signals = {"key_norms": torch.tensor([[9.0, 1, 1, 1, 1]]), "final_states": states}
    signals |= {"text_key_norms": none[..., 0], "text_final_states": none}
    visuals = mm.Visuals(states, Layout.raster(1, 1, 5), 3, signals)
    assert DART(keep=3, image_pivots=1).select(visuals).keep.tolist() == [[0, 2, 3]]


def test_dart_shares_the_budget_evenly() -> None:
    for k, kept, pivots, counts in ((36, 4, 8, [4] * 8), (33, 4, 8, [4] * 5 + [3] * 3), (4, 4, 8, [0] * 8)):
        assert DART.counts(k, kept, pivots) == counts


def test_least_similar_prefers_the_lower_of_equals_and_takes_none_twice() -> None:
    x, pivots = torch.ones(1, 6, 3), torch.ones(1, 2, 3)
    assert least_similar(x, pivots, torch.tensor([[1]]), [2, 3]).tolist() == [[0, 2, 3, 4, 5]]
    assert least_similar(x, pivots[:, :0], torch.tensor([[1]]), []).shape == (1, 0)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl_qwen3"])
def test_dart_in_a_model_equals_the_signals_of_the_stock_model(family: str) -> None:
    """Keys from the cache of the stock model, states from its hidden states."""
    model = build(family)
    inputs = prompts(model, family, samples(family))
    out = model(**inputs, use_cache=True, output_hidden_states=True)
    norms = out.past_key_values.layers[1].keys.abs().sum((1, 3))
    states = model.model.language_model.norm(out.hidden_states[2])
    mm.compress(model, "dart", keep=0.5, layer=2)
    model(**inputs)
    patches = visual_places(model, inputs["input_ids"].shape)
    found = kept_places(model, inputs, layer=2)
    for row in range(2):
        at = patches[row].nonzero()[:, 0]
        text = torch.arange(int(at[-1]) + 1, patches.shape[1])
        text = text[inputs["input_ids"][row, text] < IMAGE]
        signals = {"key_norms": norms[row, at], "final_states": states[row, at]}
        signals |= {"text_key_norms": norms[row, text], "text_final_states": states[row, text]}
        expected = at[torch.tensor(naive_dart(signals, round(len(at) / 2), 4, 4))].tolist()
        assert [int(i) for i in found[row] if patches[row, i]] == expected


@torch.no_grad()
@pytest.mark.parametrize("words", [1, 3])
def test_dart_with_hardly_any_text(words: int) -> None:
    model = mm.compress(tiny.build(), "dart", keep=9)
    assert model(**tiny.prompts(model, [[2, "image", words]])).logits.isfinite().all()
    assert mm.trace(model).tokens_per_layer() == [18 + words] * 2 + [11 + words] * 2


# ---------------------------------------------------------------------- AIM: merging
def naive_merge(metric: Tensor, k: int) -> tuple[list[dict[int, float]], list[int]]:
    """Groups of the tokens of `metric` [T, d] with their weights in the order of the reference, and who each stands for."""
    groups, slots = [{i: 1.0} for i in range(len(metric))], list(range(len(metric)))
    metric = metric.double()
    while len(groups) > k:
        r = min(len(groups) // 2, len(groups) - k)
        unit = F.normalize(metric, dim=-1)
        likeness = {
            i: {j: float(unit[i] @ unit[j]) for j in range(1, len(groups), 2)} for i in range(0, len(groups), 2)
        }
        partner = {i: max(row, key=lambda j: (row[j], -j)) for i, row in likeness.items()}
        order = sorted(partner, key=lambda i: (-likeness[i][partner[i]], i))
        rows, made = [*order[r:], *range(1, len(groups), 2)], []
        for i in rows:
            made.append([i, *(j for j in order[:r] if partner[j] == i)])
        metric = torch.stack([metric[members].mean(0) for members in made])
        groups = [{t: w / len(own) for j in own for t, w in groups[j].items()} for own in made]
        slots = [slots[i] for i in rows]
    return groups, slots


@given(st.integers(1, 40), st.integers(0, 10**6), st.data())
@settings(deadline=None, max_examples=60, derandomize=True)
def test_merge_in_steps_equals_its_naive_twin(n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    metric = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed))
    slots, into, share = merge_in_steps(metric, halvings(n, k))
    for i in range(2):
        groups, stands = naive_merge(metric[i], k)
        assert slots[i].tolist() == stands
        for j, group in enumerate(groups):
            assert (into[i] == j).nonzero()[:, 0].tolist() == sorted(group)
            for token, weight in group.items():
                assert math.isclose(float(share[i, token]), weight, rel_tol=1e-5)


def test_halvings_are_those_of_the_paper() -> None:
    assert halvings(196, 49) == [98, 49]
    assert halvings(576, 252) == [288, 36]
    assert halvings(576, 72) == [288, 144, 72]
    assert halvings(13, 3) == [6, 3, 1]
    assert halvings(7, 1) == [3, 2, 1]
    assert halvings(5, 5) == []


@given(st.integers(1, 3000), st.data())
@settings(deadline=None, max_examples=50)
def test_halvings_reach_every_number(tokens: int, data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, tokens))
    for r in halvings(tokens, keep):
        assert 1 <= r <= tokens // 2
        tokens -= r
    assert tokens == keep


@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_aim_merges_every_crop_alone(name: str, layout: Layout) -> None:
    frames = layout.views[0].role == "frame"
    crop = torch.cat([i * 100 + view.tiles() for i, view in enumerate(layout.views)])
    cells = [(crop == c).nonzero()[:, 0] for c in crop.unique()]
    for k in {1, layout.cells // 4, layout.cells // 2 + 1, layout.cells} - {0}:
        visuals = some_visuals(layout, k, seed=k)
        selection = STAGES[name](k).select(visuals)
        by_keys = name == "aim, keys" or (name == "aim" and not frames)
        metric, x = (visuals[n] if by_keys else visuals.features for n in ("joint_keys@-1", "encoder_features"))
        for u in range(2):
            made: dict[int, Tensor] = {}
            for own, quota in zip(cells, split_budget(k, [len(c) for c in cells]), strict=True):
                if quota:
                    groups, slots = naive_merge(metric[u, own], quota)
                    for group, slot in zip(groups, slots, strict=True):
                        made[int(own[slot])] = sum(
                            (w * x[u, own[i]] for i, w in group.items()), torch.zeros(x.shape[2])
                        )
            assert selection.keep[u].tolist() == sorted(made)
            rows = torch.stack([made[slot] for slot in sorted(made)])
            assert selection.rows is not None
            assert torch.allclose(selection.rows[u], road(rows) if by_keys else rows, atol=1e-6)


@pytest.mark.parametrize("name", MERGING)
def test_gradients_reach_all_that_is_merged(name: str) -> None:
    visuals = some_visuals(LAYOUTS["one"], 7)
    source = visuals.features if "features" in name else visuals["encoder_features"]
    source.requires_grad_()
    outputs(visuals, STAGES[name](7).select(visuals)).sum().backward()
    assert source.grad is not None and (source.grad.abs().sum(-1) > 0).all()


def test_aim_looks_at_features_where_there_are_no_keys() -> None:
    visuals = some_visuals(LAYOUTS["one"], 7)
    plain = AIMMerge(7, "features").select(visuals)
    signals = {name: x for name, x in visuals.signals.items() if name != "joint_keys@-1"}
    without = mm.Visuals(visuals.features, visuals.layout, 7, signals, road=road)
    assert torch.equal(AIMMerge(7).select(without).keep, plain.keep)
    assert not torch.equal(AIMMerge(7).select(visuals).keep, plain.keep)
    # behind another stage its tokens count, not what the encoder said of the cells they stand for
    signals = {name: x for name, x in visuals.signals.items() if not name.startswith("text")}
    later = mm.Visuals(visuals.features, visuals.layout, 7, signals)
    later = later.take(mm.Selection.of(torch.arange(20).expand(2, -1)))
    first = mm.Visuals(visuals.features[:, :20], Layout.raster(1, 4, 5), 7)
    assert torch.equal(AIMMerge(7).select(later).keep, AIMMerge(7).select(first).keep)


@torch.no_grad()
@pytest.mark.parametrize(("family", "kind"), [("llava", "image"), ("llava_onevision", "video")])
def test_aim_merge_in_a_model(family: str, kind: str) -> None:
    """What enters the language model, from the tower's own states (pictures) or from what would have entered it (videos)."""
    model = build(family)
    inputs = prompts(model, family, [[4, image(family) if kind == "image" else video(family), 3]])
    with captured(model) as before:
        model(**inputs)
    with mm.compressed(model, "aim_merge", keep=0.25), captured(model) as after:
        model(**inputs)
        (visual,) = mm.trace(model).visuals
    places = visual.span.patches
    if kind == "image":
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        last = model.model.vision_tower.encoder.layers[-1]
        metric = last.self_attn.k_proj(last.layer_norm1(states[-2]))[0, 1:]
        crops, x = [range(len(places))], states[-2][0, 1:]
    else:
        metric = x = before["inputs_embeds"][0, places]
        crops = [range(f * len(places) // 3, (f + 1) * len(places) // 3) for f in range(3)]
    made: dict[int, Tensor] = {}
    for own in crops:
        groups, slots = naive_merge(metric[list(own)], len(own) // 4)
        for group, slot in zip(groups, slots, strict=True):
            made[own[slot]] = sum((w * x[own[i]] for i, w in group.items()), torch.zeros(x.shape[1]))
    assert visual.kept_cells().tolist() == sorted(made)
    rows = torch.stack([made[slot] for slot in sorted(made)])
    expected = model.model.multi_modal_projector(rows) if kind == "image" else rows
    found = after["inputs_embeds"][0, int(places[0]) : int(places[0]) + len(rows)]
    assert torch.allclose(found, expected, atol=1e-4)


# ---------------------------------------------------------------------- AIM: the ramp
def test_the_ramp_is_that_of_the_reference() -> None:
    for stage, depth, first, last in ((mm.AIMPrune(), 28, 14, 22), (mm.AIMPrune(13, 21), 32, 13, 21)):
        assert stage.cuts(depth) == tuple(range(first + 1, last + 1))
        for tokens in (1, 7, 64, 144, 1568):
            for text in (0, 5, 40):  # the reference counts text in
                rates = [max(0.0, 1 - (layer - first + 1) / 8) for layer in range(first, last)]
                kept = [int(tokens * rate + text) - text for rate in rates]
                assert list(stage.budgets(tokens, depth)) == kept
    assert mm.AIMPrune(13 / 32, 21 / 32).cuts(32) == mm.AIMPrune(13, 21).cuts(32)
    assert mm.AIMPrune(2, 5).budgets(10, 9) == (6, 3, 0)
    # in the floating point of the reference 1 - 3 * 0.2 is a hair less than 0.4
    assert mm.AIMPrune(0, 5).budgets(5, 9) == (4, 3, 1, 0, 0)
    assert mm.AIMPrune().cuts(4) == (3,) and mm.AIMPrune().budgets(9, 4) == (0,)
    assert mm.AIMPrune(3, 6).cuts(6) == (4, 5)  # gone after the last layer
    assert mm.AIMPrune(14, 22).cuts(18) == (15, 16, 17)  # of 28 layers, on a model of 18
    assert mm.AIMPrune(14, 22).budgets(576, 18) == (504, 432, 360)
    assert mm.AIMPrune(14, 22).rates(18)[13:] == [1.0, 0.875, 0.75, 0.625, 0.5]


def test_a_ramp_that_does_not_fit_the_model() -> None:
    for plan in (
        "aim_prune(l1=3, l2=9)",
        "aim_prune(l1=4, l2=6)",
        "aim_prune(l1=0.9, l2=2)",
        "aim_prune(l1=1.0, l2=8)",
    ):
        with pytest.raises(ValueError, match=r"aim_prune\(.*language model"):
            mm.compress(tiny.build(), plan)


@torch.no_grad()
def masked_ramp(model: Any, inputs: dict[str, Tensor], patches: Tensor, first: int, last: int) -> list[Tensor]:
    """The reference by masks: which tokens each layer sees, [B, S]; PageRank of the eager weights among those still there.

    softmax(logits / 0.1) are the tenth powers of the weights, at sum 1.
    """
    alive, entered = inputs["attention_mask"].bool().clone(), patches.sum(1).tolist()
    seen, length = [], alive.shape[1]
    triangle = torch.ones(length, length, dtype=torch.bool).tril()

    def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple:
        seen.append(alive.clone())
        visible = (triangle & alive[:, None]) | torch.eye(length, dtype=torch.bool)
        return args, {**kwargs, "attention_mask": torch.where(visible, 0.0, -1e30)[:, None]}

    def after(layer: int, module: Any, args: tuple, output: Any) -> None:
        if not first <= layer < last:
            return
        for row, tokens in enumerate(entered):
            there = alive[row].nonzero()[:, 0]
            sharp = (output[1][row][:, there][:, :, there].double().log() * 10).softmax(-1)
            rank = torch.full((len(sharp), 1, len(there)), 1 / len(there), dtype=torch.float64)
            for _ in range(5):
                rank = rank @ sharp
            value = rank[:, 0].square().mean(0).sqrt()
            visual = patches[row, there].nonzero()[:, 0].tolist()
            k = int(tokens * (1 - (layer + 1 - first) / (last - first)))
            gone = sorted(visual, key=lambda i: (-float(value[i]), i))[k:]
            alive[row, there[gone]] = False

    layers = model.model.language_model.layers
    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers]
    handles += [
        layer.self_attn.register_forward_hook(lambda m, a, o, i=i: after(i, m, a, o)) for i, layer in enumerate(layers)
    ]
    try:
        model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("ramp", [(1, 5), (3, 11), (5, 7)])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
def test_aim_prune_drops_what_the_masked_reference_drops(family: str, ramp: tuple[int, int]) -> None:
    """Also where the ramp ends behind the last layer."""
    first, last = ramp
    model = build(family, attention="eager", num_hidden_layers=7)
    for layer in model.model.language_model.layers:  # tenth powers of too sharp an attention are zero in float32
        layer.self_attn.q_proj.weight.data *= 0.2
    inputs = prompts(model, family, samples(family))
    mm.compress(model, "random(keep=1.0)")  # for the places of the visual tokens
    model(**inputs)
    patches = visual_places(model, inputs["input_ids"].shape)
    mm.uncompress(model)
    expected = masked_ramp(model, inputs, patches, first, last)
    mm.compress(model, f"aim_prune(l1={first}, l2={last})")
    model(**inputs)
    counts = []
    for layer in range(7):
        found = [places.tolist() for places in kept_places(model, inputs, layer)]
        assert found == [row.nonzero()[:, 0].tolist() for row in expected[layer]]
        counts.append([int(patches[row, places].sum()) for row, places in enumerate(found)])
    n = patches.sum(1).tolist()
    left = [(last - first - max(0, min(layer, last) - first)) for layer in range(7)]
    assert counts == [[part * tokens // (last - first) for tokens in n] for part in left]


# ---------------------------------------------------------------------- cuts that leave no visual token
@mm.register("fading")
@dataclass(frozen=True, repr=False)
class Fading(mm.AIMPrune):
    """AIM's ramp by a score that does not depend on what comes later, so that calls of any length decide alike."""

    needs: ClassVar[tuple] = ()

    def select(self, visuals: mm.Visuals) -> mm.Selection:
        assert visuals.k > 0
        return mm.Selection.top(score(visuals.features), visuals.k)


FADING = "aim_merge(keep=0.5) >> fading(l1=1, l2=3)"


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_without_visual_tokens_cached_equals_uncached(family: str) -> None:
    model = mm.compress(build(family), FADING)
    inputs = prompts(model, family, samples(family))
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    a, b = (model.generate(**inputs, **options, use_cache=cached) for cached in (True, False))
    assert torch.equal(a.sequences, b.sequences)
    for one, other in zip(a.logits, b.logits, strict=True):
        assert (one - other).abs().max() < 3e-4
    assert is_pruned(a.past_key_values)
    assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation="static"), a.sequences)
    model(**inputs)
    patches = visual_places(model, inputs["input_ids"].shape)
    for row, places in enumerate(kept_places(model, inputs, layer=3)):
        assert not patches[row, places].any() and len(places)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["dart(keep=0.5)", "aim_prune(l1=1, l2=3)", "aim"])
@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_single_runs(family: str, plan: str) -> None:
    model = mm.compress(build(family), plan)
    inputs = prompts(model, family, samples(family))
    batch = model.generate(**inputs, **GREEDY)[:, -6:]
    for row, parts in enumerate(samples(family)):
        assert torch.equal(model.generate(**alone(model, family, parts, inputs, row), **GREEDY)[0, -6:], batch[row])


@torch.no_grad()
def test_without_visual_tokens_in_every_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beams, a text row in the batch, a second turn, and the flash attention path."""
    model = mm.compress(tiny.build(), FADING)
    inputs = tiny.prompts(model, tiny.ALIKE)
    assert torch.equal(*(model.generate(**inputs, **GREEDY, num_beams=3, use_cache=cached) for cached in (True, False)))
    mixed = tiny.prompts(model, [[25], [3, "image", 2]])
    assert torch.equal(*(model.generate(**mixed, **GREEDY, use_cache=cached) for cached in (True, False)))
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    more = torch.randint(5, 140, (2, 4), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([out.sequences, more], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 10, dtype=torch.long)], 1)
    whole = model.generate(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"], **GREEDY)
    again = model.generate(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, **GREEDY)
    assert torch.equal(again, whole)
    real = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    FlashStandIn(monkeypatch).enable(model)
    assert (model(**inputs).logits - expected)[real].abs().max() < 3e-4


@torch.no_grad()
def test_a_prompt_of_nothing_but_pictures() -> None:
    model = mm.compress(tiny.build(), FADING)
    for samples_ in ([["image"], ["image"]], [["image"], [3, "image", 4]]):
        with pytest.raises(ValueError, match="batch row 0 ends with image tokens"):
            model(**tiny.prompts(model, samples_))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_with_all_visual_tokens_gone(checkpointing: bool) -> None:
    """Text has read the picture in the layers before, so the vision tower still learns."""
    model = build("llava", num_hidden_layers=5)
    inputs = prompts(model, "llava", samples("llava"), side="right")
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids >= IMAGE) | (inputs["attention_mask"] == 0), -100)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    mm.compress(model, "aim(l1=1, l2=3)")
    model(**inputs, labels=labels).loss.backward()
    assert mm.trace(model).tokens_per_layer(0)[3:] == [9, 9]
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert all(grad.isfinite().all() for grad in found.values())
    assert any("vision_tower" in n and grad.abs().max() > 0 for n, grad in found.items())


@torch.no_grad()
@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_aim_on_videos(family: str) -> None:
    model = mm.compress(build(family, num_hidden_layers=6), "aim")
    inputs = prompts(model, family, [[4, video(family), 3, image(family), 2], [3, video(family), 5]])
    model.generate(**inputs, **GREEDY)
    for visual in mm.trace(model).visuals:
        assert visual.kept == round(visual.tokens / 4) == len(visual.kept_cells(3))
        assert len(visual.kept_cells(5)) == 0
        if visual.modality == "video":  # the same number of every frame
            views = visual.layout.view_of()[visual.kept_cells()].bincount(minlength=len(visual.layout.views))
            assert views.max() - views.min() <= 1
