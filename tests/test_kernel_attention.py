# SPDX-License-Identifier: Apache-2.0
"""`kernels.attention`: every implementation against the whole map, and the whole map against loops over queries."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from mmcompress.kernels import attention, configs
from mmcompress.kernels.attention import blocked
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
def poison() -> Iterator[None]:
    """Memory that is not written holds no numbers (torch.utils.deterministic.fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks also for the small cases that the interpreter can do."""
    if DEVICE == "cpu":
        table = {"rows": 16, "columns": 16, "num_warps": 4, "num_stages": 2}
        monkeypatch.setitem(configs.CONFIGS, "attention", {"default": table})


def some_heads(r: random.Random, small: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys of odd sizes, some half precision, some not contiguous."""
    n, kv, group = r.choice([1, 1, 2, 3]), r.choice([1, 2, 3]), r.choice([1, 1, 2, 2 if small else 5])
    queries, keys, d = (r.choice([1, 2, 17, 40]) for _ in range(3))
    keys = r.choice([keys, queries, *([] if small else [300])])
    dtype = r.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    q, k = torch.randn(n, queries, kv * group, d) * r.choice([0.1, 1, 5]), torch.randn(n, keys, kv, d)
    q, k = (x.to(dtype).transpose(1, 2) for x in (q, k))
    return (q, k) if r.random() < 0.5 else (q.contiguous(), k.contiguous())


def some_case(seed: int, small: bool) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Heads and options; what takes no part is not a number, or a copy of what does."""
    copies = seed % 3 == 0
    torch.manual_seed(seed)
    r = random.Random(seed)
    q, k = some_heads(r, small)
    (n, heads, queries, _), keys = q.shape, k.shape[2]
    options: dict[str, Any] = {"reduce": r.choice(attention.REDUCE), "per_head": r.random() < 0.3}
    if n == 1 and queries == keys and r.random() < 0.7:
        ends = sorted(r.randint(0, keys) for _ in range(r.randint(0, 4)))
        options["cu_seqlens"] = torch.tensor([0, *ends], dtype=r.choice([torch.int32, torch.int64]))
    if r.random() < 0.5:
        options["causal"] = True
        if r.random() < 0.3:
            options["offset"] = r.randint(-5, 5)
        elif "cu_seqlens" not in options and r.random() < 0.5:
            options["at"] = torch.randint(-2, keys + 2, (n, queries))
    if r.random() < 0.4:
        shape = [(r.choice([1, n]), queries), (n, r.choice([1, heads]), queries)][r.randint(0, 1)]
        weight = torch.rand(shape)
        weight = weight * (weight > 0.3) if options["reduce"] != "max" and r.random() < 0.5 else weight > 0.3
        options["query_weight"] = weight
        q = spoiled(q, weight.view(len(weight), -1, queries) == 0, copies)
    if r.random() < 0.4:
        options["key_mask"] = torch.rand(n, keys) < 0.7
        k = spoiled(k, ~options["key_mask"][:, None], copies)
    if r.random() < 0.3:
        bias = torch.randn(n, keys)
        gone = torch.rand(n, keys) < 0.3
        options["key_bias"] = bias.masked_fill(gone, r.choice([-math.inf, torch.finfo(torch.float32).min]))
        k = spoiled(k, gone[:, None], copies)
    return q, k, options


def run(name: str, implementation: str, *given: Any, **options: Any) -> Any:
    given = tuple(x.to(DEVICE) if isinstance(x, Tensor) else x for x in given)
    options = {key: x.to(DEVICE) if isinstance(x, Tensor) else x for key, x in options.items()}
    found = getattr(attention, f"attention_{name}")(*given, **options, implementation=implementation)
    return tuple(x.cpu() for x in found) if isinstance(found, tuple) else found.cpu()


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> bool:
    return a.dtype == b.dtype == torch.float32 and torch.allclose(a, b, rtol=1e-5, atol=atol)


def test_the_definition_equals_loops_over_queries() -> None:
    for seed in range(16):
        q, k, options = some_case(seed, True)
        found = run("received", "naive", q, k, 0.4, **{**options, "per_head": True})
        (n, heads, queries, _), keys = q.shape, k.shape[2]
        offset, at = options.get("offset", keys - queries), options.get("at")
        ends = options.get("cu_seqlens", torch.tensor([0, keys])).tolist()
        segment = [next((s for s in range(len(ends) - 1) if ends[s] <= i < ends[s + 1]), None) for i in range(keys)]
        weight = options.get("query_weight", torch.ones(n, queries)).double()
        weight = weight.view(len(weight), -1, queries).expand(n, heads, queries)
        bias = options.get("key_bias", torch.zeros(n, keys)).double()
        for b in range(n):
            seen = []
            for i in range(queries):
                last = keys if not options.get("causal") else int(at[b, i]) if at is not None else i + offset
                there = range(min(keys, last + 1))
                if "cu_seqlens" in options:
                    there = [j for j in there if segment[i] == segment[j] is not None]
                if "key_mask" in options:
                    there = [j for j in there if options["key_mask"][b, j]]
                seen.append([j for j in there if bias[b, j] > -1e29])
            for h in range(heads):
                sums, tops, count = torch.zeros(keys).double(), torch.zeros(keys).double(), {}
                for i in range(queries):
                    if not seen[i] or not weight[b, h, i]:
                        continue
                    near = k[b, h // (heads // k.shape[1]), seen[i]].double()
                    row = (near @ q[b, h, i].double() * 0.4 + bias[b, seen[i]]).softmax(0)
                    sums[seen[i]] += row * weight[b, h, i]
                    tops[seen[i]] = torch.maximum(tops[seen[i]], row)
                    of = segment[i] if "cu_seqlens" in options else 0
                    count[of] = count.get(of, 0.0) + float(weight[b, h, i])
                if options["reduce"] == "mean":
                    own = [count.get(segment[j] if "cu_seqlens" in options else 0, 0.0) or 1.0 for j in range(keys)]
                    sums = sums / torch.tensor(own)
                wanted = tops if options["reduce"] == "max" else sums
                assert close(found[b, h], wanted.float()), (seed, options)


@pytest.mark.parametrize("cells", [None, 500, 1])
def test_blocked_receives_what_the_whole_map_says(cells: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "CELLS", cells or blocked.CELLS)
    monkeypatch.setattr(blocked, "ROWS", 3 if cells else blocked.ROWS)
    for seed in range(100 if cells is None else 40):
        check_received(seed, "blocked")


@needs_triton
def test_triton_receives_what_the_whole_map_says() -> None:
    for seed in range(12):
        check_received(seed, "triton")


def check_received(seed: int, implementation: str) -> None:
    q, k, options = some_case(seed, implementation == "triton")
    found = run("received", implementation, q, k, 0.4, **options)
    assert close(run("received", "naive", q, k, 0.4, **options), found), (seed, options)


@FAST
def test_rows(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(60 if implementation == "blocked" else 8):
        torch.manual_seed(seed)
        r = random.Random(seed)
        if seed % 2:
            monkeypatch.setattr(blocked, "CELLS", 200)
        q, k = some_heads(r, implementation == "triton")
        shape = tuple(r.choice([1, size]) for size in (*q.shape[:3], k.shape[2]))
        mask: Tensor | None = torch.rand(shape) < 0.7
        if r.random() < 0.4:
            mask = None
        else:
            gone = ~mask.expand(*q.shape[:3], k.shape[2]).flatten(0, 2).any(0)
            k = spoiled(k, gone, seed % 3 == 0)
            if r.random() < 0.4:
                mask = torch.where(mask, torch.randn(shape), -math.inf).to(r.choice([torch.float32, torch.bfloat16]))
            mask = mask[0] if len(mask) == 1 else mask
        found, wanted = (run("rows", i, q, k, 0.4, mask) for i in (implementation, "naive"))
        assert close(found, wanted), (seed, shape)
        sums = found.sum(-1)
        assert torch.allclose(sums, (sums > 0.5).float(), atol=1e-5)


@FAST
def test_marginals(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(40 if implementation == "blocked" else 6):
        torch.manual_seed(seed)
        r = random.Random(seed)
        if seed % 2:
            monkeypatch.setattr(blocked, "CELLS", 200)
        q, k = some_heads(r, implementation == "triton")
        prefix, per_head = r.choice([0, 1, k.shape[2]]), r.random() < 0.5
        options = {"prefix": prefix, "per_head": per_head}
        wanted, found = (run("marginals", i, q, k, 0.4, **options) for i in ("naive", implementation))
        assert all(close(a, b, 1e-5) for a, b in zip(wanted, found, strict=True)), seed


@FAST
def test_half_precision_is_only_that_of_the_input(implementation: str) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        q, k = (3 * torch.randn(1, 2, 40, 40).to(dtype) for _ in "qk")
        exact = (q.double() @ k.double().transpose(2, 3) * 0.2).softmax(-1).float()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            assert close(run("received", implementation, q, k, 0.2), exact.mean((1, 2)))
            assert close(run("rows", implementation, q[:, :, :3], k, 0.2), exact[:, :, :3], 3e-6)
            given = run("marginals", implementation, q.float(), k, 0.2, 4)[1]
        assert close(given, exact[..., 4:].sum(3).mean(1), 1e-5)


@FAST
def test_edges(implementation: str) -> None:
    q, k = torch.ones(2, 2, 0, 4), torch.ones(2, 1, 5, 4)
    assert run("received", implementation, q, k, 1.0).tolist() == [[0] * 5] * 2
    assert run("received", implementation, k, q[:, :1], 1.0).shape == (2, 0)
    assert run("rows", implementation, q, k, 1.0).shape == (2, 2, 0, 5)
    received, given = run("marginals", implementation, q, k, 1.0, 2)
    assert received.shape == (2, 3) and given.shape == (2, 0) and not received.any()
    nobody = torch.zeros(2, 5, dtype=torch.bool)
    poisoned = torch.full((2, 1, 5, 4), math.nan)
    assert not run("received", implementation, poisoned, poisoned, 1.0, query_weight=nobody, key_mask=nobody).any()
    assert not run("rows", implementation, k, poisoned, 1.0, nobody[:, None, None]).any()
    huge = 1e15 * torch.tensor([[[[1.0], [-1.0], [0.0]]]])
    found = run("received", implementation, huge, huge, 1.0, reduce="sum")
    assert found[0].tolist() == pytest.approx([4 / 3, 4 / 3, 1 / 3])
    alone = run("received", implementation, *torch.randn(2, 1, 3, 7, 5), 1.0, cu_seqlens=torch.tensor([0, 0, 1, 1, 2]))
    assert alone.tolist() == [[1, 1, 0, 0, 0, 0, 0]]


@needs_triton
def test_triton_splits_long_rows() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 1, 700, 8)
    for options in ({}, {"causal": True, "offset": 300}, {"key_mask": torch.arange(700)[None] > 650}):
        wanted, found = (run("received", i, q, k, 1.0, **options) for i in ("naive", "triton"))
        assert close(wanted, found)


def test_large_cases_over_several_blocks() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 4, 1500, 32), torch.randn(1, 2, 1500, 32)
    for options in ({}, {"causal": True}, {"cu_seqlens": torch.tensor([0, 700, 1400, 1500])}):
        wanted, found = (run("received", i, q, k, 0.3, **options) for i in ("naive", "blocked"))
        assert close(wanted, found, 1e-7)


def test_padded_batches_equal_their_members() -> None:
    torch.manual_seed(0)
    lengths = [9, 30, 1]
    q, k = torch.full((2, 3, 4, 30, 8), math.nan)
    there = torch.arange(30) >= 30 - torch.tensor(lengths)[:, None]  # on the right, as prompts are
    for i, length in enumerate(lengths):
        q[i, :, -length:], k[i, :, -length:] = torch.randn(2, 4, length, 8)
    found = attention.attention_received(q, k, 0.3, query_weight=there, key_mask=there, causal=True)
    for i, length in enumerate(lengths):
        alone = attention.attention_received(q[i : i + 1, :, -length:], k[i : i + 1, :, -length:], 0.3, causal=True)
        assert torch.allclose(found[i, -length:], alone[0], atol=1e-7) and not found[i, :-length].any()


def test_nothing_waits_and_nothing_learns() -> None:
    q = torch.randn(2, 4, 30, 8, requires_grad=True)
    there = torch.ones(2, 30, dtype=torch.bool)
    with NoWaiting():
        received = attention.attention_received(q, q, 1.0, query_weight=there, key_mask=there, causal=True)
        rows = attention.attention_rows(q, q, 1.0, there[:, None, None])
        given = attention.attention_marginals(q, q, 1.0, 1)[1]
    assert not any(x.requires_grad for x in (received, rows, given))


@FAST
def test_it_can_be_compiled(implementation: str) -> None:
    def together(q: Tensor, k: Tensor, ends: Tensor) -> Tensor:
        how: Any = {"implementation": implementation}
        received = attention.attention_received(q, k, 0.3, cu_seqlens=ends, **how)
        rows, (_, given) = attention.attention_rows(q, k, 0.3, **how), attention.attention_marginals(q, k, 0.3, **how)
        return received + rows.mean((1, 2)) + given

    q, k, ends = torch.randn(1, 4, 20, 8).to(DEVICE), torch.randn(1, 2, 20, 8).to(DEVICE), torch.tensor([0, 9, 20])
    found = torch.compile(together, fullgraph=True, backend="eager")(q, k, ends.to(DEVICE))
    assert torch.equal(found, together(q, k, ends.to(DEVICE)))


@FAST
def test_the_operators(implementation: str) -> None:
    ops, tests = torch.ops.mmcompress, ("test_schema", "test_faketensor")
    q, k = torch.randn(2, 4, 7, 8).to(DEVICE).transpose(1, 2), torch.randn(2, 7, 5, 8).to(DEVICE)
    there = torch.ones(2, 5, dtype=torch.bool, device=DEVICE)
    received = (q, k, 0.3, "mean", None, there, None, None, 1, None, implementation)
    torch.library.opcheck(ops.attention_received, received, test_utils=tests)
    torch.library.opcheck(ops.attention_marginals, (q, k, 0.3, 2, implementation), test_utils=tests)
    torch.library.opcheck(ops.attention_rows, (q, k, 0.3, there[:, None, None], implementation), test_utils=tests)


def test_wrong_options_are_named() -> None:
    q, k = torch.ones(2, 4, 3, 8), torch.ones(2, 2, 5, 8)
    ends, received = torch.tensor([0, 3]), attention.attention_received
    wrong: list[tuple[str, type[Exception], Any]] = [
        ("3 key heads", ValueError, lambda: received(q, torch.ones(2, 3, 5, 8), 1.0)),
        ("they have to be", ValueError, lambda: received(q[0], k, 1.0)),
        ("floating-point", TypeError, lambda: received(q.long(), k, 1.0)),
        ("reduce='median'", ValueError, lambda: received(q, k, 1.0, reduce="median")),
        ("which queries count", ValueError, lambda: received(q, k, 1.0, reduce="max", query_weight=torch.ones(2, 3))),
        ("query_weight of shape", ValueError, lambda: received(q, k, 1.0, query_weight=torch.ones(2, 5))),
        ("pass additive masks", TypeError, lambda: received(q, k, 1.0, key_mask=torch.ones(2, 5))),
        ("pass what is visible", TypeError, lambda: received(q, k, 1.0, key_bias=torch.ones(2, 5).bool())),
        ("key_bias of shape", ValueError, lambda: received(q, k, 1.0, key_bias=torch.ones(1, 5))),
        ("causal=True", ValueError, lambda: received(q, k, 1.0, offset=2)),
        ("one of them", ValueError, lambda: received(q, k, 1.0, causal=True, offset=2, at=torch.ones(2, 3).long())),
        ("once per segment", ValueError, lambda: received(q, k, 1.0, cu_seqlens=ends)),
        ("rising", ValueError, lambda: received(q[:1], q[:1], 1.0, cu_seqlens=torch.tensor([0, 4]))),
        ("prefix=6", ValueError, lambda: attention.attention_marginals(q, k, 1.0, 6)),
        ("mask of shape", ValueError, lambda: attention.attention_rows(q, k, 1.0, torch.ones(3, 3, dtype=torch.bool))),
        ("implementation='fast'", ValueError, lambda: received(q, k, 1.0, implementation="fast")),
    ]
    for message, kind, call in wrong:
        with pytest.raises(kind, match=message):
            call()
