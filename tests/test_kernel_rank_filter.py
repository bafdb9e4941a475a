# SPDX-License-Identifier: Apache-2.0
"""`kernels.rank_filter`: every implementation against the definition, and the definition against loops over cells."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mmcompress.kernels import configs
from mmcompress.kernels.dispatch import has_triton, interpreted
from mmcompress.kernels.rank_filter import blocked, rank_filter
from torch import Tensor

from .watch import NoWaiting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not has_triton() or not (DEVICE == "cuda" or interpreted()),
    reason="Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported (tests/conftest.py)",
)
FAST = pytest.mark.parametrize("implementation", ["blocked", pytest.param("triton", marks=needs_triton)])


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Memory that is not written holds no numbers (torch.utils.deterministic.fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few cells to a program: the interpreter sorts one by one, those beyond the end too. No plain code for small maps."""
    monkeypatch.setattr(blocked, "FEW", 0)
    if DEVICE == "cpu":
        monkeypatch.setitem(configs.CONFIGS, "rank_filter", {"default": {"cells": 16, "num_warps": 4}})


def some_case(seed: int) -> tuple[Tensor, int, Tensor | None]:
    """Maps with copies, zeros and empty windows, the window, and which cells are there; the others are NaN, or like these."""
    torch.manual_seed(seed)
    r = random.Random(seed)
    shape = (*r.choice([(), (1,), (3,), (2, 2), (0,)]), r.choice([1, 2, 5, 9, 16]), r.choice([1, 2, 3, 7, 20]))
    maps = torch.rand(shape) * 10 ** r.uniform(-6, 6)
    if r.random() < 0.4:
        maps = torch.randint(0, 4, shape).float()
    if r.random() < 0.5:
        maps = maps.where(torch.rand(shape) < 0.3, 0)
    maps = maps.to(r.choice([torch.float32, torch.float32, torch.bfloat16]))
    valid = None
    if r.random() < 0.6:
        valid = torch.rand(r.choice([shape, shape[-2:]])) < r.choice([0.1, 0.5, 0.9])
        maps = maps.masked_fill(~valid, math.nan) if seed % 2 else maps
    if r.random() < 0.3:
        maps = maps.transpose(-1, -2).contiguous().transpose(-1, -2)
    return maps, r.choice([1, 3, 3, 3, 5]), valid


def run(implementation: str, maps: Tensor, kernel: int = 3, valid: Tensor | None = None) -> Tensor:
    valid = None if valid is None else valid.to(DEVICE)
    return rank_filter(maps.to(DEVICE), kernel, valid, implementation=implementation).cpu()


def bounce(place: int, length: int) -> int:
    """Place on an axis that is continued by reflection."""
    while not 0 <= place < length:
        place = 0 if length == 1 else -place if place < 0 else 2 * length - 2 - place
    return place


def filtered(window: list[float]) -> float:
    """What becomes of the values of a window."""
    m, mean = len(window), statistics.fmean(window or [0.0])
    if mean <= 0:
        return 0.0
    sigma = statistics.pstdev(window) / mean
    if sigma < 1e-6:
        return statistics.median(window)
    gauss = [math.exp(-((i - (m - 1) / 2) ** 2 - 0.25 * (m % 2 == 0)) / (2 * sigma**2)) for i in range(m)]
    return sum(g * v for g, v in zip(gauss, sorted(window), strict=True)) / sum(gauss)


