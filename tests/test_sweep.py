# SPDX-License-Identifier: Apache-2.0
"""Sweeps and what is made of them; plans tuned on answers and on FLOPs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcompress.assets import model_path
from mmcompress.eval.comparison import Comparison, compare
from mmcompress.eval.docs.tables import methods
from mmcompress.eval.evaluator import Prepared, Setup, evaluate, load_record
from mmcompress.eval.statistics import Difference, Flips
from mmcompress.eval.sweep import pareto
from mmcompress.eval.sweep import run as sweeping
from mmcompress.eval.sweep.best import bests, headline, runner_up
from mmcompress.eval.sweep.examples import spread, worst
from mmcompress.eval.sweep.retained import Standing, front, standings, undecided
from mmcompress.eval.sweep.run import load_sweep, points, read_tasks
from mmcompress.eval.synthetic import Item, items
from mmcompress.eval.synthetic.benchmark import load
from mmcompress.eval.tasks import Row
from mmcompress.eval.tuning import answers, batches

import mmcompress as mm
from mmcompress.cli import main
from mmcompress.spending import read_budget, spent
from mmcompress.tune import tune

COUNT = 14


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load(model_path("llava-shapes"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for i, item in enumerate(items(COUNT)):
        item.picture.save(folder / f"{i}.png")
        rows.append({"id": f"q{i}", "question": item.question.text, "answer": item.question.answer, "image": f"{i}.png", "kind": item.question.kind})  # fmt: skip  # noqa: E501
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "questions.jsonl"


@pytest.fixture(scope="module")
def swept(table: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A sweep by the command: two tasks, a method at two ratios, a plan, and one that the model refuses."""
    out = tmp_path_factory.mktemp("sweep")
    line = [
        "sweep",
        "llava-shapes",
        "--plan",
        "divprune",
        "--plan",
        "fastv(layer=1, keep=0.5)",
        "--plan",
        "fastv(layer=99)",
    ]
    line += ["--keep", "0.5", "0.02", "--task", "shapes", "--task", f"exact={table}", "--questions", str(COUNT)]
    line += ["--repeats", "1", "--examples", "1", "--out", str(out), "--device", "cpu"]
    assert main(line) == 0
    return out, line


def test_points() -> None:
    found = points(["divprune", "divprune", "random(keep={keep})", "visionzip(keep=0.3)"], [0.5, 0.1])
    assert [(point.method, point.keep) for point in found] == [
        ("stock", None), ("divprune", 0.5), ("divprune", 0.1), ("random(keep={keep})", 0.5), ("random(keep={keep})", 0.1),
        ("visionzip(keep=0.3)", None),
    ]  # fmt: skip
    assert found[1].plan == repr(mm.as_pipeline("divprune(keep=0.5)"))
    every = {point.method for point in points(["all"], [0.5])}
    assert {"divprune", "fastv", "visionzip", "random", "uniform"} <= every and not {"dyvte", "tokenflex"} & every
    assert {"cmai", "aim_prune", "var_attention_sink", "explain_compress"} <= every
    once = [(point.plan, point.keep) for point in points(["all"], [0.5, 0.1]) if point.method == "cmai"]
    assert once == [("cmai()", None)]
    with pytest.raises(ValueError, match="did you mean"):
        points(["divprun"], [0.5])


