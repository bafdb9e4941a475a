# SPDX-License-Identifier: Apache-2.0
"""`kernels.match`: every implementation against the definition, and the definition against loops over tokens."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mmcompress.kernels import configs, match
from mmcompress.kernels.dispatch import has_triton, interpreted
from mmcompress.kernels.match import blocked
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
        for name in ("match", "match_float32"):
            monkeypatch.setitem(configs.CONFIGS, name, {"default": {"rows": 16, "columns": 32, "width": 32}})


def some_case(seed: int, small: bool) -> tuple[Tensor, Tensor, int, dict[str, Any]]:
    """Small whole numbers, whose products and norms are exact in whatever order they are summed: then ties are ties."""
    torch.manual_seed(seed)
    r = random.Random(seed)
    batch, rows = r.choice([1, 1, 2, 2 if small else 4]), r.choice([1, 2, 7, 40] if small else [1, 2, 7, 40, 100, 300])
    columns = r.choice([1, 3, 16, 33, 70] if small else [1, 3, 16, 33, 100, 257, 2100])
    width, size = r.choice([1, 3, 17, 40, 128]), r.choice([1, 2, 8])
    dtype = r.choice([torch.float32, torch.float16, torch.bfloat16])
    a, b = (torch.randint(-size, size + 1, (batch, n, width)).to(dtype) for n in (rows, columns))
    options: dict[str, Any] = {name: r.random() < 0.3 for name in ("exclude_self", "same_cell")}
    options |= {"largest": r.random() < 0.7, "normalize": r.random() < 0.8}
    if options["same_cell"] or r.random() < 0.4:
        low, high = r.choice([None, -3, -1, 0, 1]), r.choice([None, 0, 1, 2])
        options["near"] = (low, high if low is None or high is None else max(low, high))
        options["frame"] = r.choice([10, 64] if options["same_cell"] else [1, 4, 10, 64, 100])
    if r.random() < 0.5:
        for name, x in (("query_mask", a), ("key_mask", b)):
            options[name] = torch.rand(x.shape[:2]) < 0.7
            x.copy_(spoiled(x, ~options[name], seed % 2 == 0))
    if batch == 1 and r.random() < 0.6:
        parts = r.randint(1, 5)
        for name, x in (("cu_seqlens_a", a), ("cu_seqlens_b", b)):
            ends = sorted(r.randint(0, x.shape[1]) for _ in range(parts))
            options[name] = torch.tensor([0, *ends], dtype=r.choice([torch.int32, torch.int64]))
        options |= {name: options[name][0] for name in ("query_mask", "key_mask") if name in options}
        a, b = a[0], b[0]
    return a, b, r.randint(1, 8), options


def run(implementation: str, a: Tensor, b: Tensor, m: int, **options: Any) -> tuple[Tensor, Tensor]:
    options = {name: x.to(DEVICE) if isinstance(x, Tensor) else x for name, x in options.items()}
    found = match.match_top(a.to(DEVICE), b.to(DEVICE), m, implementation=implementation, **options)
    return found[0].cpu(), found[1].cpu()


def by_loops(a: Tensor, b: Tensor, m: int, **options: Any) -> tuple[list[list[float]], list[list[int]]]:
    """Dense, one batch entry, with Python numbers."""
    scores, places = [], []
    low, high = options.get("near", (None, None))
    frame, sign = options.get("frame", 1), 1 if options["largest"] else -1
    for i, x in enumerate(a.double().tolist()):
        found = []
        for j, y in enumerate(b.double().tolist()):
            step = j // frame - i // frame
            if (low is not None and step < low) or (high is not None and step > high):
                continue
            if (options["same_cell"] and i % frame != j % frame) or (options["exclude_self"] and i == j):
                continue
            dot = sum(p * q for p, q in zip(x, y, strict=True))
            norms = math.hypot(*x) * math.hypot(*y)
            found.append((-sign * (dot if not options["normalize"] else dot / norms if norms else 0.0), j))
        # cosines that are equal may differ in their last digits here
        best = sorted(found, key=lambda pair: (round(pair[0], 9), pair[1]))[:m]
        missing = m - len(best)
        scores.append([-sign * s for s, _ in best] + missing * [-sign * math.inf])
        places.append([j for _, j in best] + missing * [-1])
    return scores, places


def test_the_definition_equals_loops_over_tokens() -> None:
    compared = 0
    for seed in range(60):
        a, b, m, options = some_case(seed, True)
        if a.dim() == 2 or "query_mask" in options or a.shape[1] * b.shape[1] > 1000:
            continue
        value, index = run("naive", a, b, m, **options)
        scores, places = by_loops(a[0], b[0], m, **options)
        assert index[0].tolist() == places
        assert torch.allclose(value[0], torch.tensor(scores), rtol=1e-6)
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_blocked_equals_the_definition(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if start >= 100:
        monkeypatch.setattr(blocked, "_COPY", 1 << 12)  # tiles taller than wide, as very long tokens have them
    for seed in range(start, start + 50):
        check(seed, "blocked")


@needs_triton
@pytest.mark.parametrize("start", range(0, 24, 6))
def test_triton_equals_the_definition(start: int) -> None:
    for seed in range(start, start + 6):
        check(seed, "triton")


def check(seed: int, implementation: str) -> None:
    a, b, m, options = some_case(seed, implementation == "triton")
    value, index = run("naive", a, b, m, **options)
    found, place = run(implementation, a, b, m, **options)
    assert torch.equal(index, place), (seed, options)
    assert torch.allclose(value, found, rtol=1e-6, atol=0) and not found.isnan().any()
    if "query_mask" in options:
        assert (place[~options["query_mask"]] == -1).all()


@FAST
@pytest.mark.parametrize("width", [5, 64, 1024])
def test_scores_of_real_numbers(implementation: str, width: int) -> None:
    """Sums in another order differ in their last digits: then another index is right only where the scores are that close."""
    if implementation == "triton" and DEVICE == "cpu" and width > 100:
        pytest.skip("too slow in the interpreter")
    for seed in range(4 if implementation == "blocked" else 1):
        g = torch.Generator().manual_seed(seed)
        a, b = torch.randn(2, 50, width, generator=g), torch.randn(2, 77, width, generator=g)
        value, index = run(implementation, a, b, 1)
        exact = F.normalize(a.double(), dim=-1) @ F.normalize(b.double(), dim=-1).mT
        assert torch.allclose(value.double(), exact.amax(2, keepdim=True), atol=1e-6)
        assert (exact.gather(2, index) > exact.amax(2, keepdim=True) - 1e-6).all()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="how other libraries round is not known")
def test_copies_batches_and_tiles_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bitwise equal tokens the first is found, a batch gives what its members give alone, and so do other tiles."""
    for seed in range(60):
        torch.manual_seed(seed)
        r = random.Random(seed)
        rows, columns = r.randint(1, 200), r.randint(1, 400)
        width, dtype = r.choice([1, 3, 17, 40, 128, 300]), r.choice([torch.float32, torch.bfloat16])
        copy = torch.randint(0, max(1, columns // 3), (columns,))
        a, b = torch.randn(2, rows, width, dtype=dtype), torch.randn(2, columns, width, dtype=dtype)[:, copy]
        first = torch.full((columns,), columns).scatter_reduce(0, copy, torch.arange(columns), "amin")[copy]
        value, index = match.match(a, b)
        assert torch.equal(first[index], index), seed
        alone = match.match(a[1:], b[1:])
        assert torch.equal(alone[0], value[1:]) and torch.equal(alone[1], index[1:])
        with monkeypatch.context() as patch:
            patch.setattr(blocked, "_TILE", r.choice([1 << 12, 1 << 14]))
            patch.setattr(blocked, "_COLUMNS", r.choice([32, 64, 256]))
            tiled = match.match(a, b)
        assert torch.equal(tiled[0], value) and torch.equal(tiled[1], index)


@FAST
def test_edges(implementation: str) -> None:
    same = torch.ones(1, 40, 3)
    assert (run(implementation, same, same, 1)[1] == 0).all()
    assert (run(implementation, same, same, 1, largest=False)[1] == 0).all()
    value, index = run(implementation, same, torch.zeros(1, 5, 3), 2)
    assert (value == 0).all() and (index == torch.tensor([0, 1])).all()
    value, index = run(implementation, same, same[:, :0], 2)
    assert (value == -math.inf).all() and (index == -1).all()
    assert (run(implementation, same, same[:, :0], 1, largest=False)[0] == math.inf).all()
    assert run(implementation, same[:, :0], same, 1)[0].shape == (1, 0, 1)
    value, index = run(implementation, same[:, :1], same[:, :1], 3, exclude_self=True)
    assert index.tolist() == [[[-1, -1, -1]]]
    ends = torch.tensor([0, 0, 3, 3])
    value, index = run(
        implementation, same[0, :5], same[0, :9], 1, cu_seqlens_a=ends, cu_seqlens_b=torch.tensor([0, 4, 4, 9])
    )
    assert (index == -1).all()
    value, index = run(
        implementation, same[0, :5], same[0, :9], 1, cu_seqlens_a=ends, cu_seqlens_b=torch.tensor([0, 4, 8, 9])
    )
    assert index[:, 0].tolist() == [4, 4, 4, -1, -1]


@FAST
def test_huge_numbers_give_no_nan(implementation: str) -> None:
    a = torch.tensor([[3e38, 3e38, 1.0], [1.0, 2.0, 3.0], [-3e38, 3e38, 0.0]])[None]
    for dtype in (torch.float32, torch.bfloat16):
        value, index = run(implementation, a.to(dtype), a.to(dtype), 3)
        assert torch.equal(index, run("naive", a.to(dtype), a.to(dtype), 3)[1])
        assert value.isfinite().all() and value[0, 1, 0] > 0.999 and (value[0, 0] == 0).all()


@FAST
def test_the_same_cell_of_the_next_frame(implementation: str) -> None:
    video = torch.randn(1, 4 * 6, 40, generator=torch.Generator().manual_seed(0))
    value, index = run(implementation, video, video, 1, frame=6, near=(1, 1), same_cell=True)
    assert torch.allclose(value[0, :18, 0], F.cosine_similarity(video[0, :18], video[0, 6:], dim=-1), atol=1e-6)
    assert index[0, :, 0].tolist() == [*range(6, 24), *6 * [-1]]
    within = run(implementation, video, video, 1, frame=6, near=(1, 1))
    frames = run(implementation, video.view(4, 6, 40)[:-1], video.view(4, 6, 40)[1:], 1)
    assert torch.equal(within[1][0, :18, 0], (frames[1][..., 0] + 6 * torch.arange(1, 4)[:, None]).flatten())


class Largest(TorchDispatchMode):
    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.size = max(self.size, x.numel())
        return out


def test_the_table_is_never_made() -> None:
    a, b = torch.randn(1, 5000, 8), torch.randn(1, 4000, 8)
    with Largest() as seen:
        match.match(a, b)
        match.match_top(a, b, 3, near=(-1, 1), frame=100)
    assert 4000 < seen.size <= blocked._TILE


def test_nothing_waits_and_nothing_learns() -> None:
    a = torch.randn(2, 30, 8, requires_grad=True)
    with NoWaiting():
        value, _ = match.match(a, a, exclude_self=True, key_mask=torch.ones(2, 30, dtype=torch.bool))
        match.match_top(a, a, 4, largest=False)
    assert not value.requires_grad


@FAST
def test_it_can_be_compiled(implementation: str) -> None:
    def nearest(x: Tensor) -> Tensor:
        return match.match(x, x, exclude_self=True, implementation=implementation)[1] + 1

    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    assert torch.equal(torch.compile(nearest, fullgraph=True, backend="eager")(x), nearest(x))
    arguments = (x, x, 2, True, True, 1, None, None, False, False, None, None, None, None, implementation)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.mmcompress.match.default, arguments, test_utils=checks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"m": 9}, "from 1 to 8"),
        ({"m": 0}, "from 1 to 8"),
        ({"frame": 0}, "at least 1"),
        ({"near": (2, 1)}, "lower bound"),
        ({"near": (0.5, 1)}, "whole number"),
        ({"query_mask": torch.ones(1, 3)}, "bool"),
        ({"key_mask": torch.ones(1, 3, dtype=torch.bool)}, "key_mask"),
        ({"cu_seqlens_a": torch.tensor([0, 4])}, "come together"),
        ({"b": torch.ones(1, 5, 4)}, "shape"),
        ({"b": torch.ones(2, 5, 3)}, "shape"),
        ({"a": torch.ones(1, 4, 3, dtype=torch.int64)}, "floating"),
        ({"implementation": "cuda"}, "choose among"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    given = {"a": torch.ones(1, 4, 3), "b": torch.ones(1, 5, 3), "m": 1} | options
    with pytest.raises((ValueError, TypeError), match=message):
        match.match_top(**given)


@pytest.mark.parametrize("ends", [[0, 5], [1, 4], [0, 3, 2], []])
def test_wrong_segments_are_named(ends: list[int]) -> None:
    a, cu = torch.ones(4, 3), torch.tensor(ends, dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seqlens_a"):
        match.match(a, a, cu_seqlens_a=cu, cu_seqlens_b=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="each segment of a"):
        match.match(a, a, cu_seqlens_a=torch.tensor([0, 2, 4]), cu_seqlens_b=torch.tensor([0, 4]))
