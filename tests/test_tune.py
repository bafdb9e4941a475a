# SPDX-License-Identifier: Apache-2.0
"""The search for options of a plan: what it tries, judges and writes down, and plan files."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import mmcompress as mm
from mmcompress.cli import main
from mmcompress.spending import visual_tokens
from mmcompress.tune import (
    FINAL_STATE,
    Objective,
    Trial,
    _Suggest,
    final_state,
    parse_space,
    tune,
)

from .families import anyres, build, image, prompts


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llava_next", num_hidden_layers=8)


@pytest.fixture(scope="module")
def samples(model: Any) -> list[dict[str, Tensor]]:
    parts: list[list[Any]] = [[5, image("llava_next"), 4], [3, image("llava_next", True), 2, image("llava_next"), 6]]
    return [prompts(model, "llava_next", parts), prompts(model, "llava_next", parts[:1], seed=1)]


SPACE = {"vflowopt.t": (0.0, 3.0), "vflowopt.cell": (1.0, 6.0)}


# ---------------------------------------------------------------------- the search
def test_the_same_seed_gives_the_same_search_also_after_an_interruption(
    model: Any, samples: list[Any], tmp_path: Path
) -> None:
    path, shown = tmp_path / "logs" / "trials.jsonl", list[Trial]()
    options: dict[str, Any] = {"plan": "vflowopt", "space": SPACE, "budget": 0.25, "trials": 12}
    whole = tune(model, samples, **options, journal=path, show=shown.append)
    assert [t.number for t in whole.trials] == list(range(13)) and shown == whole.trials
    text = path.read_text()
    lines = text.splitlines(keepends=True)
    path.write_text("".join(lines[:8]) + lines[8][:20])  # the header, trials 0 to 6 and a part of the next
    again = tune(model, samples, **options, journal=path)
    assert again.trials == whole.trials and path.read_text() == text
    watched = list[int]()
    more = tune(model, samples, **options | {"trials": 13}, journal=path, show=lambda t: watched.append(t.number))
    assert more.trials[:13] == whole.trials and len(more.trials) == 14 and watched == list(range(14))
    other = tune(model, samples, **options | {"trials": 2}, seed=1)
    assert other.trials[0] == whole.trials[0] and other.trials[1].params != whole.trials[1].params
    with pytest.raises(ValueError, match="journal of another search \\(other seed"):
        tune(model, samples, **options, seed=1, journal=path)
    with pytest.raises(ValueError, match="other samples"):
        tune(model, samples[:1], **options, journal=path)
    path.write_text(lines[0] + "garbage\n" + lines[1])
    with pytest.raises(ValueError, match="line 2 is damaged"):
        tune(model, samples, **options, journal=path)


def test_what_is_found_can_be_used(model: Any, samples: list[Any], tmp_path: Path) -> None:
    found = tune(model, samples, "vflowopt", SPACE, budget=0.25, trials=4)
    assert not hasattr(model, "_mmcompress_engine")
    bounds = {"vflowopt.r1": (0.25, 0.375), "vflowopt.r2": (8 / 15, 1.0), **SPACE}
    for trial in found.trials[1:]:
        assert trial.params.keys() == bounds.keys()
        assert all(low <= trial.params[name] <= high for name, (low, high) in bounds.items())
    assert found.best.value == max(t.value for t in found.trials) > 0
    path = found.save(tmp_path / "deep" / "plan.json")
    plan = mm.as_pipeline(str(path))
    assert plan == found.plan == mm.as_pipeline(path) == mm.as_pipeline(found.to_dict())
    values = json.loads(path.read_text())
    assert values["stages"][0]["method"] == "vflowopt" and values["tuned"]["value"] == found.best.value
    for number in (1, 3):  # whichever trial wins, the plan has its options, and the others of the plan as given
        trials = [replace(trial, value=2.0) if trial.number == number else trial for trial in found.trials]
        winner = replace(found, trials=trials)
        (stage,), (given,) = winner.plan.stages, found.stages
        changed = {name.removeprefix("vflowopt."): value for name, value in trials[number].params.items()}
        assert stage.options() == {**given.options(), **changed} != given.options()
        values = winner.to_dict()
        assert values["stages"] == [{"method": "vflowopt", **stage.options()}] and values["tuned"]["value"] == 2.0
        assert values["tuned"]["as_given"] == found.trials[0].value
    stock = [final_state(model, inputs) for inputs in samples]
    with mm.compressed(model, str(path)), torch.no_grad():
        seen = [final_state(model, inputs) for inputs in samples]
        left, full, visuals = visual_tokens(mm.trace(model))
    cosines = [torch.cosine_similarity(a, b, dim=-1) for a, b in zip(stock, seen, strict=True)]
    assert torch.cat(cosines).mean().item() == pytest.approx(found.best.value, abs=1e-5)
    assert visuals == 1 and full == anyres("llava_next", 20, 50).layout().cells and 0 < left < full


@torch.no_grad()
def test_the_final_state_is_what_the_first_answer_token_is_read_from(model: Any, samples: list[Any]) -> None:
    logits = model(**samples[0]).logits[:, -1]
    assert torch.allclose(model.lm_head(final_state(model, samples[0])), logits, atol=1e-4)
    parts: list[list[Any]] = [[5, image("llava_next"), 4], [3, image("llava_next", True), 2, image("llava_next"), 6]]
    right = prompts(model, "llava_next", parts, side="right")
    assert torch.allclose(final_state(model, right), final_state(model, samples[0]), atol=1e-4)
    bare = {name: x for name, x in samples[1].items() if name != "attention_mask"}
    assert torch.allclose(final_state(model, bare), final_state(model, samples[1]), atol=1e-5)
    assert FINAL_STATE.compare(torch.ones(2, 3), torch.tensor([[2.0, 2, 2], [-1, -1, -1]])).tolist() == pytest.approx(
        [1, -1]
    )


def test_it_is_judged_by_the_stock_model_whatever_plan_is_in(model: Any, samples: list[Any]) -> None:
    stock = tune(model, samples, "divprune(keep=0.5)", {"divprune.keep": [0.5, 1.0]}, trials=2)
    mm.compress(model, "random(keep=0.1)")
    try:
        again = tune(model, samples, "divprune(keep=0.5)", {"divprune.keep": [0.5, 1.0]}, trials=2)
        assert repr(model._mmcompress_engine.plan) == "random(keep=0.1)"
    finally:
        mm.uncompress(model)
    assert again.trials == stock.trials
    for trial in stock.trials[1:]:
        if trial.params["divprune.keep"] == 1.0:
            assert trial.value == pytest.approx(1) and trial.share == 1
        else:
            assert trial.value < 1 and trial.share == pytest.approx(0.5, abs=0.02)


def test_budget_of_several_stages(model: Any, samples: list[Any]) -> None:
    plan = "divprune(keep=0.5) >> fastv(layer=4, keep=0.5)"
    space = {"divprune.keep": (0.1, 1.0), "fastv.layer": (1, 7)}
    found = tune(model, samples, plan, space, budget=0.4, trials=9)
    assert found.trials[0].share == pytest.approx(0.375, abs=0.02) and not found.trials[0].note
    over = [t for t in found.trials if t.note]
    assert over and all(t.value == 0 and t.share > 0.4 and "more than the budget" in t.note for t in over)
    assert all(t.share <= 0.42 for t in found.trials if not t.note)
    for trial in found.trials[1:]:
        keep, layer = trial.params["divprune.keep"], trial.params["fastv.layer"]
        assert isinstance(layer, int) and trial.share == pytest.approx(keep * (layer + (8 - layer) / 2) / 8, abs=0.05)
    alone = tune(model, samples, "divprune(keep=0.9)", {"divprune.keep": (0.1, 0.2)}, trials=1, budget=0.95)
    assert alone.stages[0] == mm.DivPrune(keep=0.9)  # keep is searched: the budget does not set it
    set_ = tune(model, samples, "visionzip(keep=0.9)", {"visionzip.contextual": (0.1, 0.4)}, trials=1, budget=0.5)
    assert set_.stages[0] == mm.VisionZip(keep=0.5) and set_.trials[1].share == pytest.approx(0.5, abs=0.02)


def test_what_does_not_go_together_counts_nothing(model: Any, samples: list[Any]) -> None:
    found = tune(model, samples, "vflowopt(keep=0.9)", {"vflowopt.r1": [0.5], "vflowopt.r2": [1.0]}, trials=1)
    assert found.trials[1].value == 0 and "fewer tokens than their average" in found.trials[1].note
    assert found.best.number == 0
    with pytest.raises(ValueError, match=r"r1=0\.2"):
        tune(model, samples, "vflowopt(r1=0.2)", trials=1)


def test_values_that_are_no_numbers_count_nothing(model: Any, samples: list[Any]) -> None:
    some = Objective("odd", final_state, lambda a, b: torch.tensor([math.nan, 3.0]))
    found = tune(model, samples, "divprune", {"divprune.keep": [0.5]}, some, trials=1)
    assert found.best.value == 1.5 and found.about["objective"] == "odd"


def test_two_stages_of_one_method(model: Any, samples: list[Any]) -> None:
    found = tune(model, samples, "fastv(layer=2) >> fastv(layer=5)", {"fastv#2.keep": (0.2, 0.3)}, trials=1)
    first, second = found.plan.stages if found.best.number else mm.as_pipeline("fastv >> fastv(layer=5)").stages
    assert repr(first) == "fastv(keep=0.5)" and second.layer == 5  # type: ignore[attr-defined]
    assert set(found.trials[1].params) == {"fastv#2.keep"}


def test_the_search_goes_up() -> None:
    suggest, done = _Suggest({"x": (-1.0, 1.0), "y": (0, 20), "z": ["a", "b"]}, 0), list[Trial]()
    for number in range(1, 24):
        p = suggest(done)
        value = -((p["x"] - 0.3) ** 2) - ((p["y"] - 7) / 20) ** 2 - (p["z"] == "a")
        done.append(Trial(number, p, value, 1.0))
    best = max(done, key=lambda t: t.value)
    assert abs(best.params["x"] - 0.3) < 0.05 and abs(best.params["y"] - 7) <= 1 and best.params["z"] == "b"
    assert best.number > 10  # better than the random ones


@dataclass
class Bad:
    plan: str
    space: dict[str, Any]
    message: str
    budget: Any = None


@pytest.mark.parametrize(
    "bad",
    [
        Bad("divprune", {}, "nothing to search"),
        Bad("divprune", {"divprune.kep": (0.1, 0.2)}, "no option 'divprune.kep' to search: there is divprune.keep"),
        Bad("divprune", {"visionzip.keep": (0.1, 0.2)}, "no option 'visionzip.keep'"),
        Bad("divprune", {"divprune.keep": (0.3, 0.2)}, "is no range"),
        Bad("divprune", {"divprune.keep": (0.3,)}, "is no range"),
        Bad("divprune", {"divprune.keep": ("a", "b")}, "is no range"),
        Bad("divprune", {"divprune.keep": []}, "is no range"),
        Bad("divprune", {"divprune.keep": (0.1, math.inf)}, "is no range"),
        Bad("vflowopt", {}, "budget=25", 25),
        Bad("vflowopt", {}, "budget=1.5", 1.5),
        Bad("vflowapt", {}, "did you mean 'vflowopt'"),
    ],
)
def test_bad_searches(bad: Bad, model: Any, samples: list[Any]) -> None:
    with pytest.raises(ValueError, match=bad.message):
        tune(model, samples, bad.plan, bad.space, budget=bad.budget, trials=1)


def test_no_samples_and_no_optuna(model: Any, samples: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no samples"):
        tune(model, [], "vflowopt", trials=1)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'pip install "mmcompress\[tune\]"'):
        tune(model, samples, "vflowopt", trials=1)


def test_ranges_as_text() -> None:
    assert parse_space(["divprune.keep=0.1:0.5", " a.b = 2:8 ", "fopru.strategy=rank|row", "x.y=1|2.5|None"]) == {
        "divprune.keep": (0.1, 0.5), "a.b": (2, 8), "fopru.strategy": ["rank", "row"], "x.y": [1, 2.5, None],
    }  # fmt: skip
    for text in ("divprune.keep", "keep=1:2", "divprune.keep=", ".keep=1:2"):
        with pytest.raises(ValueError, match="cannot read the range"):
            parse_space([text])


# ---------------------------------------------------------------------- plan files
def test_plan_files(tmp_path: Path) -> None:
    path = tmp_path / "a plan.json"
    plan = mm.as_pipeline("plan(vflowopt(keep=0.5) >> fastv(layer=0.9, keep=0.5), positions='keep')")
    path.write_text(json.dumps(plan.to_dict()))
    assert mm.as_pipeline(str(path)) == plan == mm.as_pipeline(path)
    assert mm.as_pipeline(str(path), positions="reindex").positions == "reindex"
    assert mm.as_pipeline("vflowopt >> fastv").stages == (mm.VFlowOpt(), mm.FastV())
    with pytest.raises(ValueError, match=r"no plan file 'nowhere\.json'"):
        mm.as_pipeline("nowhere.json")
    with pytest.raises(TypeError, match="inside the plan string"):
        mm.as_pipeline(str(path), keep=0.5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", '"stages"'),
        ('{"stages": ["vflowopt"]}', '"stages"'),
        ('{"stages": []}', "at least one stage"),
        ('{"stages": [{"method": "vflowapt"}]}', "did you mean 'vflowopt'"),
        ('{"stages": [{"method": "vflowopt", "keep": 2.0}]}', "keep=2.0"),
        ('{"stages": [{"method": "vflowopt"}], "positions": "none"}', "positions='none'"),
    ],
)
def test_broken_plan_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        mm.as_pipeline(str(path))


# ---------------------------------------------------------------------- the command
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    line = ["tune", "llava-shapes", "--budget", "0.25", "--trials", "3", "--samples", "6", "--out", str(out)]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "as given" in shown and "vflowopt(keep=0.25) on 6 samples" in shown and "best plan" in shown
    journal = (tmp_path / "plan.trials.jsonl").read_text()
    assert len(journal.splitlines()) == 5
    best = max(json.loads(row)["value"] for row in journal.splitlines()[1:])
    assert json.loads(out.read_text())["tuned"]["value"] == best and 0.3 < best < 1
    assert main(line) == 0 and (tmp_path / "plan.trials.jsonl").read_text() == journal


def test_the_command_on_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 90, 10)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.txt").write_text("what color is the star ?\n")
    line = ["tune", "llava-shapes", "--data", str(tmp_path), "--plan", "divprune", "--out", str(tmp_path / "p.json")]
    line += ["--search", "divprune.keep=0.1:0.9", "--trials", "1", "--samples", "2", "--question", "how many ?"]
    assert main(line) == 0
    assert "on 2 samples" in capsys.readouterr().out
    for wrong, message in (
        (["--data", str(tmp_path / "none")], "no such folder"),
        (["--data", str(tmp_path / "empty")], "no pictures"),
        (["--trials", "0"], "at least 1"),
        (["--search", "divprune.keep"], "cannot read the range"),
        (["--plan", "divprun"], "did you mean"),
    ):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert main([*line, *wrong]) == 2
        assert message in capsys.readouterr().err
