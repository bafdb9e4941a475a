# SPDX-License-Identifier: Apache-2.0
"""`kernels.merge` and `kernels.compact`: every implementation against the definition, gradients included."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmcompress.kernels import configs, dispatch
from mmcompress.kernels.compact import compact
from mmcompress.kernels.dispatch import has_triton, interpreted
from mmcompress.kernels.gather import gather
from mmcompress.kernels.merge import blocked, merge
from torch import Tensor

from .watch import NoWaiting

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not has_triton() or not (DEVICE == "cuda" or interpreted()),
    reason="Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported (tests/conftest.py)",
)
FAST = pytest.mark.parametrize("implementation", ["blocked", pytest.param("triton", marks=needs_triton)])
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks also for the small cases that the interpreter can do."""
    monkeypatch.setitem(dispatch.PLAIN, "merge", 0)
    monkeypatch.setattr(blocked, "CELLS", 60)
    if DEVICE == "cpu":
        monkeypatch.setitem(configs.CONFIGS, "merge", {"default": {"rows": 4, "width": 32, "num_warps": 4}})
        monkeypatch.setitem(configs.CONFIGS, "compact", {"default": {"width": 32, "num_warps": 4}})


@pytest.fixture
def dirty_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that is not filled by its owner holds NaN."""
    new_empty = Tensor.new_empty

    def dirty(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = new_empty(self, *args, **kwargs)
        return x.fill_(math.nan) if x.is_floating_point() else x

    monkeypatch.setattr(Tensor, "new_empty", dirty)


# ---------------------------------------------------------------------- merge
def some_merge(seed: int) -> tuple[Tensor, Tensor, int, Tensor | None, bool]:
    """Slots that are gone hold NaN, and so do their weights; some outputs have no slot."""
    torch.manual_seed(seed)
    r = random.Random(seed)
    shape = r.choice([1, 2]), r.choice([1, 5, 23])
    x = torch.randn(*shape, *r.choice([(1,), (17,), (40,), (2, 3), ()])).to(r.choice(DTYPES))
    count = r.choice([1, 3, shape[1]])
    assign = torch.randint(-1, count, shape)
    weight = torch.rand(shape).to(r.choice(DTYPES)) if r.random() < 0.6 else None
    if r.random() < 0.5:
        x[assign < 0] = math.nan
        if weight is not None:
            weight[assign < 0] = math.nan
    return x, assign, count, weight, r.random() < 0.5


def run_merge(implementation: str, x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool) -> Tensor:
    weight = None if weight is None else weight.to(DEVICE)
    return merge(x.to(DEVICE), assign.to(DEVICE), count, weight, mean=mean, implementation=implementation).cpu()


def by_hand(x: Tensor, assign: Tensor, count: int, weight: Tensor | None, mean: bool) -> Tensor:
    out = torch.zeros(len(x), count, *x.shape[2:], dtype=torch.float64)
    for u in range(len(x)):
        for j in range(count):
            slots = [i for i in range(x.shape[1]) if assign[u, i] == j]
            shares = [1.0 if weight is None else float(weight[u, i]) for i in slots]
            for i, share in zip(slots, shares, strict=True):
                out[u, j] += share * x[u, i].double()
            if mean:
                out[u, j] /= sum(shares) or 1
    return out


@pytest.mark.parametrize("implementation", ["naive", "blocked", pytest.param("triton", marks=needs_triton)])
def test_merging_equals_a_loop(implementation: str, dirty_memory: None) -> None:
    for seed in range(8 if implementation == "triton" else 60):
        x, assign, count, weight, mean = some_merge(seed)
        found = run_merge(implementation, x, assign, count, weight, mean)
        wanted = by_hand(x, assign, count, weight, mean)
        assert found.dtype == x.dtype and not found.isnan().any(), seed
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[x.dtype]
        assert torch.allclose(found.double(), wanted, rtol=tolerance, atol=tolerance), seed


@FAST
def test_plain_gathers_and_large_groups_are_exact(implementation: str) -> None:
    for dtype in DTYPES:
        x = torch.randn(2, 9, 33, dtype=dtype)
        order = torch.stack([torch.randperm(9), torch.randperm(9)])
        found = run_merge(implementation, x, order, 9, torch.ones(2, 9), False)
        assert torch.equal(found.gather(1, order[..., None].expand_as(x)), x)
    ones = torch.ones(1, 300, 5, dtype=torch.bfloat16)  # in bfloat16 a sum of ones stops at 256
    for mean, wanted in ((False, 300), (True, 1)):
        assert (run_merge(implementation, ones, torch.zeros(1, 300, dtype=torch.int64), 1, None, mean) == wanted).all()


@FAST
def test_merging_at_its_edges(implementation: str) -> None:
    x = torch.randn(2, 4, 6)
    none = torch.full((2, 4), -1)
    assert run_merge(implementation, x, none, 3, None, True).tolist() == torch.zeros(2, 3, 6).tolist()
    assert run_merge(implementation, x, none, 0, None, False).shape == (2, 0, 6)
    assert run_merge(implementation, x[:, :0], none[:, :0], 2, None, True).tolist() == torch.zeros(2, 2, 6).tolist()
    assert run_merge(implementation, x[..., :0], none, 2, None, True).shape == (2, 2, 0)
    assert run_merge(implementation, x[:0], none[:0], 2, None, True).shape == (0, 2, 6)
    turned = torch.randn(2, 6, 4).transpose(1, 2)  # neither rows nor weights lie one behind the other
    assign, weight = torch.tensor([[0, 1, 1, -1]]).expand(2, -1), torch.rand(4, 2).T
    wanted = by_hand(turned, assign, 2, weight, True).float()
    assert torch.allclose(run_merge(implementation, turned, assign, 2, weight, True), wanted, atol=1e-6)
    zeros = run_merge(implementation, x, torch.zeros(2, 4, dtype=torch.int64), 1, torch.zeros(2, 4), True)
    assert (zeros == 0).all()


@FAST
def test_gradients_of_merging(implementation: str) -> None:
    for seed in range(12 if implementation == "blocked" else 3):
        x, assign, count, weight, mean = some_merge(seed)
        x, weight = torch.randn(x.shape), torch.rand(assign.shape) + 0.1 if seed % 3 else None
        torch.manual_seed(seed)
        direction = torch.randn(len(x), count, *x.shape[2:])
        grads = []
        for one in ("naive", implementation):
            given = [t.clone().requires_grad_() for t in (x, weight) if t is not None]
            (
                run_merge(one, given[0], assign, count, given[1] if len(given) > 1 else None, mean) * direction
            ).sum().backward()
            grads.append([t.grad for t in given])
        for wanted, found in zip(*grads, strict=True):
            assert wanted is not None and found is not None
            assert torch.allclose(wanted, found, rtol=1e-4, atol=1e-5), seed


@FAST
def test_merging_is_a_proper_operation(implementation: str) -> None:
    x, weight = torch.randn(2, 7, 5, requires_grad=True), torch.rand(2, 7, requires_grad=True)
    assign = torch.randint(-1, 3, (2, 7))
    arguments = (x, assign, 3, weight, True, implementation)
    torch.library.opcheck(torch.ops.mmcompress.merge.default, arguments, test_utils=("test_schema", "test_faketensor"))
    compiles(lambda x: merge(x, assign.to(x.device), 3, mean=True, implementation=implementation) * 2, x.detach())


# ---------------------------------------------------------------------- compact
def some_batch(seed: int) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Features, tables that all samples share, levels of another type, positions, masks, one in a strange layout."""
    torch.manual_seed(seed)
    r = random.Random(seed)
    batch, length, slots = r.choice([1, 3]), r.choice([1, 4, 11]), r.choice([1, 4, 9])
    tensors = [
        torch.randn(batch, length, r.choice([1, 17, 40])).to(r.choice(DTYPES)),
        torch.randn(1, length + 2, 2, 5),
        torch.randn(batch, 3, length).transpose(1, 2),
        torch.randint(-9, 9, (batch, length)),
        torch.rand(1, length) < 0.5,
        torch.randn(batch, length, 0),
    ]
    index = torch.randint(0, length, (batch, slots))
    if r.random() < 0.4:
        return tensors, index, None
    valid = torch.rand(batch, slots) < 0.6
    return tensors, index.masked_fill(~valid, r.choice([-1, 99])), valid


