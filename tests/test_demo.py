# SPDX-License-Identifier: Apache-2.0
"""The demo: one question, accuracy, real time, one sentence and a page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmcompress.cli import main


@pytest.mark.slow
def test_the_demo_ends_with_a_sentence_and_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["demo", "--questions", "14", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    record = json.loads((tmp_path / "first.json").read_text())
    stock, balanced, fast, control = record["rows"]
    assert (
        stock["name"] == "stock model"
        and balanced["name"].startswith("balanced: ")
        and control["plan"].startswith("random")
    )
    assert stock["cost"]["total_flops"] > balanced["cost"]["total_flops"] > fast["cost"]["total_flops"]
    assert stock["accuracy"] > 0.8 and record["wider"] == [8, 4]
    assert f"{balanced['plan']} answers {balanced['accuracy']:.1%} of 14 questions right, the stock model " in said
    assert f"times as soon ({stock['cost']['milliseconds']['ttft']['median']:.0f} ms, then " in said
    assert (tmp_path / "explain.html").resolve().as_uri() in said and "…" not in said
    assert said.index("asked ") < said.index("14 questions, with 4 plans") < said.index("the clock, on a copy")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--questions", "6"], "--questions 6: at least 7"), (["--keep", "64"], "--keep 64: a count"),
        (["--model", "llava-shapes@8x4"], "widens its model by itself"),
    ],
)  # fmt: skip
def test_mistakes_before_any_work(more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *more]) == 2
    assert words in capsys.readouterr().err
