# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .golden.__main__ import main
from .golden.form import RUNNERS, TEXT_RUNNERS
from .golden.replay import cases, replay

FOLDER = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("name", "case", "path"), cases(FOLDER))
def test_golden(name: str, case: str, path: Path) -> None:
    assert replay(name, path) == "ok"


def test_every_runner_has_a_case() -> None:
    assert {name for name, _, _ in cases(FOLDER)} == set(RUNNERS) | set(TEXT_RUNNERS)


def test_the_command_sees_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (*FOLDER.glob("divprune_a.*"), *FOLDER.glob("fastv_a.*")):
        shutil.copy(path, tmp_path)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == ["divprune a ok", "fastv a ok"]
    with np.load(tmp_path / "divprune_a.npz") as loaded:
        arrays = dict(loaded)
    arrays["selected_sorted"][0] += 1
    np.savez(tmp_path / "divprune_a.npz", **arrays)
    command = [sys.executable, "-m", "tests.golden", str(tmp_path)]
    bad = subprocess.run(command, capture_output=True, text=True, cwd=FOLDER.parent.parent)
    assert bad.returncode == 1
    assert "selected_sorted: 1 of 16 indices differ" in bad.stdout and "fastv a ok" in bad.stdout
