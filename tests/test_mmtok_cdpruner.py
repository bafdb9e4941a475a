# SPDX-License-Identifier: Apache-2.0
"""mmtok and cdpruner: shared operations against naive twins, exact budgets, edges, and one run in each family."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcompress.kernels.coverage import max_coverage, soft_coverage
from mmcompress.kernels.diverse import greedy_map
from torch import Tensor

import mmcompress as mm
from mmcompress.methods.cdpruner import CDPruner
from mmcompress.methods.mmtok import MMTok
from mmcompress.ops.relevance import mean_cosine
from mmcompress.visuals import View

from .watch import Watch

METHODS = ["mmtok", "cdpruner", "cdpruner(clip)", "cdpruner(theta)"]


def make(method: str, k: int) -> Any:
    if method == "mmtok":
        return MMTok(keep=k)
    return CDPruner(keep=k, theta=0.9 if "theta" in method else None)


def some_visuals(
    u: int, n: int, k: int, t: int = 3, seed: int = 0, kind: str = "random", clip: bool = False
) -> mm.Visuals:
    g = torch.Generator().manual_seed(seed)
    features, seen = torch.randn(u, n, 6, generator=g), torch.randn(u, n, 5, generator=g)
    text, patches = torch.randn(u, t, 6, generator=g), torch.randn(u, n, 3, generator=g)
    if kind == "equal":
        features, seen, patches = torch.ones_like(features), torch.ones_like(seen), torch.ones_like(patches)
    if kind == "zero":
        features, seen, text, patches = (torch.zeros_like(x) for x in (features, seen, text, patches))
    if kind == "some zero":
        features[:, ::2], seen[:, 1::2], text[:, :1] = 0, 0, 0
    if kind == "twins":
        features[:, n // 2 :], seen[:, n // 2 :] = features[:, : n - n // 2].clone(), seen[:, : n - n // 2].clone()
    signals = {"encoder_features": seen, "text_embeddings": text}
    if clip:
        signals |= {"clip_patches": patches, "clip_text": F.normalize(torch.randn(u, 3, generator=g), dim=-1)}
    return mm.Visuals(features, mm.Layout.raster(1, 1, n), k, signals)


# ---------------------------------------------------------------------- methods alone
@pytest.mark.parametrize("method", METHODS)
@given(st.data())
@settings(deadline=None, max_examples=40)
def test_exact_budget_and_order(method: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 40))
    k = data.draw(st.one_of(st.integers(1, n), st.sampled_from([1, n])))
    t = data.draw(st.integers(0, 4))
    kind = data.draw(st.sampled_from(["random", "equal", "zero", "some zero", "twins"]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    seen = some_visuals(2, n, k, t, n, kind, clip="clip" in method)
    seen = replace(seen, features=seen.features.to(dtype), signals={a: b.to(dtype) for a, b in seen.signals.items()})
    chosen = make(method, k).select(seen)
    assert chosen.keep.shape == (2, k) and chosen.keep.dtype == torch.int64
    for row in chosen.keep.tolist():
        assert row == sorted(set(row)) and row[0] >= 0 and row[-1] < n
    assert chosen.scores is not None and chosen.scores.shape == (2, n) and chosen.scores.dtype == torch.float32
    assert chosen.scores.isfinite().all()
    assert torch.equal(make(method, k).select(seen).keep, chosen.keep)
    # cosines of equal tokens can differ by rounding of the matrix product, those of zero tokens cannot
    if kind == "zero" or (kind == "equal" and "mmtok" not in method):
        assert chosen.keep.tolist() == [list(range(k))] * 2  # ties go to the lower index
    for i in range(2):  # a visual does not depend on those it shares a batch with
        alone = replace(
            seen, features=seen.features[i : i + 1], signals={a: b[i : i + 1] for a, b in seen.signals.items()}
        )
        if kind == "random":
            assert torch.equal(make(method, k).select(alone).keep[0], chosen.keep[i])
    assert seen.take(chosen).features.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_gradients_flow_through_kept_tokens(method: str) -> None:
    seen = some_visuals(2, 12, 5, clip="clip" in method)
    features = seen.features.clone().requires_grad_()
    seen = replace(seen, features=features, signals={n: s.clone().requires_grad_() for n, s in seen.signals.items()})
    chosen = make(method, 5).select(seen)
    assert chosen.scores is not None and not chosen.scores.requires_grad
    seen.take(chosen).features.sum().backward()
    assert features.grad is not None and (features.grad.abs().sum(-1) > 0).sum() == 10


@pytest.mark.parametrize("method", METHODS)
def test_under_autocast(method: str) -> None:
    seen = some_visuals(2, 30, 30, clip="clip" in method)
    with torch.autocast("cpu", torch.bfloat16):
        assert make(method, 30).select(seen).keep.tolist() == [list(range(30))] * 2


@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device(method: str) -> None:
    seen = some_visuals(2, 12, 5, clip="clip" in method)
    seen = replace(seen, layout=mm.Layout((View((3, 4), (0.0, -0.5, 1.0, 1.5)),)))
    with Watch() as watch:
        make(method, 5).select(seen)
    bad = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "is_nonzero", "equal")
    assert not [n for n in watch.names if n.split("::")[1].split(".")[0] in bad]
    assert len(watch.names) < 5 * 65  # k picks, views counted


@pytest.mark.parametrize("method", ["mmtok", "cdpruner"])
def test_after_another_stage(method: str) -> None:
    seen = some_visuals(2, 20, 12, clip=True)
    seen = seen.take(mm.Uniform(keep=12).select(seen))
    assert make(method, 4).select(replace(seen, k=4)).keep.shape == (2, 4)


def test_plan_strings_and_needs() -> None:
    for text in (
        "mmtok(keep=64, alpha=0.25, patches=4)",
        "cdpruner(keep=0.1, theta=0.5)",
        "cdpruner(keep=3, compat='reference')",
    ):
        plan = mm.as_pipeline(text)
        assert repr(plan) == text and mm.as_pipeline(plan.to_dict()) == plan
        assert plan.position_policy() == "reindex"
    assert MMTok.needs == ("encoder_features", "text_embeddings")
    assert CDPruner.needs == (("clip_text", "text_embeddings"), ("clip_patches", None))
    assert MMTok().budget(576) == CDPruner().budget(576) == 64


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MMTok(alpha=-1.0), "alpha=-1.0"),
        (lambda: MMTok(alpha=math.nan), "alpha=nan"),
        (lambda: MMTok(text_temperature=0.0), "text_temperature=0.0"),
        (lambda: MMTok(vision_temperature=math.inf), "vision_temperature=inf"),
        (lambda: MMTok(patches=0), "patches=0"),
        (lambda: MMTok(keep=0), "keep=0"),
        (lambda: CDPruner(theta=1.0), "theta=1.0"),
        (lambda: CDPruner(compat="paper"), "compat='paper'"),
        (lambda: MMTok(keep=2, patches=2).select(some_visuals(1, 4, 2)), "patches=2: encoder features of width 5"),
        (lambda: CDPruner(keep=2).select(replace(some_visuals(1, 4, 2), signals={})), "clip_text or text_emb"),
    ],
)
def test_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make()


# ---------------------------------------------------------------------- coverage
def naive_coverage(table: Tensor, k: int) -> list[int]:
    best, picked = torch.zeros(len(table), dtype=torch.float64), []
    for _ in range(k):
        gains = {j: (table[:, j] - best).clamp_min(0).sum().item() for j in range(table.shape[1]) if j not in picked}
        picked.append(max(gains, key=lambda j: gains[j]))
        best = torch.maximum(best, table[:, picked[-1]])
    return picked


@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_max_coverage_equals_its_naive_twin(r: int, n: int, k: int, seed: int) -> None:
    table = torch.rand(2, r, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = min(k, n)
    assert max_coverage(table, k).tolist() == [naive_coverage(row, k) for row in table]
    # in float32 a pick may differ only where two gains are closer than its rounding; the sum reached is the same
    reached = table.gather(2, max_coverage(table.float(), k)[:, None].expand(-1, r, -1)).amax(2).sum(1)
    wanted = table.gather(2, max_coverage(table, k)[:, None].expand(-1, r, -1)).amax(2).sum(1)
    assert torch.allclose(reached, wanted, rtol=1e-5)


def test_max_coverage_is_near_the_best() -> None:
    for seed in range(20):
        table = torch.rand(1, 8, 9, generator=torch.Generator().manual_seed(seed))
        best = max(table[0][:, list(c)].amax(1).sum().item() for c in itertools.combinations(range(9), 3))
        got = table[0][:, max_coverage(table, 3)[0]].amax(1).sum().item()
        assert got >= (1 - 1 / math.e) * best


@pytest.mark.parametrize("n", [5, 33, 40, 65, 100])
def test_equal_tokens_are_taken_in_their_order(n: int) -> None:
    """Library sums round the last columns of a table in their own way, which must not decide."""
    for kind in ("zero", "equal"):
        seen = some_visuals(1, n, 3, kind=kind)
        seen = replace(seen, features=seen.features.sign(), signals={k: s.sign() for k, s in seen.signals.items()})
        seen = replace(seen, signals={**seen.signals, "encoder_features": seen.features[..., :4]})
        assert MMTok(keep=3).select(seen).keep.tolist() == [[0, 1, 2]]


def test_soft_coverage_weights() -> None:
    g = torch.Generator().manual_seed(0)
    table = soft_coverage(torch.randn(2, 3, 5, generator=g), torch.randn(2, 7, 5, generator=g), 0.2)
    assert torch.allclose(table.sum((1, 2)), torch.ones(2)) and torch.allclose(table.sum(2), torch.tensor(1 / 3))
    assert soft_coverage(torch.randn(2, 0, 5), torch.randn(2, 7, 5), 0.2).shape == (2, 0, 7)
    seen = some_visuals(2, 7, 3)
    assert torch.allclose(MMTok(alpha=0.25).coverage(seen).sum((1, 2)), torch.tensor(1.25))


def test_mmtok_without_text_covers_the_picture() -> None:
    seen = some_visuals(1, 20, 6, t=0)
    table = soft_coverage(seen["encoder_features"], seen["encoder_features"], 0.2)
    assert torch.equal(MMTok(keep=6).select(seen).keep, max_coverage(table, 6).sort(dim=1).values)


def test_mmtok_follows_the_words() -> None:
    seen = some_visuals(1, 20, 2)
    words = seen.features[:, [13, 7]] * 3
    seen = replace(seen, signals={**seen.signals, "text_embeddings": words})
    assert MMTok(keep=2).select(seen).keep.tolist() == [[7, 13]]


def test_mmtok_takes_padding_last() -> None:
    seen = some_visuals(2, 16, 8)
    seen = replace(seen, layout=mm.Layout((View((4, 4), (0.0, -0.5, 1.0, 1.5)),)))  # rows 0 and 3 are padding
    assert MMTok(keep=8).select(seen).keep.tolist() == [list(range(4, 12))] * 2
    assert MMTok(keep=10).select(replace(seen, k=10)).keep.tolist() == [[0, 1, *range(4, 12)]] * 2
    first = mm.Selection(torch.tensor([[0, 1, 4, 5, 12], [2, 4, 7, 3, 9]]))
    then = MMTok(keep=2).select(replace(seen.take(first), k=2))
    assert then.keep[0].tolist() == [2, 3] and set(then.keep[1].tolist()) <= {1, 2, 4}


def test_mmtok_averages_patches() -> None:
    seen = some_visuals(1, 10, 4)
    mean = seen["encoder_features"]
    shift = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    wide = replace(seen, signals={**seen.signals, "encoder_features": torch.cat([mean + shift, mean - shift], -1)})
    assert torch.allclose(MMTok(patches=2).coverage(wide), MMTok().coverage(seen), atol=1e-6)


# ---------------------------------------------------------------------- determinantal point process
def naive_map(kernel: Tensor, k: int) -> list[int]:
    """Largest determinant of the picked rows and columns at each step, float64, no factorisation."""
    picked: list[int] = []
    for _ in range(k):
        worth = {
            j: torch.linalg.slogdet(kernel[[*picked, j]][:, [*picked, j]])[1].item()
            for j in range(len(kernel))
            if j not in picked
        }
        picked.append(max(worth, key=lambda j: worth[j]))
    return picked


@given(st.integers(1, 25), st.integers(1, 12), st.integers(0, 10**6))
@settings(deadline=None, max_examples=60)
def test_greedy_map_equals_its_naive_twin(n: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, q = torch.randn(2, n, 24, generator=g), torch.rand(2, n, generator=g) + 0.05
    k = min(k, n)
    unit = F.normalize(x.double(), dim=-1)
    kernel = q.double()[:, :, None] * (unit @ unit.transpose(1, 2)) * q.double()[:, None]
    assert greedy_map(x, q.log(), k).tolist() == [naive_map(row, k) for row in kernel]
    assert torch.equal(greedy_map(x, (q * 7.5).log(), k), greedy_map(x, q.log(), k))
    assert torch.equal(greedy_map(x * 1e4, q.log(), k), greedy_map(x, q.log(), k))


@given(st.integers(1, 12), st.integers(0, 10**6), st.booleans())
@settings(deadline=None, max_examples=60)
def test_beyond_the_rank_quality_decides(rank: int, seed: int, half: bool) -> None:
    """Tokens of `rank` directions at right angles, whose cosines are exact: near the rank of others rounding decides."""
    g = torch.Generator().manual_seed(seed)
    way, q = torch.randint(rank, (40,), generator=g), torch.rand(1, 40, generator=g) + 0.05
    square = torch.ones(1, 1)
    for _ in range(4):
        square = torch.cat([torch.cat([square, square], 1), torch.cat([square, -square], 1)])
    scale = torch.randint(1, 5, (40, 1), generator=g) * (torch.randint(2, (40, 1), generator=g) * 2 - 1)
    x = (square[torch.randperm(16, generator=g)][way] * scale)[None]
    order = greedy_map(x.half() if half else x, q.log(), 40)[0].tolist()
    by_quality = sorted(range(40), key=lambda i: -q[0, i].item())
    first = [i for place, i in enumerate(by_quality) if way[i] not in way[by_quality[:place]]]
    assert order == first + [i for i in by_quality if i not in first]


def test_equal_and_zero_tokens_in_the_process() -> None:
    x = torch.tensor([[[1.0, 0], [1, 0], [0, 0], [0, 2], [0, 0]]])
    assert greedy_map(x, torch.zeros(1, 5), 5).tolist() == [[0, 3, 1, 2, 4]]
    assert greedy_map(x, torch.tensor([[0.1, 0.2, 0.9, 0.3, 0.0]]), 5).tolist() == [[3, 1, 2, 0, 4]]
    assert greedy_map(x, torch.tensor([[-200.0, 0, 0, 300, 0]]), 5).tolist() == [[3, 1, 2, 4, 0]]
    none = torch.full((1, 5), float("-inf"))
    assert greedy_map(x, none, 5)[0].sort().values.tolist() == [0, 1, 2, 3, 4]
    assert greedy_map(x, none.index_fill(1, torch.tensor([3]), 0.0), 2).tolist() == [[3, 0]]


def test_nearly_equal_tokens_stay_finite() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.ones(1, 200, 64) + 1e-3 * torch.randn(1, 200, 64, generator=g)
    order = greedy_map(x.bfloat16(), torch.rand(1, 200, generator=g), 200)[0]
    assert order.sort().values.tolist() == list(range(200))


def test_relevance_signs_and_scale() -> None:
    seen = some_visuals(2, 9, 3, clip=True)
    plain = replace(seen, signals={n: s for n, s in seen.signals.items() if "clip" not in n})
    clip, llm = CDPruner().relevance(seen), CDPruner().relevance(plain)
    joint = F.cosine_similarity(seen["clip_patches"], seen["clip_text"][:, None], dim=-1)
    assert clip.argmax(1).tolist() == joint.argmin(1).tolist()
    cosine = F.cosine_similarity(plain.features[:, :, None], plain["text_embeddings"][:, None], dim=-1).mean(-1)
    assert llm.argmax(1).tolist() == cosine.argmax(1).tolist()
    for r in (clip, llm):
        assert (r.amin(1) > 0).all() and torch.allclose(r.amax(1), torch.ones(2)) and (r.amin(1) < 1e-4).all()
    whole = CDPruner(compat="reference").relevance(seen)
    assert torch.isclose(whole.max(), torch.tensor(1.0)) and (whole.amax(1) < 0.999).any()
    for empty in (replace(plain, signals={"text_embeddings": torch.zeros(2, 0, 6)}), some_visuals(2, 1, 1)):
        assert torch.equal(CDPruner().relevance(empty), torch.ones(2, empty.n))


def test_theta_weighs_relevance() -> None:
    seen = some_visuals(2, 30, 5, seed=4, clip=True)
    diverse = greedy_map(seen.features, torch.zeros(2, 30), 5).sort(dim=1).values
    assert torch.equal(CDPruner(keep=5, theta=0.0).select(seen).keep, diverse)
    r = CDPruner().relevance(seen)
    expected = greedy_map(seen.features, 0.5 / (2 * 0.5) * r, 5).sort(dim=1).values
    assert torch.equal(CDPruner(keep=5, theta=0.5).select(seen).keep, expected)
    top = r.sort(dim=1, descending=True).indices[:, :5].sort(dim=1).values
    for theta in (0.999, 0.999999):
        assert torch.equal(CDPruner(keep=5, theta=theta).select(seen).keep, top)


def test_mean_cosine() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 5, 4, generator=g), torch.randn(2, 3, 4, generator=g)
    expected = F.cosine_similarity(x[:, :, None], y[:, None], dim=-1).mean(-1)
    assert torch.allclose(mean_cosine(x, y), expected, atol=1e-6)


# ---------------------------------------------------------------------- in a model
@torch.no_grad()
@pytest.mark.parametrize("plan", ["mmtok(keep=5)", "cdpruner(keep=5)", "divprune(keep=0.5) >> mmtok(keep=3)"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_in_every_family(family: str, plan: str) -> None:
    from tests.families import build, image, prompts
    from tests.tiny import GREEDY

    model = build(family)
    inputs = prompts(model, family, [[5, image(family), 4], [3, image(family, True), 2, image(family), 6]])
    mm.compress(model, plan)
    # without a cache the text grows with each call, and with it what a method that reads it keeps: one token can be compared
    a, b = (model.generate(**inputs, **{**GREEDY, "max_new_tokens": 1}, use_cache=cached) for cached in (True, False))
    assert torch.equal(a, b)
    model.generate(**inputs, **GREEDY)
    assert all(v.kept == (3 if ">>" in plan else 5) for v in mm.trace(model).visuals)


@torch.no_grad()
def test_needs_of_qwen_patches() -> None:
    from tests.families import build, image, prompts

    model = build("qwen2_5_vl")
    inputs = prompts(model, "qwen2_5_vl", [[5, image("qwen2_5_vl"), 4]])
    mm.compress(model, "mmtok(keep=3, patches=4, text_temperature=0.01)")
    assert model(**inputs).logits.isfinite().all()
    mm.compress(model, "mmtok(keep=3, patches=3)")
    with pytest.raises(ValueError, match="patches=3: encoder features of width 128"):
        model(**inputs)
