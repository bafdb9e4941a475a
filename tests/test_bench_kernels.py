# SPDX-License-Identifier: Apache-2.0
"""`mmcompress bench kernels`: the record, the memory meter, the formulas, other commits, and what goes wrong."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcompress.eval.docs.tables import kernels as readme_kernels
from mmcompress.eval.kernel_bench import measure as measuring
from mmcompress.eval.kernel_bench import operations, tune
from mmcompress.eval.kernel_bench.measure import (
    Base,
    Failure,
    Late,
    Row,
    Sweep,
    Worker,
    measure,
    merged,
    quantiles,
    read,
    write,
)
from mmcompress.eval.kernel_bench.operations import OPERATIONS, Draw, Size, caller, sizes
from mmcompress.eval.kernel_bench.worker import Bench, extra_bytes, memory_limit, reason
from mmcompress.kernels import configs
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mmcompress.cli import main

CPU = torch.device("cpu")


# ---------------------------------------------------------------------- inputs and formulas


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("size", [Size(1, 1, 1), Size(40, 17, 7), Size(65, 64, 65, "bfloat16")], ids=str)
def test_every_operation_runs_and_its_implementations_agree(op: str, size: Size) -> None:
    known = OPERATIONS[op]
    size = dataclasses.replace(size, k=size.k if known.k is None else known.k, d=min(size.d, known.d or size.d))
    call = known.inputs(Draw(size, "cpu"))
    naive, blocked = (tree_leaves(caller(op, name, call)()) for name in ("naive", "blocked"))
    for a, b in zip(naive, blocked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if size.dtype == "bfloat16" else 1e-4, atol=1e-5)
    again = tree_leaves(known.inputs(Draw(size, "cpu")))
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(call), again, strict=True) if isinstance(a, Tensor))


def test_formulas_on_a_worked_case() -> None:
    size = Size(n=6, d=4, k=2, dtype="float16")
    costs = {name: (op.flops(size), op.bytes(size)) for name, op in OPERATIONS.items()}
    assert costs["match"] == (2 * 36 * 4, 2 * 6 * 4 * 2 + 6 * (4 + 8))
    assert costs["attention_received"] == (2 * 36 * 4, 2 * 6 * 4 * 2 + 6 * 4)
    assert costs["attention_rows"] == (2 * 2 * 6 * 4, (2 + 6) * 4 * 2 + 2 * 6 * 4)
    assert costs["max_min"] == (36 * 4, 6 * 4 * 2 + 2 * 8)
    assert costs["greedy_map"] == (2 * 2 * 6 * 4 + 4 * 6, 6 * 4 * 2 + 6 * 4 + 2 * 8)
    assert costs["max_coverage"] == (3 * 2 * 4 * 6, 4 * 6 * 2 + 2 * 8)
    assert costs["merge"] == (2 * 6 * 4, 6 * 4 * 2 + 6 * (8 + 4) + 2 * 4 * 2)
    assert costs["compact"] == (0, 2 * 2 * (4 * 2 + 2 * 64 * 4 + 3 * 8 + 1) + 2 * 8)
    assert costs["density_peaks"] == (1.5 * 36 * 4, 6 * 4 * 2 + 6 * 8)
    assert costs["components"] == (36 * 4, 6 * 4 * 2 + 6 * 16)
    assert costs["rank_filter"] == (4 * 6 * 4 * (2 + 10), 4 * 6 * (2 + 4))


@pytest.mark.parametrize("op", ["match", "attention_received", "attention_rows"])
def test_products_are_those_that_torch_counts(op: str) -> None:
    size = Size(96, 128, OPERATIONS[op].k or 0)
    run = caller(op, "naive", OPERATIONS[op].inputs(Draw(size, "cpu")))
    with FlopCounterMode(display=False) as counter:
        run()
    assert counter.get_total_flops() == OPERATIONS[op].flops(size)


@pytest.mark.parametrize("op", ["match", "merge", "compact", "components", "rank_filter"])
def test_bytes_are_those_of_inputs_and_outputs(op: str) -> None:
    known = OPERATIONS[op]
    size = Size(30, known.d or 16, 10 if known.k is None else known.k)
    call = known.inputs(Draw(size, "cpu"))
    outputs = [x for x in tree_leaves(caller(op, "naive", call)()) if isinstance(x, Tensor)]
    inputs = [x for x in tree_leaves(call) if isinstance(x, Tensor)]
    expected = sum(x.nbytes for x in (*inputs, *outputs))
    if op == "compact":  # only what is kept is read
        expected = inputs[-1].nbytes + 2 * sum(x.nbytes for x in outputs)
    assert known.bytes(size) == expected


def test_the_sweep_of_an_operation() -> None:
    assert sizes("max_min", [9, 3, 9], [4], [2, 5], ["float32"]) == {
        (4, 2, "float32"): [Size(3, 4, 2), Size(9, 4, 2)],
        (4, 5, "float32"): [Size(9, 4, 5)],
    }
    assert sizes("rank_filter", [3], [4, 8], [2, 5], ["float32"]) == {(64, 3, "float32"): [Size(3, 64, 3)]}
    assert sizes("attention_rows", [3], [4], [2, 5], ["float16"]) == {(4, 32, "float16"): [Size(3, 4, 32, "float16")]}


# ---------------------------------------------------------------------- the memory meter


def _sums(x: Tensor) -> Tensor:
    table = x[:, None] + x  # n x n
    return table.sum(1)


def _twice(x: Tensor) -> list[Tensor]:
    first = x * 2
    second = first * 3
    del first
    return [second * 4]


@torch.library.custom_op("mmcompress_test::sums", mutates_args=())
def _opaque(x: Tensor) -> Tensor:
    return _sums(x)


CASES: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "a table of n x n": (_sums, 1000 * 1000 * 4),
    "the same inside of a custom operation": (_opaque, 1000 * 1000 * 4),
    "two temporaries at once": (_twice, 2 * 4000),
    "only outputs": (lambda x: (x + 1, [x * 2]), 0),
    "an output that is a part of more": (lambda x: (x[:, None] + x)[3], 1000 * 999 * 4),
    "an output that is an input": (lambda x: x, 0),
    "in place": (lambda x: x.add_(0), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_the_meter_on_known_allocations(case: str) -> None:
    run, expected = CASES[case]
    x = torch.randn(1000)
    assert abs(extra_bytes(lambda: run(x), CPU) - expected) <= 64


def test_the_meter_ignores_what_was_there_before() -> None:
    kept = [torch.randn(500_000)]
    assert extra_bytes(kept.clear, CPU) == 0
    assert extra_bytes(lambda: torch.randn(1000), CPU) == 0


def test_the_meter_tells_a_table_from_blocks() -> None:
    size = Size(8192, 16, 1)
    call = OPERATIONS["match"].inputs(Draw(size, "cpu"))
    naive, blocked = (extra_bytes(caller("match", name, call), CPU) for name in ("naive", "blocked"))
    assert naive >= size.n**2 * 4 > 4 * blocked


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="the limit reads /proc")
def test_a_table_that_does_not_fit_raises() -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    with pytest.raises(MemoryError, match="half of the free memory"), memory_limit(CPU):
        torch.empty(int(0.8 * free), dtype=torch.uint8)
    torch.empty(int(0.8 * free), dtype=torch.uint8)  # untouched memory costs nothing: the limit is gone
    with pytest.raises(RuntimeError, match="shape"), memory_limit(CPU):
        torch.ones(2, 3) @ torch.ones(2, 3)


# ---------------------------------------------------------------------- the run without processes


class Played:
    """A worker that answers by a script: milliseconds by (provider, N), or what it raises."""

    script: dict[tuple[str, int], float | Exception]
    asked: list[tuple[str, str, int]]

    def __init__(self, folder: Path) -> None:
        self.n = 0

    def prepare(self, case: dict[str, Any]) -> None:
        self.n = case["n"]

    def ask(self, do: str, limit: float, provider: str = "", **_: Any) -> Any:
        if do == "rates":
            return {"copy": 1e9, "matmul": {"float32": 1e9}}
        self.asked.append((do, provider, self.n))
        answer = self.script[provider, self.n]
        if isinstance(answer, Exception):
            raise answer
        return 123 if do == "memory" else answer

    def close(self) -> None:
        pass


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> type[Played]:
    monkeypatch.setattr(measuring, "Worker", Played)
    monkeypatch.setattr(Played, "asked", [], raising=False)
    return Played


def test_rows_of_a_run(played: type[Played]) -> None:
    played.script = {("naive", 10): 4.0, ("blocked", 10): 2.0}
    (rows,) = measure(Sweep(ops=["match"], n=[10], d=[4], repeats=5))
    naive, blocked = rows
    assert (naive.provider, blocked.provider) == ("naive", "blocked") and blocked.rounds == 5
    assert (blocked.q20_ms, blocked.q50_ms, blocked.q80_ms, blocked.peak_bytes) == (2, 2, 2, 123)
    flops, moved = 2 * 100 * 4, 2 * 10 * 4 * 4 + 120
    assert (blocked.flops, blocked.bytes) == (flops, moved) and blocked.roofline == max(flops, moved) / 1e9 / 2e-3
    assert blocked.note is None and blocked.torch == torch.__version__ and blocked.device and blocked.threads
    assert blocked.cells(naive)[4:] == ["2", "2", "2", "2.00x", "0.00", f"{100 * blocked.roofline:.3g} %"]
    runs = [provider for do, provider, _ in played.asked if do == "run"][2:]
    rounds = [tuple(runs[i : i + 2]) for i in range(0, 10, 2)]
    assert set(rounds) == {("naive", "blocked"), ("blocked", "naive")}  # in turn, in both orders


def test_what_would_take_too_long_is_left_out(played: type[Played]) -> None:
    played.script = {("naive", n): 500.0 * n for n in (1, 2, 4)} | {("blocked", n): 900.0 for n in (1, 2, 4)}
    sweep = Sweep(ops=["match"], n=[4, 1, 2], d=[4, 8], patience=1, repeats=1)
    rows = {(row.provider, row.d, row.n): row for case in measure(sweep) for row in case}
    naive, blocked = ([rows[name, 4, n] for n in (1, 2, 4)] for name in ("naive", "blocked"))
    assert [row.q50_ms for row in naive] == [500, None, None] and [row.peak_bytes for row in naive] == [123, None, None]
    assert [row.note for row in naive[1:]] == [f"about {s} s a run, by that with N = 1: beyond 1 s" for s in (2, 8)]
    assert naive[1].cells(None)[4:] == ["-"] * 6 and naive[1].rounds == 0
    assert [row.q50_ms for row in blocked] == [900, None, None] and [r.peak_bytes for r in blocked] == [123, 123, None]
    assert blocked[1].note == "about 3.6 s a run, by that with N = 1: beyond 1 s, its memory was measured alone"
    assert rows["blocked", 8, 2].peak_bytes is None  # once is enough


def test_a_slow_provider_runs_once(played: type[Played]) -> None:
    played.script = {("naive", 5): 9000.0, ("compile", 5): 2000.0, ("blocked", 5): 1.0}
    (rows,) = measure(
        Sweep(ops=["match"], n=[5], d=[4], patience=3, repeats=7, providers=["naive", "compile", "blocked"])
    )
    assert [(row.rounds, row.q50_ms) for row in rows] == [(1, 9000), (8, 2000), (7, 1)]


def test_failures_have_their_reason(played: type[Played]) -> None:
    played.script = {
        ("naive", 5): Failure("needs more than half of the free memory"), ("naive", 6): 1.0,
        ("compile", 5): Late("a run took longer than 300 s"), ("compile", 6): 1.0,
        ("blocked", 5): 1.0, ("blocked", 6): 1.0,
    }  # fmt: skip
    sweep = Sweep(ops=["match"], n=[5, 6], d=[4, 8], providers=["naive", "compile", "blocked"], repeats=1)
    found = {(row.provider, row.n, row.d): row for case in measure(sweep) for row in case}
    assert found["naive", 5, 4].note == "needs more than half of the free memory"
    assert found["naive", 6, 4].note == "not tried, as with N = 5: needs more than half of the free memory"
    assert found["compile", 6, 8].note == "not tried, as with N = 5: a run took longer than 300 s"
    assert ("run", "compile", 6) not in played.asked and found["blocked", 6, 8].q50_ms == 1


@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=False)  # put back after the test
def test_compiling_goes_through_the_public_function(monkeypatch: pytest.MonkeyPatch) -> None:
    import mmcompress.kernels.merge.naive as twin

    compiled = []
    monkeypatch.setattr(twin, "merge", twin.merge)

    def compiler(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(function)
        return lambda *arguments: function(*arguments) + 1

    monkeypatch.setattr(torch, "compile", compiler)
    plain = twin.merge
    call = OPERATIONS["merge"].inputs(Draw(Size(9, 4, 3), "cpu"))
    expected = caller("merge", "naive", call)()
    torch.testing.assert_close(caller("merge", "compile", call)(), expected + 1)
    assert compiled == [plain]

    def without(function: Callable[..., Any]) -> Callable[..., Any]:
        raise RuntimeError("No working C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", without)
    monkeypatch.setattr(twin, "merge", plain)
    with pytest.raises(RuntimeError) as error:
        caller("merge", "compile", call)
    assert reason(error.value) == "RuntimeError: No working C++ compiler found"


def test_the_bench_of_a_worker() -> None:
    bench = Bench()
    bench.case("compact", 20, 8, 5, "float16", "cpu")
    assert bench.run("blocked") > 0 and bench.run("naive", warmup=True) > 0 and bench.memory("naive") >= 0
    with pytest.raises(ValueError, match="choose among"):
        bench.run("fast")
    rates = bench.rates(["float32", "float16"], "cpu")
    assert 1e8 < rates["copy"] < 1e13 and 1e8 < rates["matmul"]["float32"] <= rates["matmul"]["float16"]


def test_quantiles() -> None:
    assert quantiles([]) == (None, None, None) and quantiles([3.0]) == (3, 3, 3)
    values = torch.rand(7, dtype=torch.float64)
    expected = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    assert quantiles(values.tolist()) == pytest.approx(expected)


# ---------------------------------------------------------------------- the run with processes

TOY = """
import os, time, torch
def merge(x, assign, count, weight, mean, implementation):
    assert "TRITON_INTERPRET" not in os.environ
    if implementation == "naive":
        print("not an answer", flush=True)
    elif PAUSE is None:
        os.kill(os.getpid(), 9)
    else:
        time.sleep(PAUSE)
    return torch.zeros(1, count, x.shape[2])
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first commit without kernels, a second one whose blocked kernel waits, and a working tree whose one dies."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    root = tmp_path_factory.mktemp("repository")

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(root), *who, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    (root / "kernels").mkdir()
    (root / "kernels" / "__init__.py").touch()
    git("add", ".")
    git("commit", "-m", "none")
    git("tag", "none")
    (root / "kernels" / "merge").mkdir()
    file = root / "kernels" / "merge" / "__init__.py"
    file.write_text(f"PAUSE = 0.05\n{TOY}")
    git("add", ".")
    git("commit", "-m", "kernels")
    git("tag", "slow")
    file.write_text(f"PAUSE = None\n{TOY}")
    return root


