# SPDX-License-Identifier: Apache-2.0
"""Kernels of coverage: tables are those of the naive twin but for rounding; of one table all make exactly its picks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcompress.kernels.coverage import blocked, lazy, max_coverage, naive, soft_coverage
from torch import Tensor

from .test_kernel_diverse import DEVICE, poisoned
from .watch import NoWaiting, in_a_graph

KINDS = ["random", "coarse", "twins", "shuffled", "zeros", "equal"]
ALL = ["naive", "blocked", "triton"]


def some_table(kind: str, u: int, r: int, n: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    table = torch.rand(u, r, n, generator=g)
    if kind == "coarse":  # few values: many gains are equal
        table = (4 * table).round() / 4
    if kind == "twins":
        table = table[..., torch.randint(n, (n,), generator=g)]
    if kind == "shuffled" and r:  # gains that are the same sum in another order, equal but for rounding
        table = torch.stack([table[:, torch.randperm(r, generator=g), 0] for _ in range(n)], -1)
    if kind == "zeros":
        table[..., torch.rand(n, generator=g) < 0.5] = 0
    if kind == "equal":
        table = torch.full_like(table, 1 / 3 / max(1, r))
    return table


# ---------------------------------------------------------------------- picks
@given(st.data())
@settings(deadline=None, max_examples=100)
def test_picks_on_the_cpu(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 70))
    k = data.draw(st.one_of(st.integers(1, n), st.sampled_from([1, n])))
    u, r = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([0, 1, 3, 40, 255, 256, 257, 600]))
    table = some_table(data.draw(st.sampled_from(KINDS)), u, r, n, data.draw(st.integers(0, 10**6)))
    table = table.to(data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))
    last = torch.rand(u, n) < data.draw(st.sampled_from([0.3, 1.0])) if data.draw(st.booleans()) else None
    weight = torch.rand(u, n).where(torch.rand(u, n) < 0.8, 0) if data.draw(st.booleans()) else None
    twin = max_coverage(table, k, last, weight, implementation="naive")
    assert [sorted(row) for row in twin.tolist()] == [sorted(set(row)) for row in twin.tolist()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy, "SMALL", data.draw(st.sampled_from([0, 1 << 16])))
        patch.setattr(lazy, "POOL", data.draw(st.sampled_from([1, 3, 128])))
        patch.setattr(lazy, "BATCH", data.draw(st.sampled_from([1, 2, 16])))
        assert torch.equal(max_coverage(table, k, last, weight), twin)
    wide = table if table.dtype == torch.float64 else table.float()
    with NoWaiting():
        there = blocked.max_coverage(wide, k, last, None if weight is None else weight.to(wide))
    assert torch.equal(there, twin)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_definition(weighted: bool) -> None:
    """The naive twin against sums in float64, pick by pick."""
    table = some_table("random", 1, 90, 40, seed=3)
    weight = torch.rand(1, 40) + 0.1 if weighted else torch.ones(1, 40)
    picks = max_coverage(table, 40, None, weight if weighted else None, implementation="naive")[0].tolist()
    best = torch.zeros(90, dtype=torch.float64)
    for step, pick in enumerate(picks):
        gain = ((table[0].double() - best[:, None]).clamp_min(0).sum(0) * weight[0]).index_fill(
            0, torch.tensor(picks[:step]).long(), -1
        )
        assert gain.max() - gain[pick] < 1e-5
        best = torch.maximum(best, table[0, :, pick].double())


def test_many_pools() -> None:
    for kind in ("random", "coarse", "shuffled"):
        table = some_table(kind, 1, 300, 900, seed=2)
        assert torch.equal(max_coverage(table, 90), max_coverage(table, 90, implementation="naive")), kind


@pytest.mark.parametrize(
    ("implementation", "n"), [(i, n) for i in ALL for n in (1, 5, 33, 40, 65, 100) if i != "triton" or n in (1, 33, 40)]
)
def test_equal_columns_are_taken_in_their_order(implementation: str, n: int) -> None:
    """Wherever they stand: library sums round the last columns differently."""
    column = torch.rand(1, n + 7, 1, generator=torch.Generator().manual_seed(n)).to(DEVICE)
    table = column.expand(-1, -1, n).contiguous()
    k = min(n, 3)
    assert max_coverage(table, k, implementation=implementation).tolist() == [list(range(k))]
    zero = torch.zeros(1, n, 8, device=DEVICE)
    table = soft_coverage(zero, zero, 0.2, implementation=implementation)
    assert max_coverage(table, k, implementation=implementation).tolist() == [list(range(k))]


def test_gains_are_the_same_to_the_last_bit() -> None:
    g = torch.Generator().manual_seed(0)
    for r in (1, 255, 256, 257, 513, 900):
        table, best = torch.rand(1, r, 37, generator=g), torch.rand(1, r, generator=g) / 2
        columns = torch.zeros(37, -(-r // naive.LANES) * naive.LANES)
        columns[:, :r] = (table[0].T - best).relu()
        assert lazy._add_up(columns.numpy()).tolist() == blocked.gains(table, best)[0].tolist()


def test_few_gains_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    done, add_up = 0, lazy._add_up

    def counting(x: Any) -> Any:
        nonlocal done
        done += len(x)
        return add_up(x)

    monkeypatch.setattr(lazy, "_add_up", counting)
    tokens = torch.randn(1, 1500, 24, generator=torch.Generator().manual_seed(0))
    table = soft_coverage(tokens, tokens, 0.2)
    lazy.max_coverage(table, 150, None)
    assert 1500 < done < 150 * 1500 / 10


# ---------------------------------------------------------------------- tables
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("u", "r", "n", "c"), [(1, 1, 1, 1), (2, 0, 3, 4), (2, 5, 33, 17), (1, 40, 7, 128), (1, 20, 50, 40)]
)
def test_tables(u: int, r: int, n: int, c: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets and tokens of their own, and tokens as their targets; strided; some of length zero."""
    g = torch.Generator().manual_seed(n)
    tokens, targets = (torch.randn(u, m, 2 * c, generator=g).to(dtype)[..., ::2].to(DEVICE) for m in (n, r))
    tokens[:, ::3] = 0
    monkeypatch.setattr(blocked, "BLOCK", {"cpu": 3 * n})
    monkeypatch.setattr(blocked, "_SIDE", 4)
    for own in (targets, tokens, targets.float()):
        twin = soft_coverage(own, tokens, 0.2, implementation="naive")
        assert twin.shape == (u, own.shape[1], n) and twin.dtype == torch.float32
        assert torch.allclose(twin.sum((1, 2)), torch.tensor(1.0 if own.shape[1] else 0.0), atol=1e-5)
        for implementation in ("blocked", "triton"):
            with poisoned():
                table = soft_coverage(own, tokens, 0.2, implementation=implementation)
            assert torch.allclose(table, twin, rtol=1e-4 if implementation == "triton" else 1e-5, atol=1e-8)


