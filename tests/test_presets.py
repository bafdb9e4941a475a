# SPDX-License-Identifier: Apache-2.0
"""Presets: what they stand for comes from records, is printed by the report, and a wrong name is answered with the right ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcompress.eval import presets as measuring

import mmcompress as mm
from mmcompress import presets
from mmcompress.catalog import check_plan
from mmcompress.cli import main

from .tiny import build, prompts

ROOT = Path(__file__).parent.parent
RECORD = presets.measured()


@pytest.mark.parametrize("name", presets.NAMES)
def test_presets_are_what_their_sources_say(name: str) -> None:
    records = [json.loads((ROOT / source).read_text()) for source in RECORD["sources"]]
    for record in records:
        (task,) = record["tasks"]
        score = {
            point["plan"]: point["tasks"][task]["scores"]["accuracy"] for point in record["points"] if point["tasks"]
        }
        found = presets.preset(name, measuring.type_of(record["model"]))
        assert found.models == (record["model"],) and found.questions == record["tasks"][task]["questions"]
        assert found.points == pytest.approx(100 * (score[found.plan] - score["stock"]), abs=0.06)
        assert -measuring.LOSS[name] <= found.points + 0.05
    assert presets.preset(name, "some_new_model").family == "" and mm.as_pipeline(name).stages
    found = mm.as_pipeline(name, family="llava")
    assert repr(found) == presets.preset(name, "llava").plan and f"{name} for llava: " in found.preset


def test_better_presets_lose_less_and_keep_more() -> None:
    for about in (*RECORD["families"].values(), RECORD["others"]):
        rows = [about["presets"][name] for name in presets.NAMES]
        assert [row["points"] for row in rows] == sorted(row["points"] for row in rows)
        assert [row["tokens"] for row in rows] == sorted(row["tokens"] for row in rows)


def test_the_choice_is_made_by_rule(tmp_path: Path) -> None:
    def point(plan: str, marks: str, left: float) -> dict[str, Any]:
        visual = {"prompt": 100, "mean_of_layers": left}
        told = {"marks": {"color": marks}, "visual": visual}
        return {"plan": plan, "method": plan.partition("(")[0], "refused": None, "tasks": {"shapes": told}}

    right = 200 * "1"
    points = [
        point("stock", right, 100), point("voronoi(keep=0.5)", right, 50), point("voronoi(keep=0.25)", right[5:] + 5 * "0", 25),
        point("voronoi(keep=0.1)", right[14:] + 14 * "0", 10), point("dart(keep=0.1)", right[5:] + 5 * "0", 30),
        point("uniform(keep=0.1)", right, 1),
    ]  # fmt: skip
    record = {"model": "llava-shapes", "tasks": {"shapes": {"questions": 200}}, "points": points}
    chosen = measuring.chosen([record])["presets"]
    assert {name: row["plan"] for name, row in chosen.items()} == {
        "quality": "voronoi(keep=0.5)", "balanced": "voronoi(keep=0.25)", "fast": "voronoi(keep=0.1)",
    }  # fmt: skip
    assert chosen["fast"]["points"] == -7.0 and chosen["fast"]["tokens"] == 0.1


def test_a_preset_on_a_model() -> None:
    model = build()
    inputs = prompts(model, [[2, "image", 5]])
    for plan, told in (("balanced", True), (presets.preset("balanced", "llava").plan, False)):
        with mm.compressed(model, plan), torch.no_grad():
            model(**inputs)
            said = str(mm.report(model))
        assert said.startswith(f"plan      {presets.preset('balanced', 'llava').plan}\n")
        assert ("preset    balanced for llava: -" in said) == told


def test_commands_take_the_preset_of_the_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One that is another plan for this family than on average; records and tables have the plan, and a line says so."""
    from mmcompress.eval.sweep.run import points

    model = build()
    name = next(n for n in presets.NAMES if presets.preset(n, "llava").plan != presets.preset(n).plan)
    plan = presets.preset(name, "llava").plan
    assert [one.plan for one in points([name], [], model)] == ["stock", plan] and points([name], [])[1].plan != plan
    line = ["llava-shapes", "--plan", name, "--questions", "7", "--device", "cpu", "--out", str(tmp_path)]
    for command in (["eval", *line], ["sweep", *line, "--repeats", "0", "--examples", "0"]):
        assert main(command) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert f"{plan} is {name} for llava: " in out
        assert any(json.loads(p.read_text())["settings"]["plan"] == plan for p in tmp_path.glob("shapes_*.json"))


@pytest.mark.parametrize(
    ("plan", "options", "words"),
    [
        (
            "balance",
            {},
            "unknown method 'balance': did you mean 'balanced'? there are the presets fast, balanced, quality",
        ),
        ("fast", {"keep": 0.5}, "'fast' is a preset, a whole plan"),
        ("fast >> fastv", {}, "'fast' is a preset, a whole plan"),
        ("quality(keep=0.5)", {}, "as a plan it is "),
    ],
)
def test_wrong_names(plan: str, options: dict[str, Any], words: str) -> None:
    for read in (mm.as_pipeline, *([] if options else [check_plan])):
        with pytest.raises(ValueError, match=words.replace("?", r"\?")):
            read(plan, **options)
    with pytest.raises(ValueError, match="is the name of a preset"):
        mm.register("fast")
    with pytest.raises(ValueError, match="no preset 'slow'"):
        presets.preset("slow")
