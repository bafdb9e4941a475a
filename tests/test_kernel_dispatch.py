# SPDX-License-Identifier: Apache-2.0
"""Which implementation of an operation runs, and the times of selections that follow from it."""

from __future__ import annotations

import pytest
import torch
from mmcompress.eval.cost import plain
from mmcompress.eval.cost.peers import Race, race
from mmcompress.eval.cost.selection import Sizes, selection_times
from mmcompress.eval.kernel_bench.operations import OPERATIONS, Draw, Size, caller
from mmcompress.kernels.coverage import max_coverage
from mmcompress.kernels.dispatch import IMPLEMENTATIONS, choose, has_triton, preferring
from torch.utils._pytree import tree_leaves

from mmcompress.ops.density import density_peaks

from .watch import in_a_graph


def test_auto_takes_blocked_torch_on_the_cpu() -> None:
    assert choose("auto", torch.zeros(1)) == "blocked"
    assert choose("naive", torch.zeros(1)) == "naive"


def test_a_preference_stands_for_auto_alone_and_ends_with_its_block() -> None:
    x = torch.zeros(1)
    with preferring("naive") as outer:
        assert not outer.used
        assert choose("blocked", x) == "blocked"
        assert not outer.used
        with pytest.raises(KeyError), preferring("auto"):
            assert choose("auto", x) == "blocked"
            raise KeyError
        assert choose("auto", x) == "naive"
        assert outer.used
    assert choose("auto", x) == "blocked"


@pytest.mark.parametrize("call", [lambda name: choose(name, torch.zeros(1)), lambda name: preferring(name).__enter__()])
def test_an_unknown_implementation_is_named_with_those_there_are(call) -> None:
    with pytest.raises(ValueError, match=f"'cuda'.*{', '.join(IMPLEMENTATIONS)}"):
        call("cuda")


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA device"):
        choose("triton", torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    if has_triton():
        assert choose("triton", torch.zeros(1)) == "triton"


def test_naive_times_stand_beside_the_methods_that_call_kernels() -> None:
    sizes = Sizes(features=16, encoder=16, keys=8, heads=2, text=4)
    found = {row.method: row for row in selection_times(["divprune", "fastv"], repeats=2, sizes=sizes, side=4)}
    assert found["divprune"].naive_ms > 0
    assert found["fastv"].naive_ms is None


def test_methods_race_against_plain_pytorch() -> None:
    sizes = ((64, 16), (72, 16))
    rows = list(race(Race(sizes, repeats=1), ["divprune", "fastv", "dpc_knn", "max_coverage"]))
    raced = {(row.name, row.n) for row in rows if row.ratio is not None}
    assert raced == {(name, n) for name in ("divprune", "dpc_knn", "max_coverage") for n, _ in sizes}
    assert all(row.cpu > 0 and row.peer_cpu > 0 and row.rounds >= 3 for row in rows if row.ratio)


def test_plain_peers_choose_the_same() -> None:
    x = torch.randn(1, 90, 24, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(density_peaks(x, 7), plain.density_peaks(x, 7), strict=True):
        assert torch.equal(ours, theirs)
    table = (x @ x.transpose(1, 2)).softmax(-1)
    assert torch.equal(max_coverage(table, 20), plain.max_coverage(table, 20))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kernel_can_be_captured_in_a_graph(name: str) -> None:
    operation = OPERATIONS[name]
    size = Size(120, operation.d or 32, 8 if operation.k is None else operation.k, "float32")
    run = caller(name, "triton", operation.inputs(Draw(size, "cuda")))
    pairs = zip(tree_leaves(in_a_graph(run)), tree_leaves(run()), strict=True)
    assert all(torch.equal(found, expected) for found, expected in pairs)
