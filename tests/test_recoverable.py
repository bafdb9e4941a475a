# SPDX-License-Identifier: Apache-2.0
"""RecoverableCompression, the local outlier factor and the merging it uses: properties, and naive twins from the card."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.clip import modeling_clip

import mmcompress as mm
from mmcompress.methods.recoverable_compression import RecoverableCompression
from mmcompress.ops import neighbours as neighbours_module
from mmcompress.ops.neighbours import take_in
from mmcompress.ops.outliers import local_outlier_factor, stands_apart
from mmcompress.ops.shares import split_budget
from mmcompress.ops.ties import largest
from mmcompress.visuals import Layout, View

from . import families
from .test_clip_relevance import clip_of, texts, words_tokenizer
from .tiny import ALIKE, GREEDY, RAGGED, build, prompts, single
from .watch import NoWaiting

LAYOUTS = {
    "one": Layout.raster(1, 4, 6),
    "frames": Layout.raster(3, 2, 4),
    "cell": Layout.raster(1, 1, 1),
    "tiles": Layout((View((3, 3), role="thumbnail"), View((3, 5), role="tiles", seams=((1.7,), (2.0, 4.1))))),
}
OPTIONS: list[dict[str, Any]] = [{}, {"neighbours": 3}, {"neighbours": 0, "text_weight": 0.0}, {"compat": "reference"}]
ATTENTION, PATCHES, TEXT = "cls_joint_attention@-1", "clip_patches@-1", "clip_text"


def some_visuals(layout: Layout, k: int, seed: int = 0, u: int = 2, kind: str = "random") -> mm.Visuals:
    """Attention with a few outliers; the signals in both spellings, of the default and of compat="reference"."""
    g = torch.Generator().manual_seed(seed)
    n = layout.cells
    a = torch.rand(u, n, generator=g) / n * (1 + 20 * (torch.rand(u, n, generator=g) < 0.2))
    patches, text = torch.randn(u, n, 3, generator=g), F.normalize(torch.randn(u, 3, generator=g), dim=-1)
    signals = {
        ATTENTION: a,
        "joint_keys@-1": torch.randn(u, n, 5, generator=g),
        "encoder_features": torch.randn(u, n, 4, generator=g),
        PATCHES: patches,
        TEXT: text,
        "clip_patches_plain@-1": patches,
        "clip_text_last": text,
    }
    if kind == "equal":
        signals = {name: torch.ones_like(x) / n for name, x in signals.items()}
    if kind == "zero":
        signals = {name: torch.zeros_like(x) for name, x in signals.items()}
    if kind == "peak":
        signals[ATTENTION] = F.one_hot(torch.tensor([n // 2] * u), n).float()
    return mm.Visuals(torch.randn(u, n, 6, generator=g), layout, k, signals, road=road)


def road(x: Tensor) -> Tensor:
    return torch.cat([x, x[..., :2]], -1)


def part_of(visuals: mm.Visuals, rows: slice, cells: Tensor | slice, layout: Layout, k: int) -> mm.Visuals:
    signals = {n: x[rows] if "text" in n else x[rows][:, cells] for n, x in visuals.signals.items()}
    return mm.Visuals(visuals.features[rows][:, cells], layout, k, signals, road=road)


# ---------------------------------------------------------------------- local outlier factor
def naive_factor(x: list[float], k: int) -> list[float]:
    """From the card, over all pairs."""
    n, k = len(x), min(k, len(x) - 1)
    if n == 1:
        return [-1.0]
    near = [sorted((j for j in range(n) if j != i), key=lambda j: (abs(x[i] - x[j]), j))[:k] for i in range(n)]
    far = [abs(x[i] - x[near[i][-1]]) for i in range(n)]
    density = [1 / (sum(max(abs(x[i] - x[j]), far[j]) for j in near[i]) / k + 1e-10) for i in range(n)]
    return [-sum(density[j] for j in near[i]) / k / density[i] for i in range(n)]


@given(st.integers(1, 40), st.integers(1, 25), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_factor_equals_its_naive_twin(n: int, k: int, seed: int) -> None:
    x = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) ** 5
    found = local_outlier_factor(x, k)
    assert found.dtype == torch.float64
    expected = torch.tensor([naive_factor(row, k) for row in x.tolist()], dtype=torch.float64)
    assert torch.allclose(found, expected, rtol=1e-8)
    assert torch.equal(stands_apart(x, k), expected < -1.5)


@given(st.integers(1, 40), st.integers(1, 25), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_factor_among_some_is_that_of_their_row(n: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, among = torch.rand(3, n, generator=g) ** 5, torch.rand(3, n, generator=g) < 0.5
    found = local_outlier_factor(x, k, among)
    assert torch.equal(found[~among], torch.full_like(found[~among], -1))
    for row, mask, factors in zip(x, among, found, strict=True):
        if mask.any():
            assert torch.allclose(factors[mask], local_outlier_factor(row[mask][None], k)[0], rtol=1e-12)


def test_factor_of_piles() -> None:
    """Equal values are as dense as can be; what lies beside so many of them that they are all its neighbours stands apart."""
    assert not stands_apart(torch.full((1, 30), 0.3), 20).any()
    pile = torch.cat([torch.zeros(21), torch.tensor([0.1, 0.5])])[None]
    assert stands_apart(pile, 20)[0].tolist() == [False] * 21 + [True] * 2
    assert stands_apart(pile[:, 11:], 20).sum() == 0  # too few of them
    assert torch.allclose(local_outlier_factor(torch.tensor([[0.0, 5.0]]), 20), torch.tensor([[-1.0, -1.0]]).double())
    assert local_outlier_factor(torch.rand(2, 5).bfloat16(), 3).isfinite().all()


@given(st.integers(1, 20), st.integers(0, 25), st.integers(0, 10**6))
@settings(deadline=None, max_examples=30, derandomize=True)
def test_largest(n: int, count: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, among = torch.randint(0, 5, (2, n), generator=g).float(), torch.rand(2, n, generator=g) < 0.6
    for mask in (None, among):
        found = largest(x, torch.tensor([[count], [count + 1]]), mask)
        for i in range(2):
            there = [j for j in range(n) if mask is None or mask[i, j]]
            best = sorted(there, key=lambda j: (-float(x[i, j]), j))[: count + i]
            assert found[i].nonzero()[:, 0].tolist() == sorted(best)


# ---------------------------------------------------------------------- the method alone
@pytest.mark.parametrize("options", OPTIONS)
@given(st.data())
@settings(deadline=None, max_examples=25)
def test_exact_budget_and_no_slot_twice(options: dict[str, Any], data: st.DataObject) -> None:
    named = st.sampled_from([*LAYOUTS.values()])
    layout = data.draw(st.one_of(named, st.integers(1, 60).map(lambda n: Layout.raster(1, 1, n))))
    k = data.draw(st.one_of(st.integers(1, layout.cells), st.sampled_from([1, layout.cells])))
    kind = data.draw(st.sampled_from(["random", "equal", "zero", "peak"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    visuals = some_visuals(layout, k, seed=k, kind=kind)
    signals = {name: x.to(dtype) for name, x in visuals.signals.items()}
    visuals = mm.Visuals(visuals.features.to(dtype), layout, k, signals, road=road)
    stage = RecoverableCompression(k, **options)
    selection = stage.select(visuals)
    assert selection.keep.shape == (2, k) and selection.keep.dtype == torch.int64
    for row in selection.keep.tolist():
        assert len(set(row)) == k and min(row) >= 0 and max(row) < layout.cells
    out = visuals.take(selection).features
    assert out.shape == (2, k, 6) and out.dtype == dtype and out.isfinite().all()
    assert selection.assign is not None and selection.assign.min() >= -1 and selection.assign.max() < k
    assert torch.equal(selection.assign.gather(1, selection.keep), torch.arange(k).expand(2, -1))
    alone = [stage.select(part_of(visuals, slice(i, i + 1), slice(None), layout, k)).keep for i in range(2)]
    assert torch.equal(torch.cat(alone), selection.keep)


def naive(visuals: mm.Visuals, i: int, counts: tuple[int, int, int] | None, options: Any) -> tuple[Any, ...]:
    """Slots and tokens of visual `i` by the card, from lists; counts None: as many of each kind as the paper takes.
    options: compat, neighbours, text_weight."""
    compat, neighbours, weight = options
    a = visuals[ATTENTION][i].tolist()
    t = [float(v) for v in F.cosine_similarity(visuals[PATCHES][i], visuals[TEXT][i][None], dim=-1) / math.sqrt(3)]
    n = len(a)

    def outliers(x: list[float], knn: int) -> int:
        return sum(f < -1.5 for f in naive_factor(x, knn)) if x else 0

    def best(x: list[float], of: list[int], m: int) -> list[int]:
        return sorted(of, key=lambda j: (-x[j], j))[:m]

    everything = list(range(n))
    by_a = best(a, everything, int(n * (outliers(a, 20) / n)) if compat else outliers(a, 20))
    others = [j for j in everything if j not in by_a]
    if compat:
        covered = [min(t) if j in by_a else t[j] for j in everything]
        textual = int((n - len(by_a)) * (outliers(covered, 20) / n))
    else:
        textual = outliers([t[j] for j in others], 20)
    rest = [j for j in others if j not in best(t, others, textual)]
    size = n - len(rest)
    found = outliers([a[j] for j in rest], 10)
    middle = 0 if not rest else int(size * (found / len(rest))) if compat else size * found // len(rest)
    n_v, n_t, n_c = (len(by_a), textual, middle) if counts is None else counts

    kept = best(a, everything, n_v)
    kept = sorted(kept + best(t, [j for j in everything if j not in kept], n_t))
    rest = [j for j in everything if j not in kept]
    centres = best(a, rest, n_c)
    keys, x = F.normalize(visuals["joint_keys@-1"][i].double(), dim=-1), visuals["encoder_features"][i].double()
    key = {j: keys[rest.index(j) if compat else j] for j in rest}
    rows = []
    for c in centres:
        near = sorted((j for j in rest if j != c), key=lambda j: (-float(key[c] @ key[j] + weight * t[j]), j))
        rows.append(x[c] + sum((a[j] * x[j] for j in near[:neighbours]), torch.zeros(4)))
    left = [j for j in rest if j not in centres]
    rows.append(sum((a[j] * x[j] for j in left), torch.zeros(4, dtype=torch.float64)))
    slots = [*kept, *centres, *best(a, left, 1)]
    tokens = torch.cat([visuals.features[i][kept].double(), road(torch.stack(rows))])
    return (n_v, n_t, n_c), slots, tokens.float()


@pytest.mark.parametrize("compat", [None, "reference"])
@given(st.integers(2, 60), st.integers(0, 10**6), st.sampled_from([0, 3, 32]))
@settings(deadline=None, max_examples=25, derandomize=True)
def test_at_the_number_of_the_paper_it_chooses_as_the_paper(
    compat: str | None, n: int, seed: int, neighbours: int
) -> None:
    options = (compat, neighbours, 7.0)
    visuals = some_visuals(Layout.raster(1, 1, n), 1, seed, u=1)
    counts, slots, tokens = naive(visuals, 0, None, options)
    stage = RecoverableCompression(neighbours=neighbours, text_weight=7.0, compat=compat)
    found = stage.counts(visuals[ATTENTION], stage.text_score(visuals))
    assert tuple(int(x) for x in found) == counts
    if 0 < sum(counts) < n:
        k = sum(counts) + 1
        selection = stage.select(part_of(visuals, slice(None), slice(None), visuals.layout, k))
        assert selection.keep[0].tolist() == slots
        assert selection.rows is not None and torch.allclose(selection.rows[0], tokens, atol=1e-5)


@given(st.integers(1, 60), st.integers(0, 10**6), st.data())
@settings(deadline=None, max_examples=30, derandomize=True)
def test_other_budgets_keep_the_proportions(n: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, n))
    visuals = some_visuals(Layout.raster(1, 1, n), k, seed, u=1)
    selection = RecoverableCompression(k, text_weight=2.0).select(visuals)
    options = (None, 32, 2.0)
    worth = naive(visuals, 0, None, options)[0]
    if not any(worth):
        worth = (1, 1, 1)
    shares = [(k - 1) * w // sum(worth) for w in worth]
    for i in sorted(range(3), key=lambda i: -worth[i])[: k - 1 - sum(shares)]:
        shares[i] += 1
    _, slots, tokens = naive(visuals, 0, (shares[0], shares[1], shares[2]), options)
    assert selection.keep[0].tolist() == slots
    assert selection.rows is not None and torch.allclose(selection.rows[0], tokens, atol=1e-5)


def test_the_question_recovers_its_patches() -> None:
    visuals = some_visuals(LAYOUTS["one"], 9, seed=3, u=1)
    text = visuals[TEXT]
    shown = [5, 17, 20]
    patches = visuals[PATCHES] - 2 * text[:, None]  # none of them like the text
    patches[:, shown] = text[:, None] * torch.tensor([5.0, 4.0, 3.0])[:, None] + 0.1 * patches[:, shown]
    attention = visuals[ATTENTION].clone()
    attention[:, shown] = attention.amin()
    asked = mm.Visuals(
        visuals.features, visuals.layout, 9, {**visuals.signals, PATCHES: patches, ATTENTION: attention}, road=road
    )
    keep = RecoverableCompression(9).select(asked).keep[0].tolist()
    assert set(shown) & set(keep[:-1])
    other = mm.Visuals(asked.features, asked.layout, 9, {**asked.signals, TEXT: -text}, road=road)
    assert not set(shown) & set(RecoverableCompression(9).select(other).keep[0, :-1].tolist())


@pytest.mark.parametrize("options", OPTIONS)
def test_crops_are_compressed_one_by_one(options: dict[str, Any]) -> None:
    for layout in LAYOUTS.values():
        k = min(11, layout.cells)
        visuals = some_visuals(layout, k, seed=3)
        both = RecoverableCompression(k, **options).select(visuals)
        crop = torch.cat([i * 100 + view.tiles() for i, view in enumerate(layout.views)])
        cells = [(crop == c).nonzero()[:, 0] for c in crop.unique()]
        slots, rows = [], []
        for own, quota in zip(cells, split_budget(k, [len(c) for c in cells]), strict=True):
            if quota:
                alone = part_of(visuals, slice(None), own, Layout.raster(1, 1, len(own)), quota)
                one = RecoverableCompression(quota, **options).select(alone)
                assert one.rows is not None
                slots.append(own[one.keep])
                rows.append(one.rows)
        assert both.rows is not None
        assert torch.equal(both.keep, torch.cat(slots, 1)) and torch.allclose(both.rows, torch.cat(rows, 1), atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_no_synchronisation(options: dict[str, Any], name: str) -> None:
    layout = LAYOUTS[name]
    visuals = some_visuals(layout, max(1, layout.cells // 2))
    with NoWaiting():
        RecoverableCompression(visuals.k, **options).select(visuals)


def test_gradients_reach_all_that_is_kept_or_merged() -> None:
    visuals = some_visuals(LAYOUTS["one"], 10)
    seen = visuals["encoder_features"].requires_grad_()
    features = visuals.features.requires_grad_()
    for name in (ATTENTION, PATCHES, TEXT, "joint_keys@-1"):
        visuals.signals[name].requires_grad_()
    selection = RecoverableCompression(10, neighbours=2).select(visuals)
    visuals.take(selection).features.sum().backward()
    assert seen.grad is not None and features.grad is not None
    kept = features.grad.abs().sum(-1) > 0
    merged = seen.grad.abs().sum(-1) > 0
    assert (kept ^ merged).all() and kept.sum(1).min() > 1 and merged.sum(1).min() > 1
    assert torch.equal(selection.assignment(24) >= 0, kept | merged)
    assert visuals[ATTENTION].grad is None


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    visuals = some_visuals(LAYOUTS["one"], 12, seed=4)
    stage = RecoverableCompression(12, neighbours=4)
    whole = stage.select(visuals)
    monkeypatch.setattr(neighbours_module, "_ELEMENTS", 2 * 24 * 2)
    found = stage.select(visuals)
    assert torch.equal(found.keep, whole.keep) and found.rows is not None and whole.rows is not None
    assert torch.allclose(found.rows, whole.rows, atol=1e-6)
    assert found.assign is not None and whole.assign is not None and torch.equal(found.assign, whole.assign)


def test_take_in_sends_each_token_to_the_centre_that_likes_it_best() -> None:
    keys = torch.tensor([[[1.0, 0], [0, 1], [1, 0.2], [0.2, 1], [1, 0.9], [-1, -1]]])
    own, is_centre = torch.tensor([[4, 0, 1]]), torch.tensor([[False, True, True]])
    x, w = torch.eye(6)[None], torch.full((1, 6), 0.1)
    rows, into = take_in(x, w, keys, own, is_centre, neighbours=2)
    assert into.tolist() == [[1, 2, 1, 2, 0, 3]]
    assert torch.allclose(rows[0, 0], x[0, 4])
    assert torch.allclose(rows[0, 1], x[0, 0] + 0.1 * x[0, 2] + 0.1 * x[0, 3])  # not token 4, which stays by itself
    assert torch.allclose(rows[0, 3], 0.1 * x[0, [2, 3, 5]].sum(0))
    _, into = take_in(x, w, keys, own, is_centre, 2, bonus=torch.tensor([[0.0, 0, 0, 0, 0, 9]]))
    assert into[0, 5] in (1, 2)


def test_without_cls_the_received_attention_counts() -> None:
    visuals = some_visuals(LAYOUTS["one"], 9)
    scaled = visuals[ATTENTION] / visuals[ATTENTION].sum(1, keepdim=True)
    signals = {**visuals.signals, ATTENTION: scaled}
    expected = RecoverableCompression(9).select(mm.Visuals(visuals.features, visuals.layout, 9, signals, road=road))
    signals = {**visuals.signals, "received_attention": 7 * visuals[ATTENTION]}
    del signals[ATTENTION]
    found = RecoverableCompression(9).select(mm.Visuals(visuals.features, visuals.layout, 9, signals, road=road))
    assert torch.equal(found.keep, expected.keep) and found.rows is not None and expected.rows is not None
    assert torch.allclose(found.rows, expected.rows, atol=1e-6)


def test_without_clip_the_words_of_the_language_model_count() -> None:
    visuals = some_visuals(LAYOUTS["one"], 9, seed=2)
    words = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
    signals = {n: x for n, x in visuals.signals.items() if "clip" not in n} | {"text_embeddings": words}
    plain = mm.Visuals(visuals.features, visuals.layout, 9, signals, road=road)
    cosine = F.cosine_similarity(visuals.features[:, :, None], words[:, None], dim=-1).mean(-1) / math.sqrt(6)
    assert torch.allclose(RecoverableCompression(9).text_score(plain), cosine, atol=1e-6)


def test_after_another_stage_the_visual_is_one_crop() -> None:
    visuals = some_visuals(LAYOUTS["tiles"], 15)
    thinned = visuals.take(mm.Selection.of(torch.arange(2, 17).expand(2, -1)))
    thinned = mm.Visuals(thinned.features, thinned.layout, 6, thinned.signals, thinned.slots, road)
    plain = part_of(visuals, slice(None), slice(2, 17), Layout.raster(1, 3, 5), 6)
    assert torch.equal(RecoverableCompression(6).select(thinned).keep, RecoverableCompression(6).select(plain).keep)


@pytest.mark.parametrize(
    "text",
    [
        "recoverable_compression(keep=0.1)",
        "recoverable_compression(keep=64, neighbours=8, text_weight=1.5, compat='reference', clip='a', tokenizer='b')",
    ],
)
def test_plan_strings(text: str) -> None:
    plan = mm.as_pipeline(text)
    assert repr(plan) == text and mm.as_pipeline(plan.to_dict()) == plan
    assert plan.position_policy() == "reindex"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": -1}, "neighbours=-1"),
        ({"neighbours": 2.0}, r"neighbours=2\.0"),
        ({"neighbours": True}, "neighbours=True"),
        ({"text_weight": math.nan}, "text_weight=nan"),
        ({"text_weight": math.inf}, "text_weight=inf"),
        ({"compat": "paper"}, "compat='paper'"),
        ({"keep": 0}, "keep=0"),
    ],
)
def test_bad_options_say_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mm.as_pipeline("recoverable_compression", **options)


# ---------------------------------------------------------------------- in a model
@torch.no_grad()
@pytest.mark.parametrize("family", families.FAMILIES)
def test_in_every_family(family: str) -> None:
    model = families.build(family)
    samples = [[5, families.image(family), 4], [3, families.image(family, True), 2, families.image(family), 6]]
    if family in families.VIDEO_FAMILIES:
        samples.append([2, families.video(family), 5])
    inputs = families.prompts(model, family, samples)
    mm.compress(model, "recoverable_compression", keep=5)
    a, b = (model.generate(**inputs, **{**GREEDY, "max_new_tokens": 1}, use_cache=cached) for cached in (True, False))
    assert torch.equal(a, b)
    visuals = mm.trace(model).visuals
    assert [v.kept for v in visuals] == [5] * len(visuals) and len(visuals) >= 3
    assert "text_embeddings stands for clip_text, for which no clip= is given" in str(mm.report(model))
    model.generate(**inputs, **GREEDY)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("pair")
    return clip_of(build().model.vision_tower, folder / "clip"), words_tokenizer(folder / "words", clip=False)


@torch.no_grad()
@pytest.mark.parametrize("with_clip", [False, True])
def test_ragged_batch_equals_alone(with_clip: bool, pair: tuple[str, str]) -> None:
    model = build()
    inputs = prompts(model, RAGGED)
    options = {"clip": pair[0], "tokenizer": pair[1]} if with_clip else {}
    mm.compress(model, RecoverableCompression(keep=6, **options))
    both = model.generate(**inputs, **GREEDY)
    kept = [v.kept_cells().tolist() for v in mm.trace(model).visuals]
    for row, of_row in ((0, kept[:1]), (1, kept[1:])):
        one = single(inputs, row, [1, 2])
        alone = model.generate(**one, **GREEDY)
        assert [v.kept_cells().tolist() for v in mm.trace(model).visuals] == of_row
        assert torch.equal(alone[0, one["input_ids"].shape[1] :], both[row, inputs["input_ids"].shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("compat", [None, "reference"])
def test_decision_in_a_model_equals_that_on_independent_signals(
    compat: str | None, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    folder, words = pair
    model = build()
    inputs = prompts(model, ALIKE)
    entered: list[Tensor] = []
    hook = model.model.language_model.register_forward_hook(
        lambda module, args, kwargs, output: entered.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    mm.compress(model, RecoverableCompression(keep=7, compat=compat, clip=folder, tokenizer=words))
    model(**inputs)
    hook.remove()
    selections = [v.selection for v in mm.trace(model).visuals]
    mm.uncompress(model)

    clip = transformers.CLIPModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    asked: list[tuple[Tensor, Tensor]] = []
    eager = modeling_clip.eager_attention_forward

    def spy(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append((query, key))
        return eager(module, query, key, *args, **kwargs)

    monkeypatch.setattr(modeling_clip, "eager_attention_forward", spy)
    seen = clip.vision_model(inputs["pixel_values"], output_hidden_states=True)
    query, key = (x.transpose(1, 2).flatten(2) for x in asked[-1])
    joint = (query[:, :1] @ key.transpose(1, 2) * query.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
    last = seen.last_hidden_state[:, 1:]
    patches = clip.visual_projection(last if compat else clip.vision_model.post_layernorm(last))
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    for i, text in enumerate(texts(inputs)):
        if compat:
            ids = tokenizer(text, padding="max_length", max_length=12, return_tensors="pt").input_ids
            embedded = clip.text_projection(clip.text_model(input_ids=ids).last_hidden_state[:, -1])
        else:
            embedded = clip.get_text_features(**tokenizer(text, return_tensors="pt")).pooler_output
        signals = {
            ATTENTION: joint[i][None],
            "joint_keys@-1": key[i, 1:][None],
            "encoder_features": seen.hidden_states[-2][i, 1:][None],
            "clip_patches_plain@-1" if compat else PATCHES: patches[i][None],
            "clip_text_last" if compat else TEXT: F.normalize(embedded, dim=-1),
        }
        visuals = mm.Visuals(
            features[i][None], Layout.raster(1, 4, 4), 7, signals, road=model.model.multi_modal_projector
        )
        expected = RecoverableCompression(keep=7, compat=compat).select(visuals)
        assert torch.equal(selections[i].keep, expected.keep)
        assert expected.assign is not None and torch.equal(selections[i].assign, expected.assign)
        assert expected.rows is not None  # these tokens entered, in this order
        row = entered[0][i]
        where = (row - expected.rows[0][:, None]).abs().amax(-1).argmin(1)
        assert torch.allclose(row[where], expected.rows[0], atol=1e-4)
        assert (where.diff() == 1).all()