@pytest.mark.slow
def test_another_commit_in_the_same_run(repository: Path) -> None:
    base = Base("slow", repository)
    sweep = Sweep(ops=["merge"], n=[8], d=[4], k=[2], providers=["blocked", "naive"], repeats=2)
    (rows,) = measure(sweep, base, repository / "kernels")
    blocked, naive, other = rows
    assert [row.provider for row in rows] == ["blocked", "naive", "blocked@slow"]
    assert "SIGKILL" in str(blocked.note) and blocked.q50_ms is None and blocked.rounds == 0
    assert naive.q50_ms is not None and naive.q50_ms < 50
    assert other.q50_ms is not None and other.q50_ms >= 50 and other.commit == base.commit[:10] != naive.commit
    assert base.folder is not None and not Path(base.folder.name).exists()


def test_an_answer_that_does_not_come(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # not handed on
    with Base("slow", repository) as folder:
        worker = Worker(folder)
        worker.prepare({"op": "merge", "n": 8, "d": 4, "k": 2, "dtype": "float32", "device": "cpu"})
        assert worker.ask("run", 120, provider="naive") > 0
        process = worker.process
        with pytest.raises(Late, match="longer than 0 s"):
            worker.ask("run", 0.01, provider="blocked")
        assert process is not None and process.poll() is not None and worker.process is None
        assert worker.ask("run", 120, provider="naive") > 0  # in a new process
        worker.close()


def test_commits_that_cannot_be_timed(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no kernels; choose a later one"):
        Base("none", repository)
    for wrong in ("nothing", "--all", "slow:kernels"):
        with pytest.raises(ValueError, match=f"--base {wrong}: no such commit"):
            Base(wrong, repository)
    with pytest.raises(ValueError, match="needs git and a checkout"):
        Base("slow", tmp_path)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, table, picture = (tmp_path / "made" / name for name in ("k.json", "k.csv", "k.png"))
    small = ["--n", "8", "40", "--d", "16", "--k", "8", "--repeats", "2", "--device", "cpu"]
    command = ["bench", "kernels", "--op", "match", "compact", *small, "--out", str(out)]
    assert main([*command, "--csv", str(table), "--plot", str(picture)]) == 0
    shown = capsys.readouterr().out
    assert "compact: k of N tokens" in shown and "over naive" in shown
    rows = read(out)
    wanted = [(op, n, p) for op in ("match", "compact") for n in (8, 40) for p in ("naive", "blocked")]
    assert [(row.op, row.n, row.provider) for row in rows] == wanted
    for row in rows:
        assert row.note is None and row.rounds == 2 and row.peak_bytes is not None and row.roofline and row.roofline > 0
        assert 0 < (row.q20_ms or 0) <= (row.q50_ms or 0) <= (row.q80_ms or 0)
    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [list(line) for line in lines] == [[f.name for f in dataclasses.fields(Row)]] * 8
    assert [float(line["q50_ms"]) for line in lines] == [row.q50_ms for row in rows]
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
    text = readme_kernels(rows)
    assert "N = 8 / 40 tokens" in text and "| `compact` | 16 | 8 |" in text and text.count("\n| `") == 2


def test_records_are_continued(tmp_path: Path, played: type[Played]) -> None:
    played.script = {("naive", 5): 1.0, ("blocked", 5): 2.0}
    (old,) = measure(Sweep(ops=["match"], n=[5], d=[4]))
    newer = [dataclasses.replace(old[1], q50_ms=7.0), dataclasses.replace(old[0], n=6)]
    path = tmp_path / "deep" / "rows.json"
    write(merged(old, newer), path)
    assert read(path) == [old[0], newer[0], newer[1]]
    assert isinstance(json.loads(path.read_text()), list)
    path.write_text('{"families": {}}')
    with pytest.raises(ValueError, match="is no record of `mmcompress bench kernels`"):
        read(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--op", "match", "sort"], "no op 'sort'; choose among match, "),
        (["--provider", "fast"], "no provider 'fast'; choose among naive, compile, blocked, triton"),
        (["--provider", "naive", "naive"], "give each provider once"),
        (["--dtype", "int8"], "no dtype 'int8'; choose among float32, float16, bfloat16"),
        (["--n", "0"], "n=0; give numbers from 1"),
        (["--repeats", "0"], "repeats=0"),
        (["--patience", "-1"], "patience=-1"),
        (["--device", "tpu"], "--device tpu cannot be used"),
        (["--device", "cpu", "--provider", "triton"], "provider triton needs a CUDA device"),
        (["--base", "no-such-revision"], "--base no-such-revision"),
        (["--plan", "tome"], "by itself"),
        (["--op", "max_min", "--n", "4", "--k", "9", "--device", "cpu"], "every k is above every N"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], played: type[Played]
) -> None:
    assert main(["bench", "kernels", *arguments]) == 2
    assert message in capsys.readouterr().err and not played.asked


def test_options_at_the_wrong_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "llava"]) == 2 and "by itself" in capsys.readouterr().err
    assert main(["bench", "llava", "--base", "HEAD"]) == 2
    assert "--base belongs to `mmcompress bench kernels`" in capsys.readouterr().err
    assert main(["bench", "--list"]) == 0 and "kernels" in capsys.readouterr().out


