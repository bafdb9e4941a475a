# SPDX-License-Identifier: Apache-2.0
"""`make gpu` without a GPU: every step runs dry, the runner outlives what fails, and a dry record passes for no measurement."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcompress.eval.gpu import bench as bench_module
from mmcompress.eval.gpu import report, waits, worker
from mmcompress.eval.gpu import run as runner
from mmcompress.eval.gpu.bench import Bench, Skip, same_bits
from mmcompress.eval.gpu.plan import GROUPS, STEPS, Step, seconds
from mmcompress.eval.gpu.tome import ViT, merge, official
from mmcompress.kernels import configs
from mmcompress.kernels.dispatch import has_triton, interpreted

import mmcompress as mm
from mmcompress.ops import bipartite_match, merge_mean
from mmcompress.records import RecordError

pytestmark = pytest.mark.skipif(
    not (has_triton() and interpreted()), reason="a dry run needs Triton's interpreter (tests/conftest.py)"
)
ROOT = Path(__file__).parent.parent
QUICK = ("device", "blocks", "waits", "selection", "tome")
IN_PROCESS = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in STEPS if name != "native"]
"""The other one starts pytest."""


def dry(folder: Path, seconds: float = 600) -> Bench:
    return Bench(True, folder, time.monotonic() + seconds)


def made(name: str, bench: Bench) -> dict[str, Any]:
    """A step's part of a record, run in this process."""
    lines = bench.folder / f"{name}.lines"
    assert worker.go(worker.items_of(name, bench), bench, lines)
    return runner.part(STEPS[name], worker.read(lines), True, "ok", 1.0)


@pytest.mark.parametrize("name", IN_PROCESS)
def test_every_step_runs_dry_and_says_so(name: str, tmp_path: Path) -> None:
    source = Path(configs.__file__).read_text()
    found = made(name, dry(tmp_path))
    assert not found["failed"] and found["status"] == "ok" and found["rows"]
    assert found["dry"] and all(row["dry"] for row in found["rows"])
    assert json.loads(json.dumps(found)) == found
    assert report.SHOWN[name](found["rows"])
    assert Path(configs.__file__).read_text() == source  # a dry run writes no block sizes
    for row in found["rows"]:
        assert row.get("same_bits", True) and row.get("same_bits_in_streams", True), row
        assert (
            row.get("captured") is None and row.get("allowed") is None
        )  # there was no graph, and no device to wait for


