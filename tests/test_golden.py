# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .golden.form import RUNNERS, TEXT_RUNNERS
from .golden.replay import cases, replay

FOLDER = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("name", "case", "path"), cases(FOLDER))
def test_golden(name: str, case: str, path: Path) -> None:
    assert replay(name, path) == "ok"


def test_every_runner_has_a_case() -> None:
    assert {name for name, _, _ in cases(FOLDER)} == set(RUNNERS) | set(TEXT_RUNNERS)


def test_the_command_sees_a_difference(tmp_path: Path) -> None:
    for suffix in ("npz", "json"):
        shutil.copy(FOLDER / f"divprune_a.{suffix}", tmp_path)
    command = [sys.executable, "-m", "tests.golden", str(tmp_path)]
    good = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent.parent)
    assert (good.returncode, good.stdout.strip()) == (0, "divprune a ok")
    with np.load(tmp_path / "divprune_a.npz") as loaded:
        arrays = dict(loaded)
    arrays["selected_sorted"][0] += 1
    np.savez(tmp_path / "divprune_a.npz", **arrays)
    bad = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent.parent)
    assert bad.returncode == 1
    assert "selected_sorted: 1 of 16 indices differ" in bad.stdout