def test_tasks(table: Path, loaded: tuple[Any, Any]) -> None:
    assert all(item.size == item.picture.size for item in items(3, stretched=True))
    (work,) = read_tasks([f"exact={table}"], 3, loaded[0])
    assert (work.name, len(work.questions)) == ("exact", 3)
    (drawn,) = read_tasks(["shapes"], 7, loaded[0], start=4_000_000)
    assert min(int(question.id) for question in drawn.questions) >= 4_000_000
    for texts, message in (
        (["pope"], "write pope="), (["shapes=x"], "its own data"), (["shapes", "shapes"], "each task once"), (["x"], "choose one"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_tasks(texts, 7, loaded[0])


def test_what_a_sweep_holds(swept: tuple[Path, list[str]]) -> None:
    out, _ = swept
    content = json.loads((out / "sweep.json").read_text())
    assert list(content["tasks"]) == ["shapes", "exact"]
    refused = [point for point in content["points"] if point["refused"]]
    assert [point["plan"] for point in refused] == ["fastv(layer=99, keep=0.5)"] or "99" in refused[0]["plan"]
    rows = standings(content)
    assert [row.plan for row in rows][:3] == ["stock", "divprune(keep=0.5)", "divprune(keep=0.02)"]
    stock, half, few, cut = rows
    assert stock.relative == 100 and stock.cost["flops"] == 100 and few.cost["flops"] < half.cost["flops"] < 100
    assert few.cost["kv"] < half.cost["kv"] < cut.cost["kv"] < stock.cost["kv"]
    for row in rows[1:]:
        ratios = [one.retention for one in row.comparisons.values()]
        assert row.relative == pytest.approx(100 * sum(ratios) / 2)
        assert row.op == pytest.approx(100 * math.sqrt(sum(r * r for r in ratios) / 2))
        lost = sum(one.flips.right_to_wrong for one in row.comparisons.values())
        assert row.flips[0] == lost and set(row.comparisons) == {"shapes", "exact"}
    assert few.relative < half.relative and few.agreement < half.agreement <= 100 and few.flips[0] > 0
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_sweep_holds_needs_no_other_file(swept: tuple[Path, list[str]]) -> None:
    """Scores, marks, visual tokens and comparisons are those of the records, to six digits."""
    out, _ = swept
    content = load_sweep(out / "sweep.json")
    ran = [point for point in content["points"] if not point["refused"]]
    for task, about in content["tasks"].items():
        base = load_record(out / ran[0]["tasks"][task]["record"])
        assert about["questions"] == COUNT and about["failed"] == {} and ran[0]["tasks"][task]["against"] is None
        for point in ran:
            told, record = point["tasks"][task], load_record(out / point["tasks"][task]["record"])
            values = {row["id"]: row["value"] for row in record["rows"]}
            for kind, ids in about["ids"].items():
                assert told["marks"][kind] == "".join(str(int(values[name])) for name in ids)
            assert told["scores"]["accuracy"] == pytest.approx(record["scores"]["accuracy"], abs=1e-6)
            assert told["visual"]["entering"] == pytest.approx(record["visual_tokens"]["entering"]["mean"], abs=1e-6)
            if point["plan"] != "stock":
                found, expected = Comparison.from_dict(told["against"]), compare(base, record)
                assert (found.flips, found.questions) == (expected.flips, COUNT)
                assert found.change.error == pytest.approx(expected.change.error, abs=1e-6)  # type: ignore[union-attr]
                assert set(found.by_kind) == set(about["ids"]) and found.retention == pytest.approx(
                    expected.retention, abs=1e-6
                )
    assert len((out / "sweep.json").read_text()) < 6000 * len(ran)
    for wrong, message in (
        ("none.json", "no such file"),
        ("report.html", "not JSON"),
        (ran[0]["tasks"]["shapes"]["record"], "sweep again"),
    ):
        with pytest.raises(ValueError, match=message):
            load_sweep(out / wrong)


def test_a_comparison_in_plain_values() -> None:
    """Also one without gold answers, where most of it is not known."""
    flips = Flips(4, 3, 1, 0)
    nan = math.nan
    change = Difference(0.1, 0.0, 0.2, 0.05, 3, 4)
    known = Comparison(
        "exact", "stock", "p", 4, 0.5, 0.6, 1.2, 1.3, change, flips, {"a": (4, 0.5, 0.6, change)}, ("note",)
    )
    blind = Comparison("exact", "stock", "p", 4, nan, nan, nan, nan, None, flips, {}, ())
    for one in (known, blind):
        plain = json.loads(json.dumps(one.to_dict(), allow_nan=False))
        assert repr(Comparison.from_dict(plain)) == repr(one)


def test_how_many_questions_a_sweep_would_need() -> None:
    flips = Flips(100, 90, 6, 4)

    def row(plan: str, change: Difference) -> Standing:
        one = Comparison("shapes", "stock", plan, 100, 0.9, 0.9 + change.value, 1.0, 1.0, change, flips, {}, ())
        return Standing(plan, plan, None, 97.0, 1.0, 97.0, 0.0, 90.0, {"shapes": one}, {})

    rows = [
        row("a", Difference(-0.02, -0.08, 0.04, 0.03, 10, 100)), row("b", Difference(-0.01, -0.03, 0.01, 0.01, 1, 100)),
        row("c", Difference(-0.3, -0.4, -0.2, 0.05, 40, 100)),
    ]  # fmt: skip
    assert [one.verdict for one in rows] == ["too few questions to tell"] * 2 + ["worse"]
    assert undecided(rows) == [
        "shapes: too few questions to tell for 2 of 3 plans; needed for a difference of 1 point: about 800 to 4,000, there are 100"
    ]
    assert undecided(rows[2:]) == []


def test_pictures_are_processed_once(loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once per plan; the answers are those of evaluations that share nothing."""
    model, processor = loaded
    works = read_tasks(["shapes"], 7, model)
    drawn: list[int] = []
    picture = Item.picture.fget
    monkeypatch.setattr(Item, "picture", property(lambda item: (drawn.append(item.scene.seed), picture(item))[1]))  # type: ignore[misc]
    setup = Setup("shapes", batch_size=3)
    content = sweeping.sweep(
        model, processor, works, points(["random", "fastv"], [0.5, 0.1]), setup, tmp_path / "a", "m", 0
    )
    assert len(drawn) == 7 + 1  # and the prompt that plans are tried on
    for point in content["points"]:
        alone = evaluate(model, processor, works[0].questions, setup, point["plan"], tmp_path / "b", "m")
        assert load_record(tmp_path / "a" / point["tasks"]["shapes"]["record"])["rows"] == alone["rows"]
    small = Prepared(1000)
    evaluate(model, processor, works[0].questions, setup, "stock", tmp_path / "c", "m", prepared=small)
    assert small.held == 0  # nothing fits


def test_pictures_that_cannot_be_read_and_plans_that_fail_midway(
    loaded: tuple[Any, Any], table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()][:4]
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    for row in rows:
        row["image"] = str(table.parent / row["image"])
    rows[0]["image"] = str(tmp_path / "broken.png")
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = [
        "sweep",
        "llava-shapes",
        "--plan",
        "random",
        "--keep",
        "0.5",
        "--task",
        f"exact={tmp_path / 'q.jsonl'}",
        "--repeats",
        "0",
    ]
    line += ["--examples", "0", "--device", "cpu"]
    assert main([*line, "--out", str(tmp_path / "a")]) == 0
    assert "1 of 4 questions were left out" in capsys.readouterr().out
    content = load_sweep(tmp_path / "a" / "sweep.json")
    assert (
        list(content["tasks"]["exact"]["failed"]) == ["q0"] and content["points"][1]["tasks"]["exact"]["answered"] == 3
    )
    assert main([*line, "--strict", "--out", str(tmp_path / "b")]) == 2
    assert "question q0" in capsys.readouterr().err


def test_a_plan_that_fails_midway_is_refused(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    works = read_tasks(["shapes"], 7, model)

    def fail(*arguments: Any, **more: Any) -> Any:
        if "0.1" in arguments[4]:
            raise ValueError("keep=200 of 144 tokens")
        return evaluate(*arguments, **more)

    monkeypatch.setattr(sweeping, "evaluate", fail)
    setup = Setup("shapes")
    content = sweeping.sweep(model, processor, works, points(["random"], [0.5, 0.1]), setup, tmp_path, "m", 0)
    assert [point["refused"] for point in content["points"]] == ["", "", "keep=200 of 144 tokens"]
    assert len(standings(content)) == 2


def test_the_table_of_methods(swept: tuple[Path, list[str]]) -> None:
    """Accuracy at every ratio, and question types on which a baseline is better."""
    content = load_sweep(swept[0] / "sweep.json")
    half = next(point for point in content["points"] if point["plan"] == "divprune(keep=0.5)")
    kinds = content["tasks"]["shapes"]["ids"]

    def point(method: str, keep: float, marks: dict[str, str]) -> dict[str, Any]:
        value = sum(m.count("1") / len(m) for m in marks.values()) / len(marks)
        told = {**half["tasks"]["shapes"], "marks": marks, "scores": {"accuracy": value}}
        return {**half, "method": method, "plan": f"{method}(keep={keep})", "keep": keep, "tasks": {"shapes": told}}

    good = dict.fromkeys(kinds, "1" * 20)
    bad = good | {"color": "01" * 10}
    made = [point("random", 0.25, good), point("downsample", 0.25, bad), point("divprune", 0.25, bad)]
    refusing = {**point("fastv", 0.25, bad), "refused": "no", "tasks": {}}
    sweeps = {"llava-shapes": {**content, "points": [content["points"][0], *made, refusing]}}
    text = methods(sweeps, {"selection": {"rows": [{"method": "divprune", "milliseconds": 3.0, "naive_ms": None}]}})
    lines = {line.split("`")[1]: line.split(" | ") for line in text.splitlines() if line.startswith("| `")}
    assert lines["divprune"][6] == "93" and lines["random"][6] == "100" and lines["fastv"][6] == "-"
    assert (
        lines["divprune"][-1] == "`random`: color |" and lines["divprune"][-2] == "3.0" and lines["random"][-1] == " |"
    )
    assert lines["divprune"][7] == f"{100 * half['cost']['flops_ratio']:.0f}"
    assert next(iter(lines)) == "random" and list(lines)[-1] == "fastv"


def test_the_report(swept: tuple[Path, list[str]]) -> None:
    out, _ = swept
    page = (out / "report.html").read_text()
    assert (
        "divprune(keep=0.02)" in page
        and "right before, wrong now" in page
        and "of 144 tokens" in page
        and "layer=99" in page
    )
    assert page.count("data:image/") >= 8 and "://" not in page
    assert "Times of" not in page and "TTFT" not in page  # of a model as small as this one they say nothing
    assert (
        page.index("best plan")
        < page.index("what was kept")
        < page.index("score against cost")
        < page.index("all plans")
    )


def test_the_report_in_a_browser(swept: tuple[Path, list[str]], browser: Any) -> None:
    """A heading sorts; nothing hangs over the edge of a phone; both themes."""
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get((swept[0] / "report.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    first = "return [...document.querySelectorAll('#all tbody tr')].map((row) => row.cells[1].textContent)"
    for order in (lambda values: sorted(values, reverse=True), sorted):
        browser.execute_script("document.querySelectorAll('#all thead button')[1].click()")
        values = [float(text) for text in browser.execute_script(first)]
        assert values == order(values)
    assert browser.execute_script("return document.querySelectorAll('#all thead [aria-sort=ascending]').length") == 1
    ground = "return getComputedStyle(document.body).backgroundColor"
    before = browser.execute_script(ground)
    browser.execute_script("document.getElementById('theme').click()")
    assert browser.execute_script(ground) != before
    assert browser.execute_script(
        "return [...document.images].every((image) => image.complete && image.naturalWidth > 0)"
    )
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_sweep_goes_on(swept: tuple[Path, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked or timed a second time; a further plan is, and brings all costs anew."""
    out, line = swept
    before = load_sweep(out / "sweep.json")
    monkeypatch.setattr("mmcompress.eval.evaluator._generate", lambda *_: pytest.fail("the answers are there"))
    timed: list[list[str]] = []
    costs = sweeping.costs
    monkeypatch.setattr(sweeping, "costs", lambda *a: (timed.append(a[3]) if len(a) > 3 else None, costs(*a))[1])
    monkeypatch.setattr("mmcompress.eval.cost.record.clock", lambda *_, **__: pytest.fail("the costs are there"))
    assert main(line) == 0
    after = load_sweep(out / "sweep.json")
    assert {**after, "machine": 0} == {**before, "machine": 0} and not timed  # somebody may have committed in between


def test_the_front() -> None:
    def row(plan: str, relative: float, cost: float) -> Standing:
        return Standing(plan, plan, None, relative, 0.0, 0.0, 0.0, 0.0, {}, {"flops": cost})

    rows = [
        row("stock", 100, 100),
        row("a", 90, 50),
        row("b", 95, 50),
        row("c", 80, 60),
        row("d", 70, 10),
        row("e", math.nan, 1),
    ]
    assert [one.plan for one in front(rows, "flops")] == ["d", "b", "stock"] and front(rows, "ttft") == []


def found_of(marks: dict[str, str], shares: dict[str, float]) -> tuple[dict[str, Any], list[Standing]]:
    """A sweep of one task by the marks of its plans."""
    stock = [mark == "1" for mark in marks["stock"]]
    points, rows = [], []
    for plan, line in marks.items():
        points.append({"plan": plan, "tasks": {"shapes": {"marks": {"a": line}}}})
        right = [mark == "1" for mark in line]
        changed = sum(a != b for a, b in zip(right, stock, strict=True))
        value, base = sum(right) / len(right), sum(stock) / len(stock)
        change = Difference(value - base, -1.0, 1.0, 0.02, changed, len(right))
        flips = Flips(len(right), len(right) - changed, changed, 0)
        one = Comparison("shapes", "stock", plan, len(right), base, value, value / base, value, change, flips, {}, ())
        told = {} if plan == "stock" else {"shapes": one}
        rows.append(Standing(plan, plan, None, 100 * value / base, 2.0, 0.0, 0.0, 0.0, told, {}, share=shares[plan]))
    return {"tasks": {"shapes": {}}, "cost": {}, "points": points}, rows


def test_the_best_plan_of_each_budget() -> None:
    """Each plan counts where it just fits by what the layers see; few questions are not a tie; floors count too."""
    marks = {
        "stock": "1" * 100, "voronoi(keep=0.25)": "1" * 98 + "00", "dart(layer=2, keep=0.1)": "1" * 99 + "0",
        "divprune(keep=0.25)": "1" * 97 + "000", "random(keep=0.25)": "1" * 60 + "0" * 40, "random(keep=0.1)": "1" * 50 + "0" * 50,
    }  # fmt: skip
    shares = dict(zip(marks, (1.0, 0.25, 0.4, 0.25, 0.26, 0.1), strict=True))
    content, rows = found_of(marks, shares)
    found = bests(content, rows)
    assert [(one.budget, one.row.plan) for one in found] == [
        ("50%", "dart(layer=2, keep=0.1)"), ("25%", "voronoi(keep=0.25)"), ("10%", "random(keep=0.1)"),
    ]  # fmt: skip
    quarter = found[1]
    assert quarter.floor is not None and quarter.floor.plan == "random(keep=0.25)"
    assert runner_up(quarter).startswith("not told from divprune(keep=0.25): +1.0 ± 1.")
    assert runner_up(found[0]) == "no other plan here" and found[2].floor is found[2].row
    text = headline(rows, found)
    assert text.startswith("voronoi(keep=0.25) keeps 98.0 ± 2.0 %") and "random(keep=0.25) keeps 60.0 %" in text
    clear = bests(*found_of({**marks, "divprune(keep=0.25)": "1" * 70 + "0" * 30}, shares))[1]
    assert runner_up(clear).startswith("clear of divprune(keep=0.25): +28.0 ±")
    weak = bests(*found_of({"stock": "1" * 10, "random(keep=0.1)": "1" * 5 + "0" * 5}, shares))
    assert headline(rows, weak).startswith("No plan keeps 97 %") and "nothing to choose" in headline(rows, [])


def test_every_family_of_a_plot_has_a_name() -> None:
    """Also where there are too many methods for a colour each; no axis goes below 0."""
    names = ["stock", "random", "downsample", *(n for n, c in mm.methods().items() if c.kind in ("input", "layer"))][
        :30
    ]
    rows = [
        Standing(n, n, None, 100.0 - i, 1.0, 0, 0, 0, {}, {"flops": 100.0 - 3 * i, "kv": 1.0})
        for i, n in enumerate(names)
    ]
    for some in (rows[:6], rows):
        found = pareto.families(some, ["r", "g", "b", "y", "c", "m", "k", "r", "g", "b"])
        assert set(found) == {row.family for row in some[1:]}
        legend = " ".join(look.legend for look in found.values())
        assert all(name in legend for name in found) and "random (floor)" in legend
        assert len({(look.colour, look.marker) for look in found.values()}) == len(set(found.values()))


def test_frames_of_a_strip() -> None:
    assert spread(1) == [0] and spread(3) == [0, 1, 2] and spread(16) == [1, 4, 6, 9, 12, 14]


def test_the_worst_examples_come_from_different_types() -> None:
    def rows(values: list[float]) -> list[Row]:
        return [Row(str(i), "ab"[i // 3], str(i), ("x",), "y", "y", value) for i, value in enumerate(values)]

    pairs = worst(rows([1, 1, 1, 1, 0.6, 0]), rows([0, 0, 1, 0, 0, 1]), 3)
    assert [a.id for a, _ in pairs] == ["0", "3", "1"]


# ---------------------------------------------------------------------- tuning on answers
def test_budgets_as_text() -> None:
    assert read_budget("0.3") == (0.3, "tokens") and read_budget("flops=0.25") == (0.25, "flops")
    assert read_budget("30%") == (0.3, "tokens") and read_budget("flops=12.5%") == (0.125, "flops")
    for text in ("flops", "time=0.3", "flops=x"):
        with pytest.raises(ValueError, match=r"write 0\.3, 30%, tokens=0\.3 or flops=0\.3"):
            read_budget(text)


@pytest.mark.parametrize("plan", ["divprune", "fastv(layer=1)"])
def test_the_largest_keep_within_the_flops(plan: str, loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    (work,) = read_tasks(["shapes"], 7, model)
    parts = batches(model, processor, "shapes", work.questions)
    inputs = [part.inputs for part in parts]
    found = tune(model, inputs, plan, {}, budget=0.5, unit="flops", trials=0)
    assert found.trials[0].share <= 0.5 and not found.trials[0].note and found.about["budget"] == "flops=0.5"
    (stage,) = found.stages
    more = type(stage)(**{**stage.options(), "keep": min(1.0, stage.keep + 0.02)})  # type: ignore[attr-defined]
    left = full = 0.0
    with torch.no_grad(), mm.compressed(model, more):
        for one in inputs:
            model(**one, use_cache=False, logits_to_keep=1)
            now = spent(mm.trace(model), "flops")
            left, full = left + now[0], full + now[1]
    assert left / full > 0.5
    with pytest.raises(ValueError, match="give a larger budget"):
        tune(model, inputs, plan, budget=0.01, unit="flops", trials=0)


def test_agreement_and_score(loaded: tuple[Any, Any]) -> None:
    model, processor = loaded
    (work,) = read_tasks(["shapes"], COUNT, model)
    parts = batches(model, processor, "shapes", work.questions)
    agreement, score = (answers(processor, "shapes", parts, metric) for metric in ("agreement", "score"))
    with torch.no_grad():
        stock = agreement.observe(model, parts[0].inputs)
        with mm.compressed(model, "divprune(keep=0.02)"):
            few = agreement.observe(model, parts[0].inputs)
    assert agreement.compare(stock, stock).mean() == 1 > agreement.compare(stock, few).mean()
    assert score.compare(stock, few).tolist() == [value for _, value in few]
    with pytest.raises(ValueError, match="agreement or score"):
        answers(processor, "shapes", parts, "speed")


def test_tune_by_the_command(tmp_path: Path, table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two plans at one budget of FLOPs: the one that agrees more is written, and compress takes it."""
    out = tmp_path / "plan.json"
    line = [
        "tune",
        "llava-shapes",
        "--plan",
        "random",
        "--plan",
        "divprune",
        "--budget",
        "flops=0.4",
        "--metric",
        "agreement",
    ]
    line += [
        "--task",
        "exact",
        "--data",
        str(table),
        "--samples",
        "8",
        "--trials",
        "1",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    assert main(line) == 0
    made = json.loads(out.read_text())
    assert made["tuned"]["budget"] == "flops=0.4" and made["tuned"]["share"] <= 0.4
    values = [json.loads(p.read_text().splitlines()[1])["value"] for p in sorted(tmp_path.glob("*.trials.jsonl"))]
    assert len(values) == 2 and made["tuned"]["value"] == max(values)
    assert mm.as_pipeline(str(out)).stages[0].name in ("random", "divprune")
    for wrong, message in (
        (["--budget", "flops=2"], "float in"),
        (["--search", "tome.keep=0.1:0.2"], "none of the plans"),
    ):
        assert main([*line, *wrong]) == 2 and message in capsys.readouterr().err
    assert main(["tune", "llava-shapes", "--metric", "agreement", "--data", str(tmp_path)]) == 2
