# SPDX-License-Identifier: Apache-2.0
"""Kernels of diversity: every implementation makes the picks of the naive twin.

Two dot products in another order differ by some 1e-7, so a pick may differ from the twin's where the twin's own margin, in
float64, is below MARGIN; it may nowhere else. After such a pick the two go their own ways, and the rest is not compared. For the
determinant the margin grows with what small picks amplify (see `naive.SPENT`), until nothing is defined any more.
"""

from __future__ import annotations

import inspect
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcompress.eval.kernel_bench.worker import extra_bytes
from mmcompress.kernels.diverse import blocked, expand, greedy_map, lazy, max_min, naive, rows
from mmcompress.kernels.gather import gather
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mmcompress as mm
from mmcompress.ops.cells import nearest_cells, numbered, outermost, placed

from .watch import NoWaiting, Watch, in_a_graph

MARGIN = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KINDS = ["random", "together", "clusters", "twins", "zeros", "equal", "line"]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


def tokens(kind: str, u: int, n: int, d: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(u, n, d, generator=g)
    if kind == "together":
        x += 3 * torch.randn(d, generator=g)
    if kind == "clusters":
        x = x[:, torch.randint(min(n, 4), (n,), generator=g)] + 0.05 * torch.randn(u, n, d, generator=g)
    if kind == "twins":
        x[:, n // 2 :] = x[:, : n - n // 2].clone()
    if kind == "zeros":
        x[:, torch.rand(n, generator=g) < 0.5] = 0
    if kind == "equal":
        x = torch.ones(u, n, d)
    if kind == "line":  # two directions: what is picked third adds nothing
        x = torch.where(torch.rand(u, n, 1, generator=g) < 0.5, torch.eye(d)[0], torch.eye(d)[-1])
    return x


# ---------------------------------------------------------------------- what a pick is worth, in float64
Values = Callable[[list[int]], tuple[Tensor, Tensor]]


def distances(x: Tensor, weight: Tensor | None, first: Tensor | None = None) -> Values:
    """After some picks: what each token is worth, and how far rounding may move that."""
    unit = F.normalize(x.double(), dim=-1)
    distance = 1 - unit @ unit.T

    def values(picks: list[int]) -> tuple[Tensor, Tensor]:
        if not picks and first is not None:
            return torch.zeros(len(x)).index_fill(0, first, 1), torch.zeros(len(x))
        if not picks:
            return distance.clone().fill_diagonal_(float("inf")).amin(1), torch.full((len(x),), MARGIN)
        least = distance[:, picks].amin(1) * (1 if weight is None else weight.double())
        return least.index_fill(0, torch.tensor(picks), float("-inf")), torch.full((len(x),), MARGIN)

    return values


def determinants(x: Tensor, log_quality: Tensor) -> Values:
    unit, worth = F.normalize(x.double(), dim=-1), 2 * log_quality.double().clamp_min(-1e30)

    def values(picks: list[int]) -> tuple[Tensor, Tensor]:
        left, factor, least = unit.square().sum(1).round(), unit.new_zeros(0, len(x)), 1.0
        for pick in picks:
            if left[pick] > naive.SPENT / 2:
                least = min(least, max(left[pick].item(), naive.SPENT))
            if left[pick] > naive.SPENT:
                row = (unit @ unit[pick] - factor[:, pick] @ factor) / left[pick].sqrt()
                factor, left = torch.cat([factor, row[None]]), left - row.square()
        new = left > naive.SPENT
        gain = torch.where(new, worth + left.clamp_min(1e-12).log(), worth - 1e35)  # what is not new comes last
        margin = 1e-7 * worth.abs() + torch.where(new, MARGIN / least / left.clamp_min(1e-12), 0)
        margin = margin.masked_fill((left - naive.SPENT).abs() < MARGIN / 2 / least, float("inf"))
        return gain.index_fill(0, torch.tensor(picks, dtype=torch.long), float("-inf")), 4 * margin

    return values


def check(picks: Tensor, twin: Tensor, values: list[Values]) -> None:
    assert picks.shape == twin.shape and picks.dtype == torch.int64
    for row, wanted, value in zip(picks.tolist(), twin.tolist(), values, strict=True):
        assert len(set(row)) == len(row) and min(row) >= 0
        for step, (a, b) in enumerate(zip(row, wanted, strict=True)):
            if a != b:
                worth, margin = value(wanted[:step])
                apart, allowed = (worth[a] - worth[b]).abs(), torch.maximum(margin[a], margin[b])
                assert apart <= allowed, (step, a, b, worth[a], worth[b])
                break


def check_nearest(near: Tensor, picks: Tensor, x: Tensor) -> None:
    """Each token has a pick that is as near as any, up to rounding; picks have themselves."""
    unit = F.normalize(x.double(), dim=-1)
    for row, chosen, own in zip(near, picks, unit, strict=True):
        cosine = (own @ own.T)[:, chosen]
        mine = (own * own[row]).sum(1)
        assert near.dtype == torch.int64 and bool(torch.isin(row, chosen).all())
        assert torch.equal(row[chosen], chosen) and (cosine.amax(1) - mine).max() <= MARGIN


def exact(u: int, n: int, d: int, seed: int) -> Tensor:
    """Signs, some of them scaled, some rows zero: lengths are powers of two and so all cosines are exact; most are equal."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(2, (u, n, d), generator=g) * 2.0 - 1
    x *= 2.0 ** torch.randint(-2, 3, (u, n, 1), generator=g)
    return x.masked_fill(torch.rand(u, n, 1, generator=g) < 0.1, 0)


# ---------------------------------------------------------------------- on the CPU
def test_picks_take_few_products() -> None:
    """Not one for each, which would read all of a pool and, with several threads, wait for all of them."""
    x = tokens("clusters", 1, 1100, 24) + tokens("random", 1, 1100, 24, 1)
    first, quality = torch.tensor([0]), torch.zeros(1, 1100)
    for run in (lambda: lazy.max_min(x, 300, None, first), lambda: lazy.greedy_map(x, quality, 300)):
        with Watch() as watch:
            run()
        assert 0 < sum(name in ("aten::mm", "aten::mv", "aten::addmm_", "aten::bmm") for name in watch.names) < 200


@contextmanager
def sizes(pool: int, round_: int, block: int = 2**21) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "FEW", 0)
        patch.setattr(lazy, "POOL", pool)
        patch.setattr(lazy, "AHEAD", 1 + pool % 5)
        patch.setattr(rows, "ROUND", round_)
        patch.setattr(rows, "_BLOCK", block)
        patch.setattr(blocked, "_BLOCK", block)
        yield


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_max_min_on_the_cpu(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    k = data.draw(st.one_of(st.integers(1, n), st.sampled_from([1, n])))
    u, d = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 17, 40, 128]))
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(0, 10**6))
    x = tokens(kind, u, n, d, seed).to(data.draw(st.sampled_from(TYPES)))
    weight = torch.rand(u, n, generator=torch.Generator().manual_seed(seed)) if data.draw(st.booleans()) else None
    first = torch.randint(n, (u,), generator=torch.Generator().manual_seed(seed)) if data.draw(st.booleans()) else None
    twin = max_min(x, k, weight, first=first, implementation="naive")
    values = [distances(x[i], *(None if y is None else y[i] for y in (weight, first))) for i in range(u)]
    with sizes(data.draw(st.sampled_from([1, 3, 512])), data.draw(st.sampled_from([1, 5, 128])), 64 * d):
        picks, near = max_min(x, k, weight, first=first, nearest=True)
        with NoWaiting():
            there, close = blocked.max_min(x, k, weight, first, True)
    check(picks, twin, values)
    check(there, twin, values)
    check_nearest(near, picks, x)
    check_nearest(close, there, x)


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_greedy_map_on_the_cpu(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 60))
    k = data.draw(st.one_of(st.integers(1, n), st.sampled_from([1, n])))
    u, d = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 17, 40, 128]))
    kind, seed = data.draw(st.sampled_from(KINDS)), data.draw(st.integers(0, 10**6))
    x = tokens(kind, u, n, d, seed).to(data.draw(st.sampled_from(TYPES)))
    quality = torch.rand(u, n, generator=torch.Generator().manual_seed(seed))
    spread = data.draw(st.sampled_from(["none", "some", "much", "hidden"]))
    log_quality = {
        "none": torch.zeros(u, n),
        "some": (quality + 0.05).log(),
        "much": 40 * quality,
        "hidden": quality.log().masked_fill(quality < 0.3, float("-inf")),
    }[spread]
    twin = greedy_map(x, log_quality, k, implementation="naive")
    values = [determinants(x[i], log_quality[i]) for i in range(u)]
    with sizes(data.draw(st.sampled_from([1, 3, 512])), 128, 64 * d):
        check(greedy_map(x, log_quality, k), twin, values)
        with NoWaiting():
            there = blocked.greedy_map(x, log_quality, k)
        check(there, twin, values)


@pytest.mark.parametrize("kind", ["random", "together", "clusters"])
def test_many_pools(kind: str) -> None:
    """At the sizes that are used: several rounds and pools, far more tokens than in one of them."""
    x = tokens(kind, 1, 1500, 48, seed=3)
    quality = torch.rand(1, 1500, generator=torch.Generator().manual_seed(1)).log() / 8
    for k in (30, 200):
        picks, near = max_min(x, k, nearest=True)
        check(picks, max_min(x, k, implementation="naive"), [distances(x[0], None)])
        check_nearest(near, picks, x)
    for log_quality in (quality, torch.zeros_like(quality)):
        twin = greedy_map(x, log_quality, 40, implementation="naive")
        check(greedy_map(x, log_quality, 40), twin, [determinants(x[0], log_quality[0])])


def test_every_pick_is_the_best_there_is() -> None:
    """Without a twin: against float64 after each pick, to the end."""
    x = tokens("together", 1, 300, 64, seed=5)
    log_quality = torch.rand(1, 300, generator=torch.Generator().manual_seed(2)).log() / 4
    with sizes(32, 16):
        far, new = max_min(x, 60), greedy_map(x, log_quality, 40)
    for picks, values in ((far, distances(x[0], None)), (new, determinants(x[0], log_quality[0]))):
        row = picks[0].tolist()
        for step, pick in enumerate(row):
            worth, margin = values(row[:step])
            assert worth.max() - worth[pick] <= margin[pick]


def test_few_similarities_are_computed() -> None:
    """Half of the table at worst, where all nearest neighbours are as near; and where they are not, far less."""
    done = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal done
            if func.__name__.startswith("mm."):
                done += len(args[0]) * args[1].shape[1]
            return func(*args, **(kwargs or {}))

    for kind, most in (("twins", 0.65), ("together", 0.3)):
        done, x = 0, tokens(kind, 1, 2000, 256, seed=1)[0]
        with Counting():
            rows.loneliest(rows.UnitRows(x))
        assert 0 < done < most * 2000**2, kind


def test_memory_is_linear() -> None:
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            largest = max(largest, out.numel() if isinstance(out, Tensor) else 0)
            return out

    n, d, k = 4000, 16, 20
    x = tokens("random", 1, n, d)
    with Largest():
        lazy.max_min(x, k, None, nearest=True)
        lazy.greedy_map(x, torch.zeros(1, n), k)
    assert largest <= n * max(rows.ROUND, d, k)


@pytest.mark.parametrize("place", [0, 0.5])
def test_memory_of_cells_is_linear(place: float) -> None:
    """All that torch and NumPy hold at the peak of voronoi, for each token: no more of it for more tokens."""
    per_token = []
    for n in (1500, 3000, 6000):
        features = tokens("random", 1, n, 16)
        seen = mm.Visuals(features, mm.Layout.raster(1, 50, n // 50), 64)

        def run(seen: mm.Visuals = seen) -> Tensor:
            return mm.Voronoi(keep=64, place=place).select(seen).apply(seen.features)

        run()
        tracemalloc.start()
        torches = extra_bytes(run, torch.device("cpu"))
        per_token.append((torches + tracemalloc.get_traced_memory()[1]) / n)
        tracemalloc.stop()
    assert max(per_token) == per_token[0] < 4 * 1500  # less than a row of a table


def test_cells_wait_for_nothing() -> None:
    features = tokens("together", 2, 40, 16)
    boxes = mm.Layout.raster(1, 5, 8).boxes()
    with NoWaiting():
        first = outermost(features)
        placed(features, boxes, None, 0.5)
        picks, near = blocked.max_min(features, 7, None, first, True)
        assign, weight = numbered(near, picks.sort(1).values)
    unit = F.normalize(features.double(), dim=-1)
    assert torch.equal(first, (unit - unit.mean(1, keepdim=True)).square().sum(2).argmax(1))
    wanted, shares = nearest_cells(features, picks.sort(1).values)
    assert torch.equal(assign, wanted) and torch.equal(weight, shares)
    same = features[:, :1].expand(-1, 40, -1).half()
    assert outermost(same).tolist() == [0, 0] and outermost(torch.zeros(1, 3, 4)).tolist() == [0]


def test_places_are_spread_as_asked() -> None:
    x, layout = tokens("random", 2, 40, 16).half(), mm.Layout.raster(1, 5, 8)
    found = placed(x, layout.boxes(), None, 0.5).double()
    unit = F.normalize(x.double(), dim=-1)
    centre = layout.boxes().double().unflatten(1, (2, 2)).mean(1)
    near = (torch.pi * (centre[:, None] - centre)).cos().mean(-1)  # cosine of two places
    table = unit @ unit.transpose(1, 2)
    scale = 0.5 * (1 - table).mean((1, 2)) / (1 - near).mean()
    assert torch.allclose(found @ found.transpose(1, 2), table + scale[:, None, None] * near, atol=1e-5)
    slots = torch.randperm(40)[:9].expand(2, -1)
    some = placed(gather(x, slots), layout.boxes(), slots, 0.5).double()[..., 16:]
    assert torch.allclose(F.normalize(some, dim=-1), F.normalize(gather(found[..., 16:], slots), dim=-1), atol=1e-5)
    frames = mm.Layout.raster(40, 1, 1).boxes()  # all lie at one place
    assert torch.equal(placed(x, frames, None, 2.0)[..., 16:], torch.zeros(2, 40, 4))


def test_equal_tokens_far_apart_are_two_cells_where_places_count() -> None:
    row = torch.eye(2)[[0, 1, 1, 1, 1, 1, 1, 0]][None]
    seen = mm.Visuals(row, mm.Layout.raster(1, 1, 8), 2)
    assert mm.Voronoi(keep=2).select(seen).assign.tolist() == [[0, 1, 1, 1, 1, 1, 1, 0]]
    assert mm.Voronoi(keep=2, place=10).select(seen).assign.tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]]
    for wrong in (-0.1, 11, True, "0.5", float("nan")):
        with pytest.raises(ValueError, match=r"from 0 .*0.5 for pages"):
            mm.Voronoi(place=wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_few_tokens_from_a_table(kind: str) -> None:
    for seed, (u, n, d) in enumerate([(1, 1, 3), (2, 7, 2), (1, 90, 17), (2, 130, 40)]):
        x, g = tokens(kind, u, n, d, seed).to(TYPES[seed % 3]), torch.Generator().manual_seed(seed)
        weight, quality = torch.rand(u, n, generator=g), torch.randn(u, n, generator=g)
        for k in {1, -(-n // 3), n}:
            for w, f in ((None, None), (weight, None), (None, torch.full((u,), n - 1))):
                twin = naive.max_min(x, k, w, f)[0]
                values = [distances(x[i], *(None if y is None else y[i] for y in (w, f))) for i in range(u)]
                picks, near = max_min(x, k, w, first=f, nearest=True)
                check(picks, twin, values)
                check_nearest(near, picks, x)
            picks, twin = greedy_map(x, quality, k), naive.greedy_map(x, quality, k)
            check(picks, twin, [determinants(x[i], quality[i]) for i in range(u)])


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_expansion(kind: str, held: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From given tokens, of another number for each visual, against values in float64 pick by pick."""
    monkeypatch.setattr(blocked, "TABLE", 4096 if held else 0)
    x, g = tokens(kind, 2, 50, 17, seed=3), torch.Generator().manual_seed(4)
    weight, offset = torch.rand(2, 50, generator=g), torch.rand(2, 50, generator=g)
    start, sizes = torch.stack([torch.randperm(50, generator=g)[:6] for _ in range(2)]), torch.tensor([0, 4])
    for cap, together, begun in ((1.0, 1, {"start": start, "sizes": sizes}), (2.0, 1, {}), (2.0, 4, {})):
        picks = expand(x, 20, weight, offset, cap=cap, together=together, **begun)
        twin = expand(x, 20, weight, offset, cap=cap, together=together, implementation="naive", **begun)
        assert picks.sort().values.diff(dim=1).min() > 0
        if begun:
            assert picks[1, :4].tolist() == start[1, :4].tolist()
        unit = F.normalize(x.double(), dim=-1)
        for u in range(2):
            for first in range(int(sizes[u]) if begun else 0, 20, together):
                row, seen = picks[u].tolist(), picks[u, :first]
                near = (unit[u] @ unit[u, seen].T).amax(1) if first else torch.full((50,), -9.0)
                worth = weight[u] * (1 - near).clamp_max(cap) + offset[u]
                worth[seen] = -1
                best = worth.sort(descending=True).values[: len(row[first : first + together])]
                assert (worth[row[first : first + together]] - best).abs().max() < MARGIN
        assert kind in ("twins", "equal", "zeros", "line") or torch.equal(picks, twin)


# ---------------------------------------------------------------------- Triton: in its interpreter where there is no GPU
CASES = [  # kind, visuals, tokens, D, picks, type, side of a tile, tokens of a program
    ("random", 1, 1, 1, 1, torch.float32, 16, 16),
    ("random", 2, 5, 17, 5, torch.float32, 16, 16),
    ("together", 1, 40, 40, 6, torch.float16, 16, 16),
    ("clusters", 2, 21, 128, 5, torch.bfloat16, 16, 16),
    ("twins", 1, 33, 17, 6, torch.float32, 32, 32),
    ("zeros", 1, 18, 40, 7, torch.bfloat16, 16, 16),
    ("equal", 1, 19, 4, 4, torch.float32, 16, 16),
    ("line", 1, 12, 17, 5, torch.float16, 16, 16),
    ("random", 1, 50, 1, 4, torch.float32, 32, 16),
]


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize(("kind", "u", "n", "d", "k", "dtype", "side", "block"), CASES)
def test_triton(
    kind: str, u: int, n: int, d: int, k: int, dtype: torch.dtype, side: int, block: int, held: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With the table and without it; what is not written is NaN."""
    triton = pytest.importorskip("mmcompress.kernels.diverse.triton")
    from mmcompress.kernels.diverse import cosines

    size = {"side": side, "depth": 16, "reach": 16, "num_warps": 4, "num_stages": 2, "pick_warps": 4}
    monkeypatch.setattr(cosines, "config", lambda *_: {**size, "tokens": block, "held_tokens": block})
    monkeypatch.setattr(triton, "TABLE", 4096 if held else 0)
    x = tokens(kind, u, n, 2 * d, seed=n).to(dtype)[..., ::2]
    g = torch.Generator().manual_seed(n)
    weight = torch.rand(u, n, generator=g) if n % 2 else None
    log_quality = torch.rand(u, n, generator=g).log()
    first = torch.randint(n, (u,), generator=g) if n % 3 else None
    with poisoned():
        mine, begun = (None if y is None else y.to(DEVICE) for y in (weight, first))
        picks, near = max_min(x.to(DEVICE), k, mine, first=begun, implementation="triton"), None
        if n % 4:
            picks, near = max_min(x.to(DEVICE), k, mine, first=begun, nearest=True, implementation="triton")
        order = greedy_map(x.to(DEVICE), log_quality.to(DEVICE), k, implementation="triton").cpu()
    values = [distances(x[i], *(None if y is None else y[i] for y in (weight, first))) for i in range(u)]
    check(picks.cpu(), max_min(x, k, weight, first=first, implementation="naive"), values)
    if near is not None:
        check_nearest(near.cpu(), picks.cpu(), x)
    twin = greedy_map(x, log_quality, k, implementation="naive")
    check(order, twin, [determinants(x[i], log_quality[i]) for i in range(u)])


WAYS = ["naive", "table", "lazy", "blocked", "held", "together", "several"]


def by(way: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The implementation of which `way` is a part, set up so that it takes it."""
    if way in ("table", "lazy"):
        monkeypatch.setattr(lazy, "FEW", 4096 if way == "table" else 0)
        monkeypatch.setattr(lazy, "POOL", 8)
        return "auto"
    if way in ("naive", "blocked"):
        return way
    triton = pytest.importorskip("mmcompress.kernels.diverse.triton")
    monkeypatch.setattr(triton, "TABLE", 4096 if way == "held" else 0)
    if way == "several":
        monkeypatch.setattr(triton, "_processors", lambda device: 7)
        if DEVICE == "cpu":
            at_once(monkeypatch)
    return "triton"


def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs the programs of a launch side by side, and changes from one to another at every atomic operation."""
    from triton.runtime import interpreter

    builder, baton, plain = (
        interpreter.interpreter_builder,
        threading.Lock(),
        interpreter.InterpreterBuilder.create_atomic_rmw,
    )

    def pause(*arguments: Any) -> Any:
        at = builder.grid_idx
        baton.release()
        time.sleep(1e-4)
        baton.acquire()
        builder.grid_idx = at
        return plain(builder, *arguments)

    def launch(self: Any, *arguments: Any, **options: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        given = inspect.getcallargs(self.fn, *arguments, **{k: v for k, v in options.items() if k in names})
        given = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in given.items()}
        grid, errors = (*self.grid, 1, 1)[:3], []
        scope = interpreter._patch_lang(self.fn)
        builder.set_grid_dim(*grid)

        def program(*at: int) -> None:
            with baton:
                builder.set_grid_idx(*at)
                try:
                    self.fn(**given)
                except Exception as error:
                    errors.append(error)

        threads = [threading.Thread(target=program, args=at) for at in product(*map(range, grid))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        scope.restore()
        assert not errors, errors

    monkeypatch.setattr(builder, "create_atomic_rmw", pause)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)


@pytest.mark.parametrize("way", WAYS)
def test_the_nearest_of_equals_is_the_lowest(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all cosines are exact: picks of the naive twin, and the anchors that a search for the best match finds."""
    implementation = by(way, monkeypatch)
    if implementation == "triton":
        from mmcompress.kernels.diverse import cosines

        size = {"side": 16, "depth": 16, "reach": 16, "num_warps": 4, "num_stages": 2, "pick_warps": 4, "tokens": 16}
        monkeypatch.setattr(cosines, "config", lambda *_: {**size, "held_tokens": 16})
    for seed, (n, k) in enumerate([(40, 7), (90, 30)] if implementation != "triton" else [(70, 6)]):
        x = exact(2, n, 4, seed)
        first, weight = torch.tensor([n - 1, 3]), torch.randint(1, 3, (2, n)) / 2
        for own in (None, weight):
            wanted = max_min(x, k, own, first=first, implementation="naive")
            own = None if own is None else own.to(DEVICE)
            with poisoned():
                picks, near = max_min(
                    x.to(DEVICE), k, own, first=first.to(DEVICE), nearest=True, implementation=implementation
                )
            assert torch.equal(picks.cpu(), wanted)
            slots = wanted.sort(1).values
            assert torch.equal(near.cpu(), slots.gather(1, nearest_cells(x, slots)[0]))


@pytest.mark.parametrize("way", ["naive", "lazy", "together", "several"])
def test_visuals_of_several_sizes(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed rows: what each visual gives alone; one without tokens, rows behind the last, more picks than are wanted."""
    implementation = by(way, monkeypatch)
    ends, picked = [0, 20, 20, 57, 60], [0, 5, 5, 12, 15]
    x, first = tokens("together", 1, 66, 24, seed=8)[0], torch.tensor([4, 0, 50, 57])
    for weight in (None, torch.rand(66)):
        lengths = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32), "cu_picks": torch.tensor(picked)}
        on = [None if t is None else t.to(DEVICE) for t in (x, weight, first, *lengths.values())]
        with poisoned():
            picks, near = (
                t.cpu()
                for t in max_min(
                    on[0], 16, on[1], first=on[2], nearest=True, cu_seqlens=on[3], cu_picks=on[4],
                    implementation=implementation,
                )
            )  # fmt: skip
        for u in (0, 2, 3):
            (a, b), (c, d) = ends[u : u + 2], picked[u : u + 2]
            alone, to = max_min(
                x[None, a:b],
                d - c,
                None if weight is None else weight[None, a:b],
                first=first[u : u + 1] - a,
                nearest=True,
            )
            assert torch.equal(picks[c:d], alone[0] + a) and torch.equal(near[a:b], to[0] + a)
        assert picks[15:].tolist() == [-1] and near[60:].tolist() == [-1] * 6
        assert torch.equal(max_min(x, 16, weight, first=first, **lengths), picks)


def test_sizes_that_cannot_be_are_named() -> None:
    x, ends = torch.randn(9, 4), torch.tensor([0, 4, 9])
    first = torch.tensor([0, 4])
    for message, wrong in {
        "come together": {"cu_seqlens": ends, "first": first},
        "give the row of": {"cu_seqlens": ends, "cu_picks": ends},
        "picks for 1": {"cu_seqlens": ends, "cu_picks": ends[:2], "first": first},
        "rows 4 to 9 begin with 3": {"cu_seqlens": ends, "cu_picks": ends, "first": torch.tensor([0, 3])},
        "have picks 0 to 5": {"cu_seqlens": ends, "cu_picks": torch.tensor([0, 5, 9]), "first": first},
    }.items():
        with pytest.raises(ValueError, match=message):
            max_min(x, 9, **wrong)
    with pytest.raises(ValueError, match=r"give floating-point \[total, D\]"):
        max_min(x[None], 9, first=first, cu_seqlens=ends, cu_picks=ends)


@contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def test_triton_takes_parts_of_a_large_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("mmcompress.kernels.diverse.triton")
    monkeypatch.setattr(triton, "_TOGETHER", 250)
    x, weight = tokens("random", 3, 9, 8).to(DEVICE), torch.rand(3, 9, device=DEVICE)
    assert torch.equal(max_min(x, 3, weight, implementation="triton"), max_min(x, 3, weight, implementation="naive"))
    zero = torch.zeros_like(weight)
    assert torch.equal(greedy_map(x, zero, 3, implementation="triton"), greedy_map(x, zero, 3, implementation="naive"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu_and_in_a_graph() -> None:
    x = tokens("together", 1, 2880, 256, seed=7)
    log_quality = torch.rand(1, 2880).log() / 8
    twins = max_min(x, 288, implementation="naive"), greedy_map(x, log_quality, 100, implementation="naive")
    on, quality = x.cuda(), log_quality.cuda()
    picks, order = in_a_graph(lambda: (max_min(on, 288), greedy_map(on, quality, 100)))
    check(picks.cpu(), twins[0], [distances(x[0], None)])
    check(order.cpu(), twins[1], [determinants(x[0], log_quality[0])])


# ---------------------------------------------------------------------- edges
@pytest.mark.parametrize("implementation", ["naive", "blocked", "triton"])
def test_ties_go_to_the_lower_index(implementation: str) -> None:
    x = torch.ones(1, 5, 4, device=DEVICE)
    assert max_min(x, 3, implementation=implementation).tolist() == [[0, 1, 2]]
    assert greedy_map(x, torch.zeros(1, 5, device=DEVICE), 3, implementation=implementation).tolist() == [[0, 1, 2]]
    assert max_min(torch.zeros_like(x), 4, implementation=implementation).tolist() == [[0, 1, 2, 3]]
    y = torch.eye(4, device=DEVICE)[None, [0, 0, 1, 1, 2, 2, 3, 3]]
    assert max_min(y, 8, implementation=implementation).tolist() == [[0, 2, 4, 6, 1, 3, 5, 7]]
    quality = torch.tensor([[0.1, 0.2, 0.3, 0.0, 0.0, 0.0, -9.0, 9.0]], device=DEVICE)
    assert greedy_map(y, quality, 8, implementation=implementation).tolist() == [[7, 2, 1, 4, 0, 3, 5, 6]]


@pytest.mark.parametrize("implementation", ["naive", "lazy", "blocked", "triton"])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_to_the_last_pick_beyond_the_rank(implementation: str, rank: int) -> None:
    """Directions at right angles, of lengths that are powers of two: all cosines are exact, and so is every pick."""
    g = torch.Generator().manual_seed(rank)
    n = 12 if implementation == "triton" else 40
    square = torch.ones(1, 1)
    for _ in range(4):
        square = torch.cat([torch.cat([square, square], 1), torch.cat([square, -square], 1)])
    way = torch.randint(rank, (n,), generator=g)
    x = (square[:rank][way] * 2.0 ** torch.randint(-2, 3, (n, 1), generator=g))[None].to(DEVICE)
    x[:, 5] = 0
    quality = torch.rand(1, n, generator=g)
    order = sorted(range(n), key=lambda i: -quality[0, i].item())
    new = [i for place, i in enumerate(order) if i != 5 and way[i] not in [way[j] for j in order[:place] if j != 5]]
    wanted = new + [i for i in order if i not in new]
    if implementation == "lazy":
        with sizes(4, 8):
            assert lazy.greedy_map(x, quality, n).tolist() == [wanted]
    elif implementation == "blocked":
        assert blocked.greedy_map(x, quality.to(DEVICE), n).tolist() == [wanted]
    else:
        assert greedy_map(x, quality.to(DEVICE), n, implementation=implementation).tolist() == [wanted]


@pytest.mark.parametrize("implementation", ["naive", "blocked", "triton"])
@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e30])
def test_extreme_lengths(implementation: str, scale: float) -> None:
    """Rows whose squares overflow or vanish count as zero; no NaN decides."""
    x = (tokens("random", 1, 9, 5) * scale).to(DEVICE)
    for picks in (max_min(x, 9, implementation=implementation), greedy_map(x, torch.zeros(1, 9, device=DEVICE), 9)):
        assert picks.sort().values.tolist() == [list(range(9))]
    if scale == 1e15:
        assert torch.equal(max_min(x, 4, implementation=implementation), max_min(x / scale, 4, implementation="naive"))


def test_weights_of_zero_and_the_first_pick() -> None:
    x = tokens("random", 1, 12, 6, seed=2)
    first = max_min(x, 1)
    for weight in (torch.zeros(1, 12), torch.eye(12)[None, 3]):
        for implementation in ("naive", "blocked"):
            picks = max_min(x, 12, weight, implementation=implementation)
            assert picks[:, :1].tolist() == first.tolist() and picks.sort().values.tolist() == [list(range(12))]
    assert max_min(x, 3, torch.ones(1, 12)).tolist() == max_min(x, 3).tolist()


def test_batched_equals_alone_and_inputs_stay() -> None:
    x = tokens("together", 3, 40, 24, seed=4).requires_grad_()
    before, quality = x.detach().clone(), torch.rand(3, 40).log()
    whole, order = max_min(x, 9), greedy_map(x, quality, 9)
    for i in range(3):
        assert torch.equal(max_min(x[i : i + 1], 9), whole[i : i + 1])
        assert torch.equal(greedy_map(x[i : i + 1], quality[i : i + 1], 9), order[i : i + 1])
    assert torch.equal(x, before) and not whole.requires_grad
    assert max_min(x[:0], 3).shape == greedy_map(x[:0], quality[:0], 3).shape == (0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(max_min(x, 9), whole) and torch.equal(greedy_map(x, quality, 9), order)


def test_seen_from_outside_nothing_waits_and_graphs_stay_whole() -> None:
    x, quality = tokens("random", 1, 30, 8), torch.rand(1, 30).log()
    with NoWaiting():
        max_min(x, 5), greedy_map(x, quality, 5)
    torch.library.opcheck(torch.ops.mmcompress.max_min.default, (x, None, None, None, None, 5, True, "blocked"))
    none, zero = torch.empty(1, 0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    torch.library.opcheck(torch.ops.mmcompress.expand.default, (x, quality, quality, none, zero, 2.0, 5, 1, "blocked"))
    torch.library.opcheck(torch.ops.mmcompress.greedy_map.default, (x, quality, 5, "blocked"))

    def both(x: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        return max_min(x * 2, 5), greedy_map(x * 2, quality, 5)

    compiled = torch.compile(both, fullgraph=True, backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x, quality), both(x, quality), strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: max_min(x, 0), "k=0: 6 tokens"),
        (lambda x: max_min(x, 7), "k=7: 6 tokens"),
        (lambda x: greedy_map(x, torch.zeros(1, 6), 7), "k=7: 6 tokens"),
        (lambda x: max_min(x[0], 2), r"\(6, 4\): give a floating-point tensor"),
        (lambda x: max_min(x.long(), 2), "torch.int64"),
        (lambda x: max_min(x, 2, torch.ones(1, 5)), r"weight is \(1, 5\)"),
        (lambda x: greedy_map(x, torch.ones(6), 2), r"log_quality is \(6,\)"),
        (lambda x: max_min(x, 2, first=torch.zeros(2).long()), r"first is torch.int64 \(2,\)"),
        (lambda x: max_min(x, 2, implementation="fast"), "implementation='fast'"),
        (lambda x: expand(x, 2, torch.ones(1, 5)), r"weight is \(1, 5\)"),
        (lambda x: expand(x, 2, torch.ones(1, 6), sizes=torch.ones(1)), "start and sizes"),
        (lambda x: expand(x, 2, torch.ones(1, 6), together=0), "together=0"),
        (lambda x: expand(x, 2, torch.ones(1, 6), implementation="triton"), "implementation='triton'"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(tokens("random", 1, 6, 4))


def test_spans_of_few_rows_become_one_product() -> None:
    """Each row is multiplied with every pick that it does not know, whatever else it is multiplied with."""
    assert lazy._together([(0, 4, 10), (4, 6, 12), (6, 300, 990)], 1000) == [(0, 6, 10), (6, 300, 990)]
    assert lazy._together([(0, 400, 0), (400, 410, 999)], 1000) == [(0, 400, 0), (400, 410, 999)]
    assert lazy._together([(0, 5, 7)], 9) == [(0, 5, 7)]


def test_of_equal_cosines_the_lowest_pick_leads() -> None:
    similar = np.array([[0.5, 0.7, 0.7], [0.9, 0.1, 0.9], [0.2, 0.3, 0.1]], np.float32)
    best, pick = lazy._leading(similar.copy(), np.array([8, 6, 4]))
    assert best.tolist() == similar.max(1).tolist() and pick.tolist() == [4, 4, 6]
