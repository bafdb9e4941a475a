# SPDX-License-Identifier: Apache-2.0
"""`mmcompress models` and docs/models.md say what the table of the crossed test says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from mmcompress.architectures import (
    ABSENT,
    CHECKPOINTS,
    COLUMNS,
    NEWEST,
    REASONS,
    Architecture,
    architectures,
    counts,
    markdown,
    publish,
    summary,
    table,
)
from mmcompress.cli import main

from .architectures import OLDEST

Said = pytest.CaptureFixture[str]
ROOT = Path(__file__).parent.parent


def test_the_page_and_the_readme_are_current() -> None:
    """Else: `python -m mmcompress.architectures`."""
    assert (ROOT / "docs" / "models.md").read_text() == markdown()
    text = (ROOT / "README.md").read_text()
    seeing = [one for one in architectures() if one.image_text]
    exact = sum(one.row["input"] == "ok" for one in seeing)
    assert f"{exact} of the {len(seeing)} image-text architectures" in text


def test_publishing_writes_the_page(tmp_path: Path) -> None:
    publish(tmp_path)
    assert (tmp_path / "docs" / "models.md").read_text() == markdown()
    assert summary() in markdown()


def test_counts_are_those_of_the_rows() -> None:
    rows = [row for row in table().values() if "task" not in row]
    for kind, heading in (("input", "before the LLM"), ("layer", "in the LLM"), ("encoder", "in the encoder")):
        ok = sum(row[kind] == "ok" for row in rows)
        assert f"{heading} {ok} of {len(rows)}" in counts(architectures())
    seen = [row["video"] for row in rows if row["video"] != "no videos"]
    assert f"videos {seen.count('ok')} of {len(seen)}" in counts(architectures())
    refused = sum(row["input"] == "windows" for row in rows)
    assert f"windows {refused}" in summary() or not refused


def test_every_reason_is_told() -> None:
    said = {one.row.get(kind, "ok") for one in architectures() for kind in (*COLUMNS, "signal")}
    assert said <= {"ok", *REASONS}
    for word in said - {"ok", *ABSENT}:
        assert f"* **{word}**: {REASONS[word][1]}." in markdown()


def test_a_reason_for_everything_is_said_once() -> None:
    refused = dict.fromkeys((*COLUMNS, "signal"), "windows") | {
        "video": "no videos",
        "signals": [],
        "positions": ["keep"],
    }
    assert Architecture("x", refused, ()).cells == ["windows", "-", "-", "-", "-", "-", "-"]
    some = {"input": "ok", "video": "ok", "audio": "no audio", "layer": "states", "signal": "ok", "encoder": "tower",
            "signals": ["CLS"], "positions": ["keep", "reindex"]}  # fmt: skip
    assert Architecture("x", some, ()).cells == ["yes", "yes", "-", "states", "tower", "CLS", "keep, reindex"]


@pytest.mark.skipif(OLDEST, reason="the table is that of the newest transformers")
def test_checkpoints_are_of_architectures_that_exist() -> None:
    assert transformers.__version__.startswith(NEWEST)
    known = json.loads(CHECKPOINTS.read_text())
    assert set(known) - set(table()) <= set(transformers.CONFIG_MAPPING)
    names = [name.rpartition(" ")[2] for names in known.values() for name in names]
    assert all(name.count("/") == 1 for name in names)
    assert len(set(table()) - set(known)) <= 30, "most architectures name a checkpoint"


def test_rows_by_a_word(capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["models", "Qwen3-VL", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"qwen3_vl", "qwen3_vl_moe"}
    assert main(["models", "gemma3", "pixtral"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "gemma3n" in out
        and "mistral-community/pixtral-12b" in out
        and "4 architectures. Exact: before the LLM" not in out
    )
    assert "3 architectures. Exact: before the LLM" in out
    assert main(["models", "--markdown"]) == 0 and capsys.readouterr().out == markdown()
    assert main(["models", "no such model"]) == 2
    assert "no architecture or checkpoint with no such model" in capsys.readouterr().err


def test_all_rows(capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert all(
        name in out for name in table()
    ) and f"{len(table())} architectures. Exact: {counts(architectures())}" in (" ".join(out.split()))
