# SPDX-License-Identifier: Apache-2.0
"""`kernels.density`: every implementation against the definition, and the definition against loops over tokens."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from mmcompress.kernels import configs, density
from mmcompress.kernels.density import blocked, small
from mmcompress.kernels.dispatch import has_triton, interpreted
from torch import Tensor

from .watch import NoWaiting, spoiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not has_triton() or not (DEVICE == "cuda" or interpreted()),
    reason="Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported (tests/conftest.py)",
)
TRITON = pytest.param("triton", marks=needs_triton)
FAST = pytest.mark.parametrize("implementation", ["blocked", "few", TRITON])
"""few: "blocked" as it does few tokens on the CPU; else these tests are too small to see the rest of it."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks also for the small cases that the interpreter can do, and none so few that the whole is done at once."""
    monkeypatch.setattr(small, "CELLS", 0)
    if DEVICE == "cpu":
        monkeypatch.setitem(configs.CONFIGS, "density", {"default": {"rows": 16, "columns": 32}})


def some_case(seed: int, small: bool) -> tuple[Tensor, int, dict[str, Any]]:
    """Tokens, k, and options. Two of three are small whole numbers, whose squares add up exactly; others are real, with copies."""
    torch.manual_seed(seed)
    r = random.Random(seed)
    batch, n = r.choice([1, 1, 2, 5]), r.choice([1, 2, 7, 40, 60] if small else [1, 2, 7, 40, 100, 300])
    width, dtype = r.choice([1, 3, 17, 40, 128]), r.choice([torch.float32, torch.float16, torch.bfloat16])
    if seed % 3:
        size = r.choice([1, 8])
        x = torch.randint(-size, size + 1, (batch, n, width))
    else:
        x = torch.randn(batch, n, width) * 10 ** r.uniform(-2, 2)
        x = x[:, torch.randint(0, max(1, n // 2), (n,))]
    x, options = x.to(dtype), {}
    if r.random() < 0.4:
        options["mask"] = torch.rand(batch, n) < 0.7
        x = spoiled(x, ~options["mask"], seed % 2 == 0)
    if batch == 1 and r.random() < 0.6:
        options["cu_seqlens"] = some_segments(r, n)
        options |= {"mask": options["mask"][0]} if "mask" in options else {}
        x = x[0]
    return x, r.randint(1, 12), options


def some_segments(r: random.Random, rows: int, parts: int | None = None) -> Tensor:
    ends = sorted(r.randint(0, rows) for _ in range(parts or r.randint(1, 4)))
    return torch.tensor([0, *ends], dtype=r.choice([torch.int32, torch.int64]))


def run(function: Any, implementation: str, *tensors: Any, **options: Any) -> tuple[Tensor, Tensor]:
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    given = (x.to(DEVICE) if isinstance(x, Tensor) else x for x in tensors)
    with pytest.MonkeyPatch.context() as patch:
        if implementation == "few":
            patch.setattr(small, "CELLS", 1 << 16)
            patch.setattr(small, "_NUMBERS", 1 << 14)
            implementation = "blocked"
        first, second = function(*given, implementation=implementation, **options)
    return first.cpu(), second.cpu()


def test_the_definition_equals_loops_over_tokens() -> None:
    for seed in range(12):
        torch.manual_seed(seed)
        n, width, k = 2 + seed, 1 + seed % 3, 1 + seed % 4
        x = torch.randint(-2, 3, (n, width))
        far = [[sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) / width for b in x.tolist()] for a in x.tolist()]
        near = [sorted(row)[:k] for row in far]
        spread = [math.fsum(row) / len(row) for row in near]
        exact = [sum(round(d * width) for d in row) for row in near]
        gap = []
        for i in range(n):
            denser = [far[i][j] for j in range(n) if (exact[j], j) < (exact[i], i)]
            gap.append(math.sqrt(min(denser) if denser else max(map(max, far))))
        found = density.density_peaks(x[None].float(), k, implementation="naive")
        assert torch.allclose(found[0][0], torch.tensor(spread)) and torch.allclose(found[1][0], torch.tensor(gap))


@pytest.mark.parametrize("elements", [None, 1 << 13, 1 << 11])
def test_blocked_equals_the_definition(elements: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "ELEMENTS", elements or blocked.ELEMENTS)
    for seed in range(50):
        check(seed, "blocked")


def test_few_tokens_equal_the_definition() -> None:
    for seed in range(50):
        check(seed, "few")


@pytest.mark.parametrize("elements", [None, 1 << 11])
@FAST
def test_clusters_are_those_of_peaks_and_nearest(
    implementation: str, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where densities, gaps and distances are equal."""
    monkeypatch.setattr(blocked, "ELEMENTS", elements or blocked.ELEMENTS)
    for seed in range(20 if implementation != "triton" else 2):
        torch.manual_seed(seed)
        r = random.Random(seed)
        batch, n, width = r.choice([0, 1, 3]), r.choice([1, 7, 60, 130]), r.choice([1, 3, 40])
        x = torch.randint(-2, 3, (batch, n, width)).to(r.choice([torch.float32, torch.bfloat16]))
        if seed % 2:
            x = x + torch.randn(1, n, width)
        count, k = r.randint(1, n), r.randint(1, 12)
        wanted = run(density.clusters, "naive", x, count, k)
        found = run(density.clusters, implementation, x, count, k)
        assert torch.equal(wanted[0], found[0]) and torch.equal(wanted[1], found[1]), seed
        assert wanted[0].shape == (batch, count) and (wanted[1] < count).all()


@needs_triton
@pytest.mark.parametrize("elements", [None, 1 << 11])
def test_triton_equals_the_definition(elements: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcompress.kernels.density import triton

    monkeypatch.setattr(triton, "ELEMENTS", elements or triton.ELEMENTS)
    for seed in range(7):
        check(seed, "triton")


def check(seed: int, implementation: str) -> None:
    x, k, options = some_case(seed, implementation == "triton")
    wanted = run(density.density_peaks, "naive", x, k, **options)
    found = run(density.density_peaks, implementation, x, k, **options)
    # sums of float32 lose digits, and copies of a token have a spread of 0 all the same
    for one, other in zip(wanted, found, strict=True):
        rounding = 1e-5 if implementation == "triton" and not seed % 3 else 2e-6
        assert torch.allclose(one, other, rtol=rounding, atol=0), (seed, options)
    assert not found[0].isnan().any() and found[1].isfinite().all()
    if "mask" in options:
        assert (found[0][~options["mask"]] == math.inf).all() and (found[1][~options["mask"]] == 0).all()


@pytest.mark.parametrize("elements", [None, 1 << 15])
@pytest.mark.parametrize(("n", "k"), [(600, 2), (1000, 2), (1024, 2), (800, 3)])
def test_the_nearest_of_many_are_found_by_groups(
    n: int, k: int, elements: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 8 k groups of columns on, whether the nearest lie in one of them or in several."""
    columns = blocked.round_up(n, blocked.COLUMNS)
    assert columns >= 8 * k * blocked.group_width(columns)
    monkeypatch.setattr(blocked, "ELEMENTS", elements or blocked.ELEMENTS)
    torch.manual_seed(n)
    x = torch.randint(-40, 41, (1, n, 3)).float()
    x[:, : n // 2] = x[:, : n // 2].sort(1).values  # neighbours lie beside each other
    for mask in (None, torch.rand(1, n) < 0.9):
        given = x if mask is None else spoiled(x, ~mask, True)
        wanted, found = (run(density.density_peaks, i, given, k, mask=mask) for i in ("naive", "blocked"))
        assert torch.allclose(wanted[0], found[0], rtol=2e-6, atol=0) and torch.allclose(wanted[1], found[1], rtol=2e-6)
        assert wanted[0][torch.isfinite(wanted[0])].unique().numel() > 5


@FAST
def test_the_nearest_centre(implementation: str) -> None:
    for seed in range(8 if implementation == "triton" else 30):
        torch.manual_seed(seed)
        r = random.Random(seed)
        batch, n, m, width = r.choice([1, 3]), r.choice([1, 7, 60]), r.choice([1, 3, 17, 40]), r.choice([1, 3, 40])
        x, y = (torch.randint(-2, 3, (batch, count, width)).float() for count in (n, m))
        options: dict[str, Any] = {}
        if r.random() < 0.5:
            options["mask"] = torch.rand(batch, m) < 0.6
            y = spoiled(y, ~options["mask"], seed % 2 == 0)
        if batch == 1 and r.random() < 0.6:
            options |= {name: some_segments(r, size, 3) for name, size in (("cu_seqlens_x", n), ("cu_seqlens_y", m))}
            options |= {"mask": options["mask"][0]} if "mask" in options else {}
            x, y = x[0], y[0]
        wanted = run(density.nearest, "naive", x, y, **options)
        found = run(density.nearest, implementation, x, y, **options)
        assert torch.equal(wanted[1], found[1]) and torch.allclose(wanted[0], found[0], rtol=1e-6), seed
    near = run(density.nearest, implementation, torch.ones(1, 2, 3), torch.tensor([[[0.0] * 3, [1.0] * 3, [1.0] * 3]]))
    assert near[1].tolist() == [[1, 1]] and near[0].tolist() == [[0, 0]]


@FAST
def test_copies_make_one_peak(implementation: str) -> None:
    """Also where they are far from the origin, as hidden states are that share a large part."""
    heaps = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    x = torch.cat([heaps, heaps, heaps, heaps])[None] + 1000
    spread, gap = run(density.density_peaks, implementation, x, 4)
    assert (spread == 0).all() and (gap[0, 3:] == 0).all() and (gap[0, :3] > 0.5).all()
    same = run(density.density_peaks, implementation, torch.full((1, 20, 17), 0.1), 5)
    assert not same[0].any() and not same[1].any()


@FAST
def test_small_distances_beside_large_norms(implementation: str) -> None:
    x = 300 + 1e-3 * torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0))
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").square() / 64
    spread, _ = run(density.density_peaks, implementation, x, 3)
    assert torch.allclose(spread.double(), exact.sort(2).values[..., :3].mean(2), rtol=1e-5, atol=0)


@FAST
def test_edges(implementation: str) -> None:
    assert run(density.density_peaks, implementation, torch.ones(2, 0, 3), 2)[0].shape == (2, 0)
    assert [x.shape for x in run(density.clusters, implementation, torch.ones(2, 0, 3), 2, 2)] == [(2, 0), (2, 0)]
    spread, gap = run(density.density_peaks, implementation, torch.ones(1, 1, 3), 9)
    assert spread.tolist() == [[0]] and gap.tolist() == [[0]]
    huge = torch.tensor([[[3e38, -3e38], [-3e38, 3e38], [0, 0]]])
    for x in run(density.density_peaks, implementation, huge, 1):
        assert x.isfinite().all()
    distance, index = run(density.nearest, implementation, torch.ones(1, 2, 3), torch.ones(1, 0, 3))
    assert distance.tolist() == [[math.inf, math.inf]] and index.tolist() == [[-1, -1]]
    nobody = torch.zeros(1, 4, dtype=torch.bool)
    spread, gap = run(density.density_peaks, implementation, torch.full((1, 4, 2), math.nan), 2, mask=nobody)
    assert (spread == math.inf).all() and (gap == 0).all()
    ends = torch.tensor([0, 2, 2, 5])
    packed = run(
        density.density_peaks, implementation, torch.arange(7.0)[:, None] ** 2, 2, cu_seqlens=ends, max_seqlen=4
    )
    assert packed[1].tolist() == [1, 1, 12, 5, 7, 0, 0] and packed[0][5:].tolist() == [math.inf, math.inf]


def test_batches_equal_their_members() -> None:
    x = torch.randn(5, 70, 33, generator=torch.Generator().manual_seed(0))
    spread, gap = density.density_peaks(x, 5)
    for i in range(5):
        alone = density.density_peaks(x[i : i + 1], 5)
        assert torch.equal(alone[0][0], spread[i]) and torch.equal(alone[1][0], gap[i])


@pytest.mark.parametrize("cells", [0, 1 << 16])
def test_nothing_waits_and_nothing_learns(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "CELLS", cells)
    x = torch.randn(2, 30, 8, requires_grad=True)
    with NoWaiting():
        spread, _ = density.density_peaks(x, 4, mask=torch.ones(2, 30, dtype=torch.bool))
        density.nearest(x, x[:, :5])
    assert not spread.requires_grad


@pytest.mark.parametrize("implementation", ["blocked", TRITON])
def test_it_can_be_compiled(implementation: str) -> None:
    def gaps(x: Tensor) -> Tensor:
        near = density.nearest(x, x[:, :3], implementation=implementation)[0]
        return density.density_peaks(x, 3, implementation=implementation)[1] + near

    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(torch.compile(gaps, fullgraph=True, backend="eager")(x), gaps(x))
    ops, checks = torch.ops.mmcompress, ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.density_peaks.default, (x, 3, None, None, None, implementation), test_utils=checks)
    torch.library.opcheck(ops.nearest.default, (x, x, None, None, None, None, implementation), test_utils=checks)


def test_wrong_options_are_named() -> None:
    x = torch.ones(1, 4, 3)
    for k in (0, 1.5):
        with pytest.raises(ValueError, match="k="):
            density.density_peaks(x, k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask is"):
        density.density_peaks(x, 1, mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match=r"cu_seqlens=.* rising"):
        density.density_peaks(x[0], 1, cu_seqlens=torch.tensor([0, 3, 2]))
    for wrong in (x[0], x.long()):
        with pytest.raises(ValueError, match="floating-point"):
            density.density_peaks(wrong, 1)
    with pytest.raises(ValueError, match="give"):
        density.nearest(x, torch.ones(1, 4, 2))
    ends = torch.tensor([0, 4])
    with pytest.raises(ValueError, match="segments"):
        density.nearest(x[0], x[0], cu_seqlens_x=ends, cu_seqlens_y=torch.tensor([0, 2, 4]))