@pytest.mark.parametrize("implementation", ALL)
@pytest.mark.parametrize("scale", [1e-30, 1e15, 1e30])
def test_extreme_lengths(implementation: str, scale: float) -> None:
    x = torch.randn(1, 9, 5, device=DEVICE)
    table = soft_coverage(x * scale, x * scale, 0.02, implementation=implementation)
    assert table.isfinite().all()
    assert torch.allclose(table, soft_coverage(x if scale == 1e15 else 0 * x, x, 0.02), atol=1e-5) or scale == 1e30


# ---------------------------------------------------------------------- Triton: in its interpreter where there is no GPU
@pytest.mark.parametrize(
    ("kind", "u", "r", "n", "k"),
    [
        ("random", 2, 1, 1, 1), ("random", 1, 0, 4, 4), ("coarse", 2, 257, 21, 6), ("twins", 1, 600, 50, 5),
        ("shuffled", 1, 300, 40, 6), ("zeros", 1, 40, 12, 12), ("equal", 1, 33, 33, 4),
    ],
)  # fmt: skip
def test_triton_makes_exactly_the_picks_of_the_twin(kind: str, u: int, r: int, n: int, k: int) -> None:
    table = some_table(kind, u, r, n, seed=n).transpose(1, 2).contiguous().transpose(1, 2)
    last = torch.rand(u, n, generator=torch.Generator().manual_seed(n)) < 0.3 if n % 2 else None
    weight = torch.rand(u, n, generator=torch.Generator().manual_seed(k)) if n % 3 else None
    with poisoned():
        given = [None if x is None else x.to(DEVICE) for x in (last, weight)]
        picks = max_coverage(table.to(DEVICE), k, *given, implementation="triton")
    assert torch.equal(picks.cpu(), max_coverage(table, k, last, weight, implementation="naive"))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_on_a_gpu_and_in_a_graph() -> None:
    x = torch.randn(1, 2880, 256, device=DEVICE)

    def both() -> tuple[Tensor, Tensor]:
        table = soft_coverage(x, x, 0.2)
        return table, max_coverage(table, 288)

    table, picks = in_a_graph(both)
    assert torch.allclose(table, soft_coverage(x, x, 0.2, implementation="naive"), rtol=1e-4)
    assert torch.equal(picks.cpu(), max_coverage(table.cpu(), 288, implementation="naive"))