def run_compact(implementation: str, tensors: list[Tensor], index: Tensor, valid: Tensor | None) -> list[Tensor]:
    valid = None if valid is None else valid.to(DEVICE)
    found = compact([x.to(DEVICE) for x in tensors], index.to(DEVICE), valid, implementation=implementation)
    return [x.cpu() for x in found]


@pytest.mark.parametrize("implementation", ["naive", "blocked", pytest.param("triton", marks=needs_triton)])
def test_moving_equals_a_loop(implementation: str, dirty_memory: None) -> None:
    for seed in range(8 if implementation == "triton" else 40):
        tensors, index, valid = some_batch(seed)
        for x, found in zip(tensors, run_compact(implementation, tensors, index, valid), strict=True):
            assert found.dtype == x.dtype and found.shape == (*index.shape, *x.shape[2:])
            for b in range(len(index)):
                for j in range(index.shape[1]):
                    row = x[b if len(x) > 1 else 0, max(0, min(int(index[b, j]), x.shape[1] - 1))]
                    there = valid is None or bool(valid[b, j])
                    assert torch.equal(found[b, j], row if there else torch.zeros_like(row)), seed


@FAST
def test_moving_at_its_edges(implementation: str) -> None:
    x, none = torch.randn(2, 3, 4), torch.zeros(2, 0, dtype=torch.int64)
    assert run_compact(implementation, [x, x[:, :0]], none, None)[0].shape == (2, 0, 4)
    assert run_compact(implementation, [], none, None) == []
    bits = torch.tensor([[[math.nan, -0.0, math.inf, 1e-45]]])
    found = run_compact(implementation, [bits], torch.zeros(1, 1, dtype=torch.int64), None)[0]
    assert torch.equal(found.view(torch.int32), bits.view(torch.int32))


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (1, 5, 3), (2, 5, 3), (2, 5, 2, 3)])
def test_rows_are_those_of_torch_gather_and_raise_where_there_are_none(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)

    def ways(index: Tensor) -> list[Callable[[], Tensor]]:
        wide = index.view(*index.shape, *[1] * (x.dim() - 2)).expand(*index.shape, *shape[2:])
        moved = [lambda i=i: compact([x], index, implementation=i)[0] for i in ("naive", "blocked")]
        return [lambda: x.expand(len(index), *shape[1:]).gather(1, wide), lambda: gather(x, index), *moved]

    for index in (torch.randint(5, (shape[0], 4)), torch.randint(5, (2, 7)), torch.zeros(2, 0, dtype=torch.int64)):
        wanted, *found = (way() for way in ways(index))
        assert all(torch.equal(rows, wanted) for rows in found)
    for sample, wrong in ((0, 5), (shape[0] - 1, -1)):  # the neighbouring sample has such a row
        index = torch.zeros(shape[0], 2, dtype=torch.int64)
        index[sample, 1] = wrong
        for way in ways(index):
            with pytest.raises(RuntimeError):
                way()


