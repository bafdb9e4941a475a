# SPDX-License-Identifier: Apache-2.0
"""Advice: agreement with the stock model, limits that hold, and a command that ends with a line to copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mmcompress as mm
from mmcompress.advice import LADDER, Advice, advise, agreement, answers_of, best, candidates
from mmcompress.cli import main

from .tiny import build, prompts


def test_agreement_is_that_of_the_words_behind_the_same_words() -> None:
    model = build()
    inputs = prompts(model, [[3, "image", 6]])
    told = answers_of(model, inputs, 8)
    assert agreement(model, inputs, told) == 1.0
    other = told.clone()
    other[0, 3] = (told[0, 3] + 1) % 140
    with torch.no_grad():  # what it would write behind each part of the other answer
        ids = torch.cat([inputs["input_ids"], other[:, :-1]], 1)
        mask = torch.ones_like(ids)
        logits = model(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
    expected = (logits[:, -other.shape[1] :].argmax(-1) == other).double().mean().item()
    assert agreement(model, inputs, other) == pytest.approx(expected) and expected < 1.0
    with mm.compressed(model, "uniform(keep=1.0)"):
        assert agreement(model, inputs, told) == 1.0


def test_advice_on_a_tiny_model() -> None:
    model = build()
    asked = [prompts(model, [[3, "image", 6]], seed=seed) for seed in (1, 2)]
    found = advise(model, asked, ["uniform(keep=1.0)", "uniform(keep=0.25)", "prumerge(keep=99)"], "tokens", 4, 1)
    by_plan = {one.plan: one for one in found}
    whole, quarter = by_plan["uniform(keep=1.0)"], by_plan["uniform(keep=0.25)"]
    assert whole.agreement == 1.0 and whole.left == 1.0 and quarter.left == 0.25 and quarter.cost is not None
    assert quarter.cost.flops_ratio < 1 and quarter.speedup > 0
    assert "only 16 visual tokens" in by_plan["prumerge(keep=99)"].refused
    assert sum(map(len, (one.presets for one in found))) == 3 and found[0].presets == ("fast",)
    assert not any(hasattr(model, name) for name in ("_mmcompress",)) and not mm.api.is_compressed(model)


def test_limits_hold_and_the_fastest_within_them_is_taken() -> None:
    class Timed(Advice):
        @property
        def speedup(self) -> float:
            return 1 / self.left

    mild, strong, odd = Timed("a", (), 0.995, 0.5), Timed("b", (), 0.97, 0.1), Timed("c", (), 0.999, 0.9)
    gone = Timed("d", refused="no")
    every = [gone, mild, strong, odd]
    assert best(every, 1.0, None) == (mild, True) and best(every, 5.0, None) == (strong, True)
    assert best(every, 1.0, 0.2) == (strong, False) and best(every, 0.0, None) == (odd, False)
    assert best(every, 0.0, 0.01) == (odd, False)
    with pytest.raises(ValueError, match="takes none of the plans; d: no"):
        best([gone], 1.0, None)


def test_every_candidate_is_tried_once() -> None:
    found = candidates("llava")
    assert len(found) <= len(LADDER) + 3 and {name for names in found.values() for name in names} == {
        "fast", "balanced", "quality",
    }  # fmt: skip
    assert [*candidates(None, ["tome(keep=0.5)"])][-1] == "tome(keep=0.5)"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--max-loss", "-1"], "--max-loss -1: at least 0"), (["--budget", "flops=2"], "budget=2.0"),
        (["--samples", "0"], "--samples 0: at least 1"), (["--image", "a.png", "--data", "x"], "--image or --data"),
        (["--budget", "words=0.5"], "tokens=0.3 or flops=0.3"), (["--plan", "voronoy"], "did you mean 'voronoi'?"),
    ],
)  # fmt: skip
def test_mistakes_before_any_work(more: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suggest", "llava-shapes", *more]) == 2
    assert words in capsys.readouterr().err


def test_the_command_ends_with_a_line_to_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "s.json"
    line = [
        "suggest",
        "llava-shapes",
        "--samples",
        "2",
        "--repeats",
        "1",
        "--plan",
        "uniform(keep=0.5)",
        "--max-loss",
        "100",
    ]
    assert main([*line, "--max-new-tokens", "4", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert record["fits"] and f"take {record['plan']}: first token " in said
    (line_,) = (one for one in said.splitlines() if one.startswith("Python:"))
    name = line_.partition("compress(model, '")[2].removesuffix("')")
    assert repr(mm.as_pipeline(name, family="llava")) == record["plan"]
    rows = {row["plan"]: row for row in record["rows"]}
    assert len(rows) == 4 and rows["uniform(keep=0.5)"]["left"] == 0.5
    assert "presets" in rows[record["plan"]] and "agreement" in said and "…" not in said