# ---------------------------------------------------------------------- edges
def test_what_comes_last() -> None:
    table = some_table("random", 1, 20, 6, seed=1)
    last = torch.tensor([[True, False, True, False, False, True]])
    for implementation in ALL:
        picks = max_coverage(table.to(DEVICE), 6, last.to(DEVICE), implementation=implementation)[0].tolist()
        assert sorted(picks[:3]) == [1, 3, 4] and picks[3:] == [0, 2, 5]
    assert max_coverage(table, 6, ~torch.zeros_like(last)).tolist() == [list(range(6))]


def test_batched_equals_alone_and_inputs_stay() -> None:
    x = torch.randn(3, 40, 24, generator=torch.Generator().manual_seed(4)).requires_grad_()
    before = x.detach().clone()
    table = soft_coverage(x, x, 0.2)
    kept = table.clone()
    picks = max_coverage(table, 9)
    for i in range(3):
        assert torch.equal(max_coverage(table[i : i + 1], 9), picks[i : i + 1])
        assert torch.allclose(soft_coverage(x[i : i + 1], x[i : i + 1], 0.2), table[i : i + 1], rtol=1e-5)
    assert torch.equal(x, before) and torch.equal(table, kept) and not table.requires_grad
    assert soft_coverage(x[:0], x[:0], 0.2).shape == (0, 40, 40) and max_coverage(table[:0], 3).shape == (0, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(soft_coverage(x, x, 0.2), table) and torch.equal(max_coverage(table, 9), picks)


def test_seen_from_outside_nothing_waits_and_graphs_stay_whole() -> None:
    x, y = torch.randn(2, 30, 8), torch.randn(2, 4, 8)
    table = soft_coverage(x, x, 0.2)
    with NoWaiting():
        max_coverage(soft_coverage(y, x, 0.2), 5)
    soft, most = torch.ops.mmcompress.soft_coverage.default, torch.ops.mmcompress.max_coverage.default
    torch.library.opcheck(soft, (None, x, 0.2, "blocked"))
    torch.library.opcheck(soft, (y, x, 0.2, "blocked"))
    torch.library.opcheck(most, (table, table[:, 0] > 0.02, table[:, 1], 5, "blocked"))

    def both(x: Tensor) -> Tensor:
        return max_coverage(soft_coverage(x, x, 0.2), 5)

    assert torch.equal(torch.compile(both, fullgraph=True, backend="eager")(x), both(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: max_coverage(x, 0), "k=0: 4 tokens"),
        (lambda x: max_coverage(x, 5), "k=5: 4 tokens"),
        (lambda x: max_coverage(x[0], 2), r"\(6, 4\): give a floating-point tensor"),
        (lambda x: max_coverage(x, 2, torch.ones(1, 4)), "last is torch.float32"),
        (lambda x: max_coverage(x, 2, None, x[0]), r"weight is \(6, 4\)"),
        (lambda x: max_coverage(x, 2, implementation="fast"), "implementation='fast'"),
        (lambda x: soft_coverage(x, x[..., :3], 0.2), r"targets \(1, 6, 4\) and tokens \(1, 6, 3\)"),
        (lambda x: soft_coverage(x.long(), x, 0.2), "targets are torch.int64"),
        (lambda x: soft_coverage(x, x, 0.0), "temperature=0.0"),
    ],
)
def test_errors(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(1, 6, 4))
