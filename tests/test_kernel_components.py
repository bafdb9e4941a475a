# SPDX-License-Identifier: Apache-2.0
"""`kernels.components`: every implementation against the definition, and the definition against a search by hand."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from mmcompress.kernels import configs
from mmcompress.kernels.components import blocked, components
from mmcompress.kernels.dispatch import has_triton, interpreted
from torch import Tensor

from .watch import NoWaiting, spoiled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not has_triton() or not (DEVICE == "cuda" or interpreted()),
    reason="Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported (tests/conftest.py)",
)
FAST = pytest.mark.parametrize("implementation", ["blocked", pytest.param("triton", marks=needs_triton)])


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks also for the small cases that the interpreter can do."""
    if DEVICE == "cpu":
        for name in ("components", "components_float32"):
            monkeypatch.setitem(configs.CONFIGS, name, {"default": {"rows": 16, "columns": 32, "width": 16}})


def some_case(seed: int, small: bool) -> tuple[Tensor, float, dict[str, Any]]:
    """Small whole numbers, whose products are exact: heaps, or (every third) a long chain in mixed order."""
    torch.manual_seed(seed)
    r = random.Random(seed)
    batch, n = r.choice([1, 1, 2, 5]), r.choice([1, 2, 7, 40, 60] if small else [1, 2, 7, 40, 100, 300])
    width, size = r.choice([1, 3, 17, 40, 128]), r.choice([1, 2, 8])
    x = torch.randint(-size, size + 1, (batch, n, width)).float()
    if seed % 3 == 0:
        angle = 0.1 * torch.arange(n)[torch.randperm(n)]
        x = torch.stack([angle.cos(), angle.sin()], 1).mul(100).round().expand(batch, -1, -1)
    x = x.to(r.choice([torch.float32, torch.float16, torch.bfloat16])).clone()
    options: dict[str, Any] = {}
    if r.random() < 0.4:
        options["mask"] = torch.rand(batch, n) < 0.8
        x = spoiled(x, ~options["mask"], seed % 2 == 0)
    if batch == 1 and r.random() < 0.6:
        ends = sorted(r.randint(0, n) for _ in range(r.randint(1, 4)))
        options["cu_seqlens"] = torch.tensor([0, *ends], dtype=r.choice([torch.int32, torch.int64]))
        options |= {"mask": options["mask"][0]} if "mask" in options else {}
        x = x[0]
    return x, r.choice([-2, 0, 0.1, 0.3, 0.5, 0.8, 0.95, 0.99, 1.0]), options


def run(implementation: str, x: Tensor, threshold: float, **options: Any) -> tuple[Tensor, Tensor]:
    options = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in options.items()}
    label, degree = components(x.to(DEVICE), threshold, implementation=implementation, **options)
    return label.cpu(), degree.cpu()


def test_the_definition_equals_a_search_by_hand() -> None:
    for seed in range(20):
        x = torch.randn(1, 4 + seed, 3, generator=torch.Generator().manual_seed(seed))
        unit = torch.nn.functional.normalize(x[0].double(), dim=-1)
        near = (unit @ unit.T > 0.9).tolist()
        labels = [-1] * len(near)
        for i in range(len(near)):
            left = [i] if labels[i] < 0 else []
            while left:
                j = left.pop()
                labels[j] = i
                left += [k for k in range(len(near)) if near[j][k] and labels[k] < 0]
        label, degree = run("naive", x, 0.9)
        assert label[0].tolist() == labels
        assert degree[0].tolist() == [sum(row) for row in near]


@pytest.mark.parametrize("pairs", [None, 1 << 12])
def test_blocked_equals_the_definition(pairs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "_PAIRS", pairs or blocked._PAIRS)
    for seed in range(120):
        check(seed, "blocked")


@needs_triton
@pytest.mark.parametrize("start", [0, 15])
def test_triton_equals_the_definition(start: int) -> None:
    for seed in range(start, start + 15):
        check(seed, "triton")


def check(seed: int, implementation: str) -> None:
    x, threshold, options = some_case(seed, implementation == "triton")
    wanted, found = run("naive", x, threshold, **options), run(implementation, x, threshold, **options)
    assert torch.equal(wanted[0], found[0]) and torch.equal(wanted[1], found[1]), (seed, threshold, options)


def test_a_long_chain_is_one_component() -> None:
    """Longer than a block of rows, and in mixed order."""
    g = torch.Generator().manual_seed(0)
    angle = torch.linspace(0, 3, 3000)[torch.randperm(3000, generator=g)].double()
    x = torch.stack([angle.cos(), angle.sin()], 1)[None].float()
    label, degree = components(x, math.cos(0.0018))
    assert not label.any() and degree.sum() == 3000 + 2 * 2999
    assert len(components(x, math.cos(0.0009))[0].unique()) > 1000