def test_sweeps() -> None:
    usual, full = Sweep.usual("cpu"), Sweep.usual("cpu", full=True, n=[7])
    assert set(usual.ops) == set(OPERATIONS) and "compile" in full.providers and list(full.n) == [7]
    assert 32768 in usual.n and set(full.dtypes) == set(operations.DTYPES)


# ---------------------------------------------------------------------- block sizes
def test_block_sizes_descend_to_the_fastest() -> None:
    tried = []

    def clock(config: dict[str, int]) -> float:
        tried.append(tuple(config.values()))
        cost = abs(config["rows"] - 128) + 8 * abs(config["num_stages"] - 4) + 1.0
        return math.inf if config["rows"] < 16 else cost / 113  # 113: what the start costs

    best, part = tune.descend({"rows": 32, "num_stages": 2}, clock)
    assert best == {"rows": 128, "num_stages": 4} and part == 1 / 113 and len(tried) == len(set(tried))
    assert (64, 3) in tried  # two gains of one round, together


def test_block_sizes_are_tried_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    device, seen = torch.device("cpu"), []
    before = configs.CONFIGS["match"]
    tune._prepared.cache_clear()
    assert tune.table_of("match", "float32") == "match_float32"
    assert tune.table_of("match", "bfloat16") == "match" and tune.table_of("max_min", "float32") == "diverse"

    def made(op: str, provider: str, call: Any) -> Callable[[], Tensor]:
        def run() -> Tensor:
            config = configs.config("match", device)
            seen.append(config)
            if config["num_warps"] > 4:
                raise RuntimeError("out of resources")
            return torch.zeros(9) if config["columns"] == 64 else torch.ones(9)

        return run

    monkeypatch.setattr(tune, "caller", made)
    cases = tune.cases_of("match", [(9, 4)], ["bfloat16"])
    assert cases == [tune.Case("match", Size(9, 4, 1, "bfloat16"))]
    clock = tune.Clock("match", cases, device, lambda run: (run(), 10.0 / configs.config("match", device)["rows"])[1])
    start = before["default"]
    assert clock(start | {"rows": 256}) == pytest.approx(start["rows"] / 256)
    assert clock(start | {"num_warps": 8}) == clock(start | {"columns": 128}) == math.inf
    assert sorted(why.partition(" in")[0] for why in clock.why.values()) == [
        "RuntimeError: out of resources",
        "other results",
    ]
    assert configs.CONFIGS["match"] is before and len(seen) > 3
    tune._prepared.cache_clear()