@pytest.mark.slow
def test_the_command_runs_all_of_it_without_an_installation(tmp_path: Path) -> None:
    """With a folder of links for a package, from another folder, one process for most steps."""
    command = ["make", "-C", str(ROOT), "gpu", f"PYTHON={sys.executable}", f"GPU_OUT={tmp_path}"]
    out = subprocess.run([*command, "GPU_OPTIONS=--dry --commit abc1234"], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 0, out.stdout + out.stderr
    record = json.loads((tmp_path / "gpu-dry.json").read_text())
    assert {p.name for p in tmp_path.iterdir()} == {"gpu-dry.json", "log-dry.txt", "configs-dry.py"}
    assert record["dry"] and "no measurement" in record["machine"]["device"] and record["machine"]["commit"]
    assert list(record["steps"]) == list(STEPS)
    for name, found in record["steps"].items():
        assert found["status"] == "ok" and found["rows"] and found["dry"], (name, found)
        assert all("is not installed" in one["skipped"] for one in found["skipped"]), found["skipped"]
    assert report.summed(record["steps"]["native"]["rows"])["passed"] > 0
    with pytest.raises(RecordError, match=r"dry run.*measures nothing"):
        report.load(tmp_path / "gpu-dry.json")


def test_the_steps_fit_in_nine_minutes() -> None:
    assert sum(seconds(group, False) for group in GROUPS) <= 540
    assert len(STEPS) == sum(map(len, GROUPS)) and set(report.SHOWN) == set(STEPS)


def test_a_real_run_is_refused_where_there_is_no_gpu(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "mmcompress.eval.gpu", "--out", str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 2 and "no CUDA device" in out.stderr and not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- what fails
def test_an_item_that_fails_is_skipped_or_late_stops_no_other(tmp_path: Path) -> None:
    bench, lines = dry(tmp_path), tmp_path / "lines"

    def fine() -> Iterator[dict[str, Any]]:
        yield {"value": 1}

    def broken() -> Iterator[dict[str, Any]]:
        yield {"value": 2}
        raise ValueError("of no use")

    def absent() -> Iterator[dict[str, Any]]:
        raise Skip("flash_attn is not installed")
        yield {}

    assert worker.go({"a": broken, "b": absent, "c": fine}, bench, lines)
    late = Bench(True, tmp_path, time.monotonic())
    assert worker.go({"a": fine, "d": fine}, late, lines)  # a is known already, d has no time
    found = runner.part(STEPS["mass"], worker.read(lines), True, "ok", 1.0)
    assert found["status"] == "failed" and [row["value"] for row in found["rows"]] == [2, 1]
    assert found["failed"][0]["failed"] == "ValueError: of no use" and "test_gpu.py:" in found["failed"][0]["where"]
    assert [(one["item"], one["skipped"]) for one in found["skipped"]] == [
        ("b", "flash_attn is not installed"),
        ("d", "no time was left"),
    ]
    said = runner.summary("mass", found)
    assert "failed a: ValueError" in said and "skipped b: flash_attn" in said


STUB = """
import json, os, sys, time
for line in sys.stdin:
    request = json.loads(line)
    step, lines = request["step"], request["lines"]
    if step == "never":
        os._exit(1)
    known = open(lines).read() if os.path.exists(lines) else ""
    def write(**more):
        with open(lines, "a") as file:
            file.write(json.dumps({**more, "dry": request["dry"]}) + "\\n")
    for item in ("one", "two", "three"):
        if f'"{item}"' in known:
            continue
        write(item=item, began=True)
        if step == "dies" and item == "two":
            os._exit(3)
        if step == "hangs" and item == "two":
            time.sleep(60)
        write(item=item, row={"value": item, "process": os.getpid()})
        write(item=item, done=0.1)
    print(json.dumps({"done": step}), flush=True)
"""


def test_a_process_that_dies_or_hangs_costs_its_item_and_no_other_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "WORKER", [sys.executable, "-c", STUB])
    monkeypatch.setattr(runner, "here", lambda dry, commit: {"device": "stub", "commit": commit})
    steps = [Step(name, name, 4, 4, name) for name in ("fine", "dies", "hangs", "never", "after")]
    said: list[str] = []
    groups = [tuple(steps[:2]), *((step,) for step in steps[2:])]
    path = runner.run(tmp_path, True, "abc", say=said.append, groups=groups)
    found = json.loads(path.read_text())["steps"]
    values = {name: [row["value"] for row in part["rows"]] for name, part in found.items()}
    whole = ["one", "two", "three"]
    assert values == {"fine": whole, "dies": ["one", "three"], "hangs": ["one"], "never": [], "after": whole}
    assert {name: part["status"] for name, part in found.items()} == {
        "fine": "ok", "dies": "failed", "hangs": "late", "never": "lost", "after": "ok",
    }  # fmt: skip
    assert found["dies"]["failed"] == [{"item": "two", "failed": "was lost with its process", "where": ""}]
    assert found["hangs"]["failed"][0]["failed"] == "was ended: it took too long" and found["hangs"]["took_s"] < 30
    assert found["fine"]["rows"][0]["process"] != found["dies"]["rows"][0]["process"]
    assert any("hangs: late" in line for line in said)


# ---------------------------------------------------------------------- parts that a GPU would run otherwise
def test_places_that_wait_are_told_with_their_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch warns of on a GPU, here by hand: the line that asked, and whether it is ours."""
    import warnings

    monkeypatch.setattr(waits, "sync_mode", bench_module.sync_mode)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    with waits.watching(torch.device("cuda")) as found:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert len(found) == 2 and all("test_gpu.py:" in line and not ours for line, ours in found)
    monkeypatch.setattr(waits, "FOLDERS", (str(Path(__file__).parent),))
    with waits.watching(torch.device("cpu")) as found:
        torch.ones(3).sum().item()
    assert len(found) == 1 and found[0][1]


def test_a_prefill_that_waits_twice_is_not_allowed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = SimpleNamespace()
    monkeypatch.setattr(waits, "loaded", lambda *_: (model, {}))
    monkeypatch.setattr(waits, "as_plan", lambda *_: bench_module.sync_mode("", torch.device("cpu")))
    monkeypatch.setattr(waits, "FOLDERS", (str(Path(__file__).parent),))
    reads = {"prefill": 2, "step": 1}

    def ask(name: str) -> Any:
        def run(*_: Any) -> None:
            for _ in range(reads[name]):
                torch.ones(3).sum().item()

        return run

    monkeypatch.setattr(waits, "prefill", ask("prefill"))
    monkeypatch.setattr(waits, "step", ask("step"))
    for prefills, steps in ((2, 0), (1, 1)):
        reads |= {"prefill": prefills, "step": steps}
        rows = list(waits._plan(dry(tmp_path), "m", "p"))
        assert [row["ours"] for row in rows] == [prefills, waits.STEPS * steps]
    assert waits.allowed("prefill", ["a"], True, None) and not waits.allowed("prefill", ["a", "a"], True, None)
    assert waits.allowed("decode", [], True, "of another") and not waits.allowed("decode", ["a"], True, None)
    assert not waits.allowed("decode", [], False, "where nobody was told to wait")


def test_bits() -> None:
    nan = torch.tensor([1.0, math.nan])
    assert same_bits([nan, {"a": nan}], (nan.clone(), {"a": nan.clone()}))
    assert not same_bits(torch.tensor(0.0), torch.tensor(-0.0)) and not same_bits(torch.ones(2), torch.ones(1, 2))


@torch.no_grad()
def test_the_official_way_is_the_method() -> None:
    """Its merge against ours, and the whole ViT against ours in float64."""
    torch.manual_seed(0)
    x, size, metric = torch.randn(2, 17, 8), torch.rand(2, 17, 1) + 0.5, torch.randn(2, 17, 4)
    found, total = merge(x, size, metric, 5)
    target, count = bipartite_match(metric, 5, 1)
    expected, sizes = merge_mean(x, size[..., 0], target, count)
    assert torch.allclose(found, expected, atol=1e-5) and torch.allclose(total[..., 0], sizes, atol=1e-5)
    model = ViT(width=32, depth=3, heads=4, side=7, pixels=28).eval().double()
    pixels = torch.randn(2, 3, 28, 28, dtype=torch.float64)
    stock = model(pixels)
    assert torch.allclose(official(model, pixels, [0, 0, 0]), stock)
    merged = official(model, pixels, [2, 3, 1])
    with mm.compressed(model, mm.ToMe(r=(2, 3, 1))):
        assert torch.allclose(model(pixels), merged, atol=1e-5)
    assert not torch.allclose(merged, stock)
    assert torch.equal(model(pixels), stock)


# ---------------------------------------------------------------------- the section of docs/speed.md
def a_record(tmp_path: Path, **changes: Any) -> Path:
    here = {
        "device": "NVIDIA H200",
        "driver": "580",
        "torch": "2.11.0",
        "transformers": "5.17.0",
        "commit": "abc",
        "packages": {},
    }
    part = {
        "dry": False,
        "rows": [{"copy_bytes_per_s": 4.3e12, "matmul_flops_per_s": {"bfloat16": 7.9e14}}],
        "failed": [],
    }
    lost = {"dry": False, "rows": [], "failed": [{"item": "two"}]}
    record = {"mmcompress": "gpu", "dry": False, "machine": here, "steps": {"device": part, "mass": lost}, **changes}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(record))
    return path


def test_a_section_of_what_was_measured_or_of_nothing(tmp_path: Path) -> None:
    assert report.section(report.load(tmp_path / "gpu.json")) == report.NONE
    text = report.section(report.load(a_record(tmp_path)))
    assert "4.30 TB/s" in text and "bfloat16 790" in text and "NVIDIA H200" in text and "mass: two" in text
    for changes in (
        {"dry": True},
        {"steps": {"device": {"dry": True, "rows": [], "failed": []}}},
        {"mmcompress": "cost"},
    ):
        with pytest.raises(RecordError):
            report.load(a_record(tmp_path, **changes))


def test_the_page_has_the_section_of_the_record() -> None:
    text = (ROOT / "docs" / "speed.md").read_text()
    found = report.section(report.load(ROOT / "results" / "gpu" / "gpu.json"))
    assert f"<!-- begin gpu -->\n{found}\n<!-- end gpu -->" in text
