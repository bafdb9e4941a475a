# SPDX-License-Identifier: Apache-2.0
"""Plans beside each other, question by question, over the models of several sweeps."""

import pytest
from mmcompress.eval.margins import Answers, against, completed, margin, over, rivals


def point(plan: str, method: str, keep: float | None, marks: str, refused: str = "") -> dict:
    return {
        "plan": plan,
        "method": method,
        "keep": keep,
        "refused": refused,
        "tasks": {"shapes": {"marks": {"one": marks[:2], "two": marks[2:]}}},
    }


def sweep(**marks: str) -> dict:
    plans = {
        "stock": ("stock", "stock", None),
        "own": ("voronoi(keep=0.1)", "voronoi", 0.1),
        "divprune": ("divprune(keep=0.1)", "divprune", 0.1),
        "whole": ("absorb(keep=0.1)", "absorb", 0.1),
        "fastv": ("fastv(keep=0.1)", "fastv", 0.1),
    }
    points = [point(*plans[name], value) for name, value in marks.items()]
    return {"points": points, "tasks": {"shapes": {"questions": 4}}}


@pytest.fixture
def answers() -> Answers:
    both = {
        "a": sweep(stock="1111", own="1110", divprune="1000", whole="1100", fastv="1111"),
        "b": sweep(stock="1110", own="1110", divprune="0110", whole="1111"),
    }
    return Answers(both, "shapes")


def test_a_margin_is_paired() -> None:
    found = margin(iter([(list("1100"), list("1010"))]))
    assert found.value == 0 and found.error == pytest.approx(100 * (2 / 3) ** 0.5 / 2) and not found.clear
    assert margin(iter([(list("11-1"), list("0000"))])).value == 100  # what was not judged does not count


def test_only_plans_that_ran_everywhere_are_rivals(answers: Answers) -> None:
    assert rivals(answers, 0.1) == ["absorb(keep=0.1)", "divprune(keep=0.1)"]
    assert answers.mean("divprune(keep=0.1)") == pytest.approx(37.5)


def test_tables(answers: Answers) -> None:
    headings, lines = against(answers, 0.1)
    assert headings == ["method", "a", "b", "`voronoi` less it, all models"]
    assert [line[0] for line in lines] == ["stock, all tokens", "**`voronoi`**", "`absorb`", "`divprune`"]
    assert lines[1] == ["**`voronoi`**", "**75.0**", "**75.0**", ""]
    assert lines[3][1] == "25.0 (+50.0 ± 28.9)" and lines[3][3].startswith("+37.5 ± ")
    headings, lines = completed(answers, (0.1,))
    assert headings == ["host", "alone, 10%", "completed", "gain"]
    assert [line[:3] for line in lines] == [["`divprune`", "37.5", "75.0"]]


def test_methods_beside_floors() -> None:
    answers = Answers({"a": sweep(stock="1111", own="1110", divprune="1000", fastv="1111")}, "shapes")
    headings, lines, beaten = over(answers, (0.1,), ("divprune",))
    assert headings == ["method", "10%"] and lines[0] == ["stock, all tokens", "100.0"]
    assert [line[0] for line in lines[1:]] == ["`fastv`", "`voronoi`", "`divprune` (floor)"]
    assert lines[1][1] == "100.0 (+75.0 ± 25.0) *" and lines[3][1] == "25.0"
    assert lines[2][1] == "75.0 (+50.0 ± 28.9)" and beaten == ["voronoi"]
