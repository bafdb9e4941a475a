# SPDX-License-Identifier: Apache-2.0
"""Step `native`: the kernels' own tests, on the device. What they print is read as they go, so that a late end loses nothing."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .bench import Bench, Item, Skip

ROOT = Path(__file__).resolve().parents[2]
WORDS = re.compile(r"(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)")
TEST = re.compile(r"(tests/(test_kernel_\w+)\.py::\S+)")
NO_DEVICE = ("test_kernel_compile",)
"""Tests of another machine than the one at hand."""


def native(bench: Bench) -> dict[str, Item]:
    return {"kernels": lambda: _tests(bench), "missing": _missing}


def _missing() -> Iterator[dict[str, Any]]:
    """Packages whose absence leaves something out, here or in the library."""
    for name in ("flash_attn", "timm", "open_clip", "decord", "hypothesis", "xdist"):
        yield {"package": name, "there": importlib.util.find_spec(name) is not None}


def _tests(bench: Bench) -> Iterator[dict[str, Any]]:
    """A row per test file, and one per test that failed."""
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    files = sorted(p for p in (ROOT / "tests").glob("test_kernel_*.py") if p.stem not in NO_DEVICE)
    if not files:
        raise Skip(f"no tests in {ROOT}: this is no checkout")
    options = ["-m", "not slow"]
    if bench.dry:
        files, options = [ROOT / "tests" / "test_kernel_merge.py"], ["-k", "wrong_arguments"]
    elif importlib.util.find_spec("xdist") is not None:
        options += ["--numprocesses", str(max(1, min(10, (os.cpu_count() or 2) - 4))), "--dist", "worksteal"]
    command = [
        sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--tb=line", "--color=no", "--import-mode=append",
        f"--rootdir={ROOT}", "-c", str(ROOT / "pyproject.toml"),
    ]  # fmt: skip
    run = subprocess.Popen(
        [*command, *options, *map(str, files)], cwd=bench.folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
    )  # fmt: skip
    counts: dict[str, dict[str, int]] = {}
    assert run.stdout is not None
    alarm = threading.Timer(max(1.0, bench.left()), run.kill)
    alarm.start()
    for line in run.stdout:
        print(line, end="", flush=True)
        test, word = TEST.search(line), WORDS.search(line)
        if test is None or word is None or line.startswith(("FAILED", "ERROR")):  # the last: of the summary at the end
            continue
        mine = counts.setdefault(test[2], {})
        mine[word[1].lower()] = mine.get(word[1].lower(), 0) + 1
        if word[1] in ("FAILED", "ERROR"):
            yield {"test": test[1], "outcome": word[1].lower()}
    status = run.wait()
    alarm.cancel()
    for name, found in counts.items():
        yield {"file": name, **found}
    yield {"exit_status": status}
    if status != 0:
        raise RuntimeError("no time was left for all tests" if status < 0 else f"pytest ended with status {status}")


def summed(rows: list[dict[str, Any]]) -> dict[str, int]:
    """Tests by outcome over all files."""
    words = ("passed", "failed", "error", "skipped")
    return {word: sum(row.get(word, 0) for row in rows if "file" in row) for word in words}