@FAST
def test_gradients_of_moving(implementation: str) -> None:
    for seed in range(12 if implementation == "blocked" else 4):
        tensors, index, valid = some_batch(seed)
        grads = []
        for one in ("naive", implementation):
            given = [x.detach().float().requires_grad_(x.is_floating_point()) for x in tensors]
            found = run_compact(one, given, index, valid)
            sum((x * (i + 1)).square().sum() for i, x in enumerate(found)).backward()
            grads.append([x.grad for x in given if x.requires_grad])
        for wanted, got in zip(*grads, strict=True):
            assert torch.allclose(wanted, got, atol=1e-5), seed


@needs_triton
def test_moving_is_a_proper_operation() -> None:
    x = torch.randn(2, 7, 5, requires_grad=True)
    index, valid = torch.randint(0, 7, (2, 4)), torch.rand(2, 4) < 0.5
    torch.library.opcheck(
        torch.ops.mmcompress.compact.default, ([x], index, valid), test_utils=("test_schema", "test_faketensor")
    )
    compiles(lambda x: compact([x, x + 1], index.to(x.device), implementation="triton")[1] * 2, x.detach())


# ---------------------------------------------------------------------- both
def compiles(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    x = x.to(DEVICE)
    assert torch.equal(torch.compile(function, fullgraph=True, backend="eager")(x), function(x))


def test_nothing_waits() -> None:
    x, assign = torch.randn(2, 9, 4, requires_grad=True), torch.randint(-1, 3, (2, 9))
    with NoWaiting():
        merged = merge(x, assign, 3, torch.rand(2, 9), mean=True)
        moved = compact([x, assign], torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.bool))
        (merged.sum() + moved[0].sum()).backward()


def test_wrong_arguments_are_named() -> None:
    x, assign = torch.randn(2, 5, 3), torch.zeros(2, 5, dtype=torch.int64)
    for message, wrong in {
        "floating": (x.long(), assign, 2, None),
        "assign of shape": (x, assign[:, :4], 2, None),
        "int64": (x, assign.int(), 2, None),
        "weight of shape": (x, assign, 2, torch.ones(2, 4)),
        "number of outputs": (x, assign, -1, None),
    }.items():
        with pytest.raises(ValueError, match=message):
            merge(*wrong)
    for message, tensors, index, valid in (
        ("index of shape", [x], assign[0], None),
        ("index of shape", [x], assign.int(), None),
        ("valid of shape", [x], assign, torch.ones(2, 5)),
        ("a tensor of shape", [x.expand(2, 5, 3), torch.randn(3, 5, 1)], assign, None),
        ("no tokens", [x[:, :0]], assign, None),
    ):
        with pytest.raises(ValueError, match=message):
            compact(tensors, index, valid)