def test_the_definition_equals_loops_over_cells() -> None:
    for seed in range(60):
        maps, kernel, valid = some_case(seed)
        found = run("naive", maps, kernel, valid)
        assert found.shape == maps.shape and found.dtype == torch.float32
        height, width = maps.shape[-2:]
        flat, out = maps.float().reshape(-1, height, width), found.reshape(-1, height, width)
        there = (
            torch.ones_like(flat, dtype=torch.bool) if valid is None else valid.expand(maps.shape).reshape(flat.shape)
        )
        for b in range(min(2, len(flat))):
            for y, x in itertools.product(range(height), range(width)):
                reach = range(-(kernel // 2), kernel // 2 + 1)
                cells = [(bounce(y + i, height), bounce(x + j, width)) for i in reach for j in reach]
                window = [float(flat[b, i, j]) for i, j in cells if there[b, i, j]]
                assert float(out[b, y, x]) == pytest.approx(filtered(window), rel=1e-5, abs=1e-12), (seed, y, x)


@pytest.mark.parametrize("cells", [None, 1, 30])
def test_blocked_equals_the_definition(cells: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "CELLS", cells or blocked.CELLS)
    for seed in range(150 if cells is None else 40):
        check(seed, "blocked")


@needs_triton
def test_triton_equals_the_definition() -> None:
    for seed in range(8):
        check(seed, "triton")


def check(seed: int, implementation: str) -> None:
    maps, kernel, valid = some_case(seed)
    wanted, found = (run(i, maps, kernel, valid) for i in ("naive", implementation))
    assert found.dtype == torch.float32 and torch.allclose(found, wanted, rtol=1e-5, atol=1e-12), seed


def test_the_network_sorts() -> None:
    """By the 0-1 principle it does if it sorts all rows of zeros and ones."""
    for n in (1, 2, 9):
        x = [list(row) for row in itertools.product([0, 1], repeat=n)]
        for row in x:
            for i, j in blocked.network(n):
                row[i], row[j] = min(row[i], row[j]), max(row[i], row[j])
            assert row == sorted(row)
    for n in (25, 49):
        x = torch.rand(500, n, generator=torch.Generator().manual_seed(0))
        y = list(x.T)
        for i, j in blocked.network(n):
            y[i], y[j] = torch.minimum(y[i], y[j]), torch.maximum(y[i], y[j])
        assert torch.equal(torch.stack(y, 1), x.sort(1).values)


@FAST
def test_edges(implementation: str) -> None:
    constant = torch.full((2, 4, 5), 0.3)
    assert torch.allclose(run(implementation, constant), constant, rtol=1e-6)
    assert not run(implementation, torch.zeros(4, 4)).any() and not run(implementation, -constant).any()
    one = torch.zeros(5, 5)
    one[2, 2] = 1
    found = run(implementation, one)
    assert found[2, 2].item() == pytest.approx(0.0578, abs=1e-3) and found[0].sum() == 0  # the card's figure
    assert torch.equal(run(implementation, constant, 1), constant)
    for size in (1e-42, 1e-30, 1e37):  # too small to divide by, and as large as sums stand
        x = size * torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0))
        assert run(implementation, x).isfinite().all(), size
    nothing = torch.zeros(4, 4, dtype=torch.bool)
    assert not run(implementation, torch.full((2, 4, 4), math.nan), 3, nothing).any()
    lonely = nothing.clone()
    lonely[0, 0] = True
    found = run(implementation, torch.full((4, 4), math.nan).where(~lonely, 2.0), 3, lonely)
    assert found[:2, :2].tolist() == [[2, 2], [2, 2]] and not found[2:].any() and not found[:, 2:].any()
    assert run(implementation, torch.ones(0, 3, 3)).shape == (0, 3, 3)


def test_batches_equal_their_members_and_all_valid_is_no_mask() -> None:
    maps = torch.rand(3, 2, 9, 70, generator=torch.Generator().manual_seed(0))
    found = rank_filter(maps)
    for i, j in itertools.product(range(3), range(2)):
        assert torch.allclose(rank_filter(maps[i, j]), found[i, j], rtol=1e-6)  # ends of a loop may round otherwise
    assert torch.allclose(rank_filter(maps, valid=torch.ones(9, 70, dtype=torch.bool)), found, rtol=1e-6)


def test_nothing_waits_and_nothing_learns() -> None:
    maps = torch.rand(2, 6, 6, requires_grad=True)
    with NoWaiting():
        found = rank_filter(maps, valid=torch.ones(6, 6, dtype=torch.bool))
    assert not found.requires_grad


@FAST
def test_the_operator(implementation: str) -> None:
    maps, valid = torch.rand(1, 3, 4).to(DEVICE), torch.ones(1, 3, 4, dtype=torch.bool, device=DEVICE)
    tests = ("test_schema", "test_faketensor")
    for mask in (None, valid):
        torch.library.opcheck(torch.ops.mmcompress.rank_filter, (maps, 3, mask, implementation), test_utils=tests)

    def both(x: Tensor) -> Tensor:
        return rank_filter(x, implementation=implementation) + rank_filter(x.mT, implementation=implementation).mT

    assert torch.equal(torch.compile(both, fullgraph=True, backend="eager")(maps), both(maps))


def test_wrong_options_are_named() -> None:
    x = torch.ones(2, 4, 5)
    wrong: list[tuple[str, Any]] = [
        ("kernel=4", lambda: rank_filter(x, 4)),
        ("kernel=-1", lambda: rank_filter(x, -1)),
        ("floating", lambda: rank_filter(x.long())),
        (r"\(5,\)", lambda: rank_filter(x[0, 0])),
        ("valid of shape", lambda: rank_filter(x, valid=torch.ones(5, 4, dtype=torch.bool))),
        ("torch.float32 on", lambda: rank_filter(x, valid=x)),
        ("implementation='fast'", lambda: rank_filter(x, implementation="fast")),
    ]
    for message, call in wrong:
        with pytest.raises(ValueError, match=message):
            call()