def test_every_table_of_block_sizes_has_cases() -> None:
    for table in configs.CONFIGS:
        cases = tune.cases_of(table, [(24, 16), (48, 16)], ["float32", "bfloat16"])
        assert cases and all(tune.table_of(case.op, case.size.dtype) == table for case in cases)


def test_results_alike_but_for_rounding() -> None:
    picks, other = torch.arange(50)[None], torch.arange(50)[None].roll(1)
    assert tune.alike([picks], [other], 100) and not tune.alike([picks], [other], 50)  # picks in another order; matches
    assert not tune.alike([picks], [picks + 25], 100)
    x = torch.linspace(0, 1, 200)
    assert tune.alike([x + 1e-4], [x], 10) and not tune.alike([x + 0.1], [x], 10) and not tune.alike([x / 0], [x], 10)


def test_the_table_of_block_sizes_is_written_as_it_stands() -> None:
    """Formatted as ruff does; what is written into the source is there when it is read again, and nothing else differs."""
    source = Path(configs.__file__).read_text()
    assert tune.rendered(configs.CONFIGS) in source and tune.written(source, "hopper", {}) == source
    found = {"match": {**configs.CONFIGS["match"]["default"], "rows": 128}, "diverse": {"side": 32}}
    text = tune.written(source, "hopper", found)
    there: dict[str, Any] = {}
    exec(compile(text, "configs", "exec"), there)
    for name, families in there["CONFIGS"].items():
        assert families["default"] == configs.CONFIGS[name]["default"] and families.get("hopper") == found.get(name)
    formatted = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--line-length", "120", "-"],
        input=text,
        capture_output=True,
        text=True,
    )
    assert formatted.returncode or formatted.stdout == text  # where ruff is installed
    with pytest.raises(ValueError, match="no table CONFIGS"):
        tune.written("CONFIGS = {}", "hopper", {})