@FAST
def test_edges(implementation: str) -> None:
    same = torch.ones(2, 9, 3)
    label, degree = run(implementation, same, 0.9)
    assert not label.any() and (degree == 9).all()
    label, degree = run(implementation, torch.zeros(1, 5, 3), 0.0)
    assert label.tolist() == [[0, 1, 2, 3, 4]] and (degree == 1).all()
    assert not run(implementation, torch.zeros(1, 5, 3), -0.5)[0].any()
    assert run(implementation, same[:, :0], 0.5)[0].shape == (2, 0)
    huge = torch.tensor([[[3e38, 3e38], [3e38, 3e38], [1.0, 0.0]]])
    assert run(implementation, huge, 0.5)[0].tolist() == [[0, 1, 2]]
    nobody = run(implementation, same * math.nan, 0.5, mask=torch.zeros(2, 9, dtype=torch.bool))
    assert (nobody[0] == -1).all() and not nobody[1].any()
    ends = torch.tensor([0, 4, 4, 7])
    label, degree = run(implementation, same[0], 0.5, cu_seqlens=ends, max_seqlen=6)
    assert label.tolist() == [0, 0, 0, 0, 4, 4, 4, -1, -1] and degree.tolist() == [4, 4, 4, 4, 3, 3, 3, 0, 0]


def test_batches_equal_their_members() -> None:
    x = torch.randn(5, 70, 6, generator=torch.Generator().manual_seed(0))
    label, degree = components(x, 0.7)
    assert 1 < len(label.unique()) < 70
    for i in range(5):
        alone = components(x[i : i + 1], 0.7)
        assert torch.equal(alone[0][0], label[i]) and torch.equal(alone[1][0], degree[i])


def test_nothing_waits() -> None:
    with NoWaiting():
        components(torch.randn(2, 30, 8), 0.5, mask=torch.ones(2, 30, dtype=torch.bool))


@FAST
def test_it_can_be_compiled(implementation: str) -> None:
    def labels(x: Tensor) -> Tensor:
        return components(x, 0.5, implementation=implementation)[0] + 1

    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(torch.compile(labels, fullgraph=True, backend="eager")(x), labels(x))
    arguments = (x, 0.5, None, None, None, implementation)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mmcompress.components.default, arguments, test_utils=checks)


def test_wrong_options_are_named() -> None:
    x = torch.ones(1, 4, 3)
    for threshold in (math.nan, "0.5"):
        with pytest.raises(ValueError, match="threshold="):
            components(x, threshold)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask is"):
        components(x, 0.5, mask=torch.ones(1, 4))
    with pytest.raises(ValueError, match="floating-point"):
        components(x[0], 0.5)
    with pytest.raises(ValueError, match="fewer than"):
        components(torch.ones(1).expand(1, 1 << 24, 1), 0.5)


@pytest.mark.parametrize("threshold", [-0.2, 0.5, 0.8, 0.99, 0.99999])
def test_sketches_leave_out_no_edge(threshold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of many features are compared along a few directions first: heaps, what is like nothing, zeros, one token twice."""
    monkeypatch.setattr(blocked, "_PAIRS", 1 << 12)
    monkeypatch.setattr(blocked, "_LEAST", 32)
    monkeypatch.setattr(blocked, "_DIRECTIONS", 12)
    fewer, near = [], blocked._near

    def watched(sketch: Tensor, threshold: float, first: int, end: int) -> Tensor:
        found = near(sketch, threshold, first, end)
        fewer.append(2 * len(found) <= len(sketch) - first)
        return found

    monkeypatch.setattr(blocked, "_near", watched)
    for seed in range(6):
        drawn = torch.Generator().manual_seed(seed)
        heap = torch.randint(0, 12, (300,), generator=drawn)
        x = torch.randn(12, 48, generator=drawn)[heap] + 10.0**-seed * torch.randn(300, 48, generator=drawn)
        x[::7] = torch.randn(43, 48, generator=drawn)
        x[50:60], x[60:70] = 0, x[:10]
        mask = torch.rand(300, generator=drawn) < 0.8 if seed % 2 else None
        if mask is not None and seed == 5:
            x[~mask] = math.nan
        options = {} if mask is None else {"mask": mask[None]}
        wanted, found = run("naive", x[None], threshold, **options), run("blocked", x[None], threshold, **options)
        assert torch.equal(wanted[0], found[0]) and torch.equal(wanted[1], found[1]), seed
    assert any(fewer) == (threshold > 0 and DEVICE == "cpu")
