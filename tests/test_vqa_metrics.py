# SPDX-License-Identifier: Apache-2.0
"""VQA metrics and statistics beyond the recorded cases: slow twins, differences of protocols, published numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcompress.eval import metrics as vqa
from mmcompress.eval.comparison import Comparison, by_chance, compare, stock_first
from mmcompress.eval.cost.vision_flops import mlp_projector_flops, vit_flops
from mmcompress.eval.data import Question
from mmcompress.eval.data.films import FILMS
from mmcompress.eval.statistics import (
    Difference,
    about,
    bootstrap,
    corrected,
    difference,
    flips,
    generalization,
    mcnemar,
    overall_performance,
    paired,
    relative_accuracy,
)
from mmcompress.eval.tasks import TASKS, Row, evaluate_terms, task_of
from torch.utils.flop_counter import FlopCounterMode

from mmcompress.trace import Shape, prefill_flops

VICUNA = Shape(4096, 11008, 32, 32, 32, 128)
WORDS = st.text("ab 1,.'", max_size=7)


@given(WORDS, WORDS)
@settings(max_examples=60, deadline=None)
def test_edit_distance_is_the_recursive_one(first: str, second: str) -> None:
    @cache
    def slow(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(slow(i - 1, j) + 1, slow(i, j - 1) + 1, slow(i - 1, j - 1) + (first[i - 1] != second[j - 1]))

    assert vqa.edit_distance(first, second) == slow(len(first), len(second))


@given(st.lists(st.sampled_from("abc"), max_size=10), st.sampled_from("abc"))
@settings(max_examples=60, deadline=None)
def test_soft_accuracy_leaves_one_annotator_out(answers: list[str], said: str) -> None:
    left = [answers[:i] + answers[i + 1 :] for i in range(len(answers))]
    slow = sum(min(1, others.count(said) / 3) for others in left) / len(left) if left else 0.0
    assert vqa.soft_accuracy(said, answers) == pytest.approx(slow)


def test_protocols_differ_where_the_card_says_so() -> None:
    same = ["The Dog."] * 10
    assert [vqa.vqa_accuracy("dog", same, "vqav2", p) for p in vqa.PROTOCOLS] == [0.0, 0.0, 1.0]
    assert vqa.vqa_accuracy("yes", ["yes", "yes"], "textvqa", "lmms") == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="ten answers, not 2"):
        vqa.vqa_accuracy("yes", ["yes", "yes"], "textvqa", "llava")
    with pytest.raises(ValueError, match=r"protocol='mine'.*official, llava, lmms"):
        vqa.vqa_accuracy("yes", ["yes"], "vqav2", "mine")  # type: ignore[arg-type]
    assert [vqa.gqa_correct("Yes.", "yes", p) for p in vqa.PROTOCOLS] == [False, True, True]
    assert [vqa.pope_label("NO.", p) for p in vqa.PROTOCOLS] == ["yes", "yes", "no."]
    assert [vqa.mme_label(" y.", p) for p in vqa.PROTOCOLS] == ["other", "other", "yes"]
    assert [vqa.scienceqa_letter("b", p) for p in vqa.PROTOCOLS] == ["", "", "B"]
    assert [vqa.scienceqa_letter("The answer is C.", p) for p in vqa.PROTOCOLS] == ["C", "C", ""]
    assert [vqa.seed_letter("B. dog", p) for p in vqa.PROTOCOLS] == ["B. dog", "B. dog", "B"]
    assert vqa.relaxed_correct("Blue ", "blue", strip=True) and not vqa.relaxed_correct("Blue ", "blue")
    wide = "\uff21\uff22"
    assert vqa.ocrbench_correct("ab", wide, protocol="lmms") and not vqa.ocrbench_correct("ab", wide)
    assert vqa.normalize_answer("3.", "vlmevalkit") == "3." and vqa.normalize_answer("3.") == "3"
    assert vqa.normalize_answer("a." * 40).count(".") == 8  # the tools stop after 32
    with pytest.raises(ValueError, match="style"):
        vqa.normalize_answer("x", "mine")  # type: ignore[arg-type]


def test_letters() -> None:
    assert vqa.extract_letter("The answer is B because A is small, not big") == "B"
    assert vqa.extract_letter("it shows (A) and then (C) there") == "C"
    assert (
        vqa.mmbench_letter("The answer is C since the animal on the left has stripes", dict.fromkeys("ABCD", "x"))
        == "C"
    )
    assert vqa.mmbench_letter("z", {"A": "zebra", "B": None}) is None
    assert vqa.mmbench_letter("the zebra", {"A": "zebra", "B": None}) == "A"
    assert vqa.mmbench_letter("the zebra is there", {"A": "zebra", "B": None}) is None  # too long for its text
    assert vqa.mmbench_letter("the zebra is there", {"A": "zebra", "B": None}, "lmms") == "A"
    assert vqa.mmmu_letter("(B) or (A)", {"A": "x", "B": "y"}) == "A"
    assert vqa.mmmu_letter("", {}) is None
    assert vqa.mvbench_letter("Option (e), surely") == "E"
    assert vqa.circular_scores([], []) == {"circular": 0.0, "single_pass": 0.0}


@pytest.mark.parametrize(
    ("reply", "golds", "value"),
    [
        ("ab   c", ["abd c"], 1 - 1 / 6),  # one letter off, over the longer RAW length: 6, not 5
        ("abc", ["ab  d   c"], 1 - 3 / 9),  # "ab d c" is three away; the raw gold answer has nine
        ("  abcd  ", ["abcd"], 1.0),
        ("ab", ["abcd"], 0.5),  # exactly one half counts
        ("ab", ["abcde"], 0.0),
        ("ABC", ["xyz", "abd"], 2 / 3),
        ("", ["a"], 0.0),
        ("a", [], 0.0),
    ],
)
def test_anls_divides_by_raw_lengths(reply: str, golds: list[str], value: float) -> None:
    assert vqa.anls(reply, golds) == pytest.approx(value)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("C is not right, B", "C"),  # the start before the end
        ("is it A or rather D", "D"),
        ("answer: B, or (C) maybe", "B"),
        ("the option is (D) they say (B) too", "D"),
        ("it is (B) but c", "B"),
        ("see B. then C. there", "C"),
        ("see B: then C. there", "C"),
        ("see C) then D: there", "D"),
        ("see C) then D there", "C"),
        ("take/B/for it", "B"),
        ("Because", "B"),  # as lmms-eval reads it
        ("option dog", ""),
        ("e", ""),
        ("'\"A.\"'", "A"),
        ("", ""),
    ],
)
def test_extracted_letters_by_the_most_telling_place(reply: str, letter: str) -> None:
    assert vqa.extract_letter(reply) == letter


def test_choices_at_their_boundaries() -> None:
    four = dict(zip("ABCD", ("cat", "dog", "cow", "hen"), strict=True))
    long = dict.fromkeys("ABCD", "x" * 40)
    for reply, letter in (
        ("we B see in a one", None),
        ("we see B in it now", "B"),
        ("B is what we all see", None),
        ("A and B", None),
    ):
        assert vqa.mmbench_letter(reply, long) == letter, reply  # among the last four words
    said = "it is a dog " + "." * 12
    assert len(said) == 2 * sum(map(len, four.values())) == 24
    assert vqa.mmbench_letter(said, four) == "B" and vqa.mmbench_letter(said + ".", four) is None
    assert vqa.mmbench_letter("a dog, a cat", four) is None
    assert [vqa.mmbench_letter(reply, long, "lmms") for reply in ("A b c", "A b c d", "(A) b c d", "B c d e", "E")] == [
        *("A", None, "A", "B", "E"),
    ]  # fmt: skip
    index = [5, vqa.ROTATIONS + 5, vqa.ROTATIONS - 1, 2 * vqa.ROTATIONS - 1]
    scores = vqa.circular_scores(index, [True, False, True, True], {"c": ["x", "y", "z", "z"]})
    assert scores == {"circular": 0.5, "single_pass": 1.0, "c/x": 0.0, "c/z": 1.0}
    assert [vqa.scienceqa_letter(reply) for reply in ("E", "F", "A. x", "A.x", "The answer is B. The answer is B.")] == [
        *("E", "", "A", "", ""),
    ]  # fmt: skip
    assert [vqa.scienceqa_letter(reply, "lmms") for reply in (" e ", "B.x", "b.", "1")] == ["E", "B", "", ""]
    assert [vqa.ai2d_answer(reply) for reply in (" B. dog", "B dog", "b. dog")] == ["B", "B dog", "b. dog"]
    assert [vqa.mvbench_letter(reply) for reply in ("b. x", "f. a b", "(D)", "dab")] == ["B", "A", "D", ""]


@pytest.mark.parametrize(
    ("reply", "official", "lmms"),
    [
        ("A. apple B. bear", None, "A"),  # lmms-eval finds "A." and "B.", neither between spaces
        ("A. apple is it, B. bear", "B", "A"),
        ("B then DNA", "B", "B"),  # lmms-eval takes "DNA " for A too, and the last that stands alone
        ("DNA", None, "A"),
        ("It is C. Not B.", "B", "B"),
        ("(A) or B", "A", "A"),
        ("(B) or (A) or (B)", "B", "B"),
        ("A B A", "A", "A"),
        ("It must be the apple tree", "A", "A"),  # six words
        ("must be the apple tree", None, None),  # five
        ("an apple, or a bear, or an apple again", "A", "A"),
        ("B!", "B", "B"),
        ("'B!'", None, None),  # the marks are stripped in turn, the quotes last
        ("", None, None),
    ],
)
def test_mmmu_letters(reply: str, official: str | None, lmms: str | None) -> None:
    options = {"A": "apple", "B": "bear", "C": "corn"}
    found = [vqa.mmmu_letter(reply, options, protocol) for protocol in vqa.PROTOCOLS]
    assert found == [official, official, lmms]


def test_soft_accuracy_of_few_answers_can_be_full() -> None:
    def value(task: str, golds: list[str], reply: str, protocol: Any = "official") -> float | None:
        return task_of(task).row(Question("1", "?", (), tuple(golds)), reply, protocol).value

    for task in ("soft", "vqav2", "textvqa", "okvqa", "vizwiz"):
        for count in (1, 2, 3, 4, 10):
            assert value(task, ["White."] * count, "White.") == pytest.approx(1.0), (task, count)
            assert value(task, ["white"] * count, "red") == value(task, ["white"] * count, "") == 0.0
        assert value(task, ["a b", "a b", "c d"], "a b") == pytest.approx(2 / 3)
        assert value(task, ["a b", "c d"], "c d") == pytest.approx(1 / 2)
        assert value(task, ["a b", "a b", "c d", "e f"], "a b") == pytest.approx(
            0.5
        )  # as the tools have it, from four on
    with pytest.raises(ValueError, match="ten answers, not 2"):
        value("textvqa", ["yes", "yes"], "yes", "llava")


def test_golds_outside_a_metrics_domain_are_told_before_anything_is_asked(recwarn: Any) -> None:
    def ask(*golds: str, options: tuple[tuple[str, str], ...] = (), kind: str = "") -> Question:
        return Question("7", "?", (), golds, options, kind=kind, place="q.csv, row 3")

    two = (("A", "cat"), ("B", "dog"))
    for task, question, said in (
        ("letter", ask("C", options=two), "q.csv, row 3: the gold answer 'C' is none of the letters A, B"),
        ("mmbench", ask("A"), "q.csv, row 3: mmbench is multiple choice, and there are no options"),
        ("yesno", ask("maybe"), "q.csv, row 3: the gold answer 'maybe' is neither yes nor no"),
        ("mme", ask("Yes", kind="colour"), "MME has no category 'colour'"),
        ("textvqa", ask("a"), "q.csv, row 3: LLaVA's TextVQA metric needs ten answers"),
    ):
        with pytest.raises(ValueError, match=said):
            task_of(task).check([question], "llava")
    for task, question, said in (
        (
            "soft",
            ask("a b", "a b"),
            "1 of 1 questions have fewer than 10 human answers, as few as 2.*row 3, gold 'a b'",
        ),
        ("relaxed", ask("nan"), "1 of 1 questions are worth nothing by the rules of relaxed"),
        ("mme", ask("Yes", kind="count"), "sums are over 14 categories; missing: existence, position"),
        ("contains", ask(" "), "1 of 1 questions count an empty reply as right"),
    ):
        with pytest.warns(UserWarning, match=said):
            task_of(task).check([question], "official")
    recwarn.clear()
    for task, question in (
        ("exact", ask("A")), ("exact", ask("?")), ("letter", ask("F")), ("realworldqa", ask("left")), ("relaxed", ask("0")),
        ("hallusionbench", ask("0")), ("hallusionbench", ask("1")), ("pope", ask("yes")), ("exact", ask()), ("mmmu", ask("3.14")),
    ):  # fmt: skip
        task_of(task).check([question], "lmms")
    assert not [str(warning.message) for warning in recwarn]
    assert [task_of("exact").row(ask("A"), reply, "official").value for reply in ("A", "a.", "", "the")] == [1, 1, 0, 0]
    assert [task_of("letter").row(ask("F"), reply, "official").value for reply in ("F", "(F)", "A")] == [1, 1, 0]


def _row(
    key: str, value: float | None, parsed: str = "", kind: str = "", cluster: str = "", answer: str = "yes"
) -> Row:
    return Row(key, kind, cluster or key, (answer,), parsed, parsed, value)


def _random_rows(task: str, n: int = 120) -> list[Row]:
    rng = np.random.default_rng(3)
    kinds = {"pope": ["random", "popular"], "mme": ["existence", "OCR", "code_reasoning"]}.get(task, ["a", "b"])
    rows = []
    for i in range(n):
        answer, said = rng.choice(["yes", "no"], 2)
        rows.append(_row(str(i), float(answer == said), said, str(rng.choice(kinds)), f"c{i // 2}", answer))
    return rows


def test_headlines_as_sums_are_the_metrics() -> None:
    """What the bootstrap draws is the score that the metric's own function gives."""
    rows = _random_rows("pope")
    parts = [[row for row in rows if row.kind == kind] for kind in ("random", "popular")]
    f1 = [vqa.pope_scores([r.parsed for r in part], [r.answers[0] for r in part])["f1"] for part in parts]
    assert task_of("pope").scores(rows, "official")["f1_mean"] == pytest.approx(np.mean(f1))
    pooled = vqa.pope_scores([r.parsed for r in rows], [r.answers[0] for r in rows], "lmms")
    assert task_of("pope").scores(rows, "lmms")["accuracy"] == pytest.approx(pooled["accuracy"])
    rows = [Row(**{**r.__dict__, "cluster": f"{r.kind}/{r.cluster}"}) for r in _random_rows("mme")]
    scores = task_of("mme").scores(rows, "official")
    assert evaluate_terms(task_of("mme").terms(rows, "official")) == pytest.approx(scores["total"])
    assert scores["total"] == pytest.approx(scores["perception"] + scores["cognition"])
    rows = [
        Row(**{**r.__dict__, "id": str(i % 40 + i // 40 * 10**6), "cluster": str(i % 40)})
        for i, r in enumerate(_random_rows("mmbench"))
    ]
    scores = task_of("mmbench").scores(rows, "official")
    right = [all(r.value for r in rows if r.cluster == str(c)) for c in range(40)]
    assert scores["circular"] == pytest.approx(np.mean(right))
    assert evaluate_terms(task_of("mmbench").terms(rows, "official")) == pytest.approx(np.mean(right))
    assert task_of("mmbench").guess([Row("1", "", "1", (), "", "", 1.0, 0.25)] * 2) == pytest.approx(1 / 16)


def test_every_task_judges_an_empty_and_a_right_reply() -> None:
    golds = {"mme": "Yes", "pope": "yes", "yesno": "no", "hallusionbench": "1", "chartqa": "12", "relaxed": "12"}
    replies = {"yesno": "No", "hallusionbench": "Yes", "mme": "yes"}
    choices = ("mmbench", "scienceqa", "seedbench", "mmstar", "ai2d", "letter", "mmmu", *FILMS)
    for name, task in TASKS.items():
        gold = "B" if name in choices else golds.get(name, "red")
        options = (("A", "a cat"), ("B", "a dog")) if name in choices else ()
        question = Question(
            "7",
            "?",
            (),
            (gold,) * (10 if name in ("textvqa", "vqav2") else 4),
            options,
            kind=next(iter(task.drawn), ""),
        )
        for protocol in task.protocols:
            right = task.row(question, replies.get(name, gold), protocol)
            assert right.value == pytest.approx(1.0), (name, protocol)
            empty = task.row(question, "", protocol)
            # POPE's own parser takes an empty reply for a yes
            assert empty.value == (1.0 if (name, protocol) in {("pope", "official"), ("pope", "llava")} else 0.0), (
                name,
                protocol,
            )
            assert task.row(Question("7", "?", (), (), options, kind=question.kind), "x", protocol).value is None
            assert task.scores([right], protocol)[task.headline(protocol)] >= 1 or name == "mme"
    with pytest.raises(ValueError, match="has no protocol 'official': choose one of lmms"):
        TASKS["hallusionbench"].row(Question("7", "?", (), ("1",)), "", "official")
    with pytest.raises(ValueError, match="--task nope: choose one of vqav2"):
        task_of("nope")
    with pytest.raises(ValueError, match="'index'"):
        TASKS["mmbench"].row(Question("x", "?", (), ("A",)), "A", "official")


def test_retention_is_that_of_published_rows() -> None:
    """The rows of the card: LLaVA-1.5-7B, FastV and VisionZip."""
    names = ("gqa", "mmb", "mme", "textvqa", "sqa", "vqav2")
    base = dict(zip(names, (61.9, 64.7, 1862, 58.2, 69.5, 78.5), strict=True))
    for scores, published in (
        ((56.5, 63.7, 1786, 57.3, 69.5, 74.6), 96.5),
        ((59.3, 63.0, 1783, 57.3, 68.9, 76.8), 97.4),
        ((57.6, 62.5, 1721, 56.1, 69.1, 75.6), 95.7),
        ((44.1, 45.9, 1218, 50.7, 70.0, 52.0), 77.0),
        ((55.1, 60.1, 1690, 55.5, 69.0, 72.4), 93.3),
    ):
        assert relative_accuracy(dict(zip(names, scores, strict=True)), base) == pytest.approx(published, abs=0.055)
    low = dict(zip(names, (44.1, 45.9, 1218, 50.7, 70.0, 52.0), strict=True))
    assert overall_performance(low, base) == pytest.approx(78.0, abs=0.05)
    assert generalization(base, base) == 0 < generalization(low, base)
    assert corrected(0.6, 0.8, 0.5) == pytest.approx(1 / 3) and math.isnan(corrected(0.6, 0.5, 0.5))
    with pytest.raises(ValueError, match="base score of a is 0"):
        relative_accuracy({"a": 1.0}, {"a": 0.0})
    with pytest.raises(ValueError, match="cannot be set against"):
        relative_accuracy({"a": 1.0}, {"b": 1.0})


def test_verdicts() -> None:
    rng = np.random.default_rng(0)
    before = (rng.random(400) < 0.7).astype(float)
    worse = before * (rng.random(400) > 0.1)
    rows, lost = ([_row(str(i), v) for i, v in enumerate(values)] for values in (before, worse))
    task = task_of("exact")
    same = difference(task, "official", rows, rows, draws=200)
    assert (same.value, same.low, same.high, same.verdict) == (0.0, 0.0, 0.0, "same")
    found = difference(task, "official", rows, lost, draws=1000)
    drops = worse - before
    assert found.value == pytest.approx(drops.mean()) and found.verdict == "worse"
    assert found.error == pytest.approx(drops.std() / 20, rel=0.1)
    assert found.low < found.value < found.high < 0
    assert difference(task, "official", rows, lost, draws=1000) == found  # deterministic
    assert difference(task, "official", lost, rows, draws=1000).verdict == "better"
    assert found.changed == int((drops != 0).sum())
    wrong = [_row(str(i), 0.0) for i in range(6)]
    right = [_row(str(i), 1.0) for i in range(6)]
    assert difference(task, "official", right, wrong).verdict == "worse"
    assert (
        difference(task, "official", right[:5], wrong[:5]).verdict == "too few questions to tell"
    )  # 5 of 5 may be chance
    few = difference(task, "official", rows[:20], [*lost[:19], rows[19]], draws=300)
    assert few.verdict == "too few questions to tell"
    unchanged = [(n, difference(task, "official", rows[:n], rows[:n]).verdict) for n in (14, 199, 200)]
    assert [verdict for n, verdict in unchanged] == ["too few questions to tell", "too few questions to tell", "same"]


@pytest.mark.parametrize(
    ("change", "verdict", "outlook"),
    [  # 4 of 14 wrong now: the interval leaves 0 out, but the sign test has p = 0.125
        (
            Difference(-0.286, -0.502, -0.071, 0.1207, 4, 14),
            "too few questions to tell",
            "4 of 14 answers count differently; questions needed: about 21 for a difference as large as this one, about 12,000 "
            "for a difference of 1 point",
        ),
        (
            Difference(-0.02, -0.05, 0.01, 0.015, 40, 400),
            "too few questions to tell",
            "40 of 400 answers count differently; questions needed: about 930 for a difference as large as this one, about "
            "3,700 for a difference of 1 point",
        ),
        (
            Difference(0.0, 0.0, 0.0, 0.0, 0, 100),
            "too few questions to tell",
            "0 of 100 answers count differently; questions needed: about 400 for a difference of 1 point",
        ),
        (
            Difference(0.1, 0.05, 0.15, 0.02, 5, 51),  # six changed ones: 61.2 questions
            "too few questions to tell",
            "5 of 51 answers count differently; questions needed: about 62 for a difference as large as this one, about "
            "1,700 for a difference of 1 point",
        ),
        (Difference(-0.002, -0.009, 0.005, 0.0035, 20, 2000), "same", ""),
        (Difference(-0.004, -0.007, -0.001, 0.0015, 20, 2000), "same", ""),  # sure, and less than a point
        (Difference(-0.004, -0.0101, 0.002, 0.0025, 20, 2000), "too few questions to tell", ""),
        (Difference(0.004, -0.002, 0.0101, 0.0025, 20, 2000), "too few questions to tell", ""),
        (Difference(-0.02, -0.03, -0.01, 0.005, 60, 2000), "worse", ""),
        (Difference(0.02, 0.01, 0.03, 0.005, 60, 2000), "better", ""),
        (Difference(0.02, 0.01, 0.03, 0.0101, 60, 2000), "too few questions to tell", ""),
        (Difference(-10.0, -24.0, 4.0, 7.0, 60, 1000, 2800.0), "same", ""),  # MME: 28 of 2800 points
        (Difference(-60.0, -80.0, -40.0, 10.0, 5, 1000, 2800.0), "too few questions to tell", ""),
        (Difference(-60.0, -80.0, -40.0, 10.0, 6, 1000, 2800.0), "worse", ""),
    ],
)
def test_verdicts_and_how_many_questions_would_tell(change: Difference, verdict: str, outlook: str) -> None:
    assert change.verdict == verdict
    if outlook:
        assert change.outlook(change.clusters) == outlook
    if change.full > 1:
        assert "for a difference of 28 points" in change.outlook(2 * change.clusters)
        assert f"about {about(2 * change.needed(28))} for a difference of 28" in change.outlook(2 * change.clusters)
        assert f"of {change.clusters} groups of answers" in change.outlook(2 * change.clusters)


def test_a_comparison_that_will_show_at_the_number_foretold() -> None:
    """Four times the questions halve the spread; at the number that `needed` names a point is two spreads."""
    change = Difference(-0.02, -0.05, 0.01, 0.015, 40, 400)
    n = change.needed(0.01)
    then = replace(change, clusters=n, error=change.error * math.sqrt(400 / n))
    assert 2 * then.spread == pytest.approx(0.01, rel=0.02)
    assert change.needed(0.02) == pytest.approx(n / 4, abs=1)
    assert [about(x) for x in (1, 9.2, 20.5, 99, 101, 4321, 123456)] == [
        "1",
        "10",
        "21",
        "99",
        "110",
        "4,400",
        "130,000",
    ]


def test_the_interval_holds_95_of_100() -> None:
    """Its ends are 1.96 standard errors away, those of a 90 % interval 1.645."""
    rng = np.random.default_rng(5)
    values, ones = rng.normal(size=400), np.ones(400)
    terms, nothing = [(1.0, values, ones)], [(1.0, np.zeros(400), ones)]
    names = [str(i) for i in range(400)]
    for level, reach in ((0.95, 1.96), (0.9, 1.645)):
        given = {} if level == 0.95 else {"level": level}
        found = bootstrap(nothing, terms, names, 20000, **given)
        assert (found.high - found.low) / 2 / found.error == pytest.approx(reach, rel=0.02)
        assert found.error == pytest.approx(values.std() / 20, rel=0.03)
        assert found.value == pytest.approx(values.mean()) and (found.clusters, found.full) == (400, 1.0)


def test_a_comparison_tells_before_from_after_by_kind_and_above_chance() -> None:
    """Values, not signs: yes or no questions, of which guessing gets half; colours gain, shapes lose."""

    def record(plan: str, right: dict[str, list[int]]) -> dict[str, Any]:
        rows = [
            Row(f"{kind}{i}", kind, f"{kind}{i}", ("yes",), "", "yes" if hit else "no", float(hit), 0.5)
            for kind, hits in right.items()
            for i, hit in enumerate(hits)
        ]
        settings = {"task": "yesno", "protocol": "official", "plan": plan, "model": "m", "weights": "w", "suffix": None}
        score = sum(row.value or 0 for row in rows) / len(rows)
        return {
            "settings": settings, "answered": len(rows), "rows": [{**vars(row), "answers": list(row.answers)} for row in rows],
            "headline": "accuracy", "scores": {"accuracy": score}, "chance": 0.5, "visual_tokens": {},
        }  # fmt: skip

    base = record("stock", {"color": [1] * 8 + [0] * 12, "shape": [1] * 20})
    other = record("p", {"color": [1] * 18 + [0] * 2, "shape": [1] * 5 + [0] * 15})
    found = compare(base, other)
    assert (found.base_score, found.score) == (0.7, 0.575) and found.change is not None
    assert found.change.value == pytest.approx(-0.125) and found.retention == pytest.approx(0.575 / 0.7)
    assert found.above_chance == pytest.approx(0.075 / 0.2)  # of what stock has above the half that guessing gets
    color, shape = found.by_kind["color"], found.by_kind["shape"]
    assert color[:3] == (20, 0.4, 0.9) and shape[:3] == (20, 1.0, 0.25)
    assert color[3].value == pytest.approx(0.5) and shape[3].value == pytest.approx(-0.75)
    assert (color[3].verdict, shape[3].verdict) == ("better", "worse")
    assert color[3].error == pytest.approx(0.112, rel=0.1) and (color[3].changed, color[3].clusters) == (10, 20)
    assert 0.2 < color[3].low < 0.35 and 0.65 < color[3].high < 0.8
    assert -1 < shape[3].low < -0.85 and -0.65 < shape[3].high < -0.5
    back = Comparison.from_dict(json.loads(json.dumps(found.to_dict())))
    assert repr(back) == repr(found)
    sixes = found.to_dict() | {"change": {"value": 0.1, "low": 0.0, "high": 0.2, "error": 0.05, "changed": 3}}
    assert Comparison.from_dict(sixes).change.clusters == 40  # type: ignore[union-attr]  # records of before
    assert "half" not in by_chance(base) and by_chance(base) == ""
    text = by_chance(record("stock", {"color": [1] * 11 + [0] * 9}))
    assert "stock: 55.0 % of 20 questions is hardly more than guessing (50.0 %): look at the prompt" in text
    assert by_chance(record("stock", {"color": [1] * 15 + [0] * 5})) == ""
    many = record("stock", {"color": [1] * 2160 + [0] * 1840})  # sure to be more than half, and hardly is
    assert "54.0 % of 4000 questions is hardly more than guessing" in by_chance(many)
    assert (
        by_chance(record("stock", {"color": [1] * 2240 + [0] * 1760})) == ""
    )  # 56 %: a tenth of what guessing leaves is 5
    assert stock_first([other, base]) == [base, other] and stock_first([other]) == [other]
    with pytest.raises(ValueError, match=r"suffix: None and 'Be brief.': with --force"):
        compare(base, {**other, "settings": {**other["settings"], "suffix": "Be brief."}})


def test_bootstrap_draws_clusters() -> None:
    """Four copies of each question in one cluster tell no more than one."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=50)
    alone = [(1.0, values, np.ones(50))]
    fourfold = [(1.0, np.repeat(values, 4), np.ones(200))]
    nothing, nothing4 = [(1.0, np.zeros(50), np.ones(50))], [(1.0, np.zeros(200), np.ones(200))]
    names = [str(i) for i in range(50)]
    one = bootstrap(nothing, alone, names, 500)
    four = bootstrap(nothing4, fourfold, [name for name in names for _ in range(4)], 500)
    assert four.error == pytest.approx(one.error)
    apart = bootstrap(nothing4, fourfold, [str(i) for i in range(200)], 500)
    assert apart.error == pytest.approx(one.error / 2, rel=0.2)


def test_flips_and_mcnemar() -> None:
    before = [_row("1", 1, "a"), _row("2", 0, "b"), _row("3", 0.6, "c"), _row("4", None, "d"), _row("5", 1, "e")]
    after = [_row("5", 1, "e"), _row("2", 1, "x"), _row("3", 0.3, "y"), _row("4", None, "d"), _row("9", 1, "e")]
    found = flips(*paired(before, after))
    assert (found.questions, found.same, found.right_to_wrong, found.wrong_to_right) == (4, 2, 1, 1)
    assert found.agreement == 0.5
    assert mcnemar(0, 0) == 1 and mcnemar(0, 10) == pytest.approx(2 / 2**10) and mcnemar(3, 1) == pytest.approx(10 / 16)


def test_flops_of_published_rows() -> None:
    """FastV's ratios and totals of the card, grouped queries, the causal half."""
    full = prefill_flops(VICUNA, [612] * 32, "fastv")
    assert full / 32 == pytest.approx(99.33e9, rel=1e-3)
    for layer, part, published in ((2, 0.25, 77.4), (2, 0.5, 55.2), (2, 0.75, 33.2), (2, 0.9, 20.3), (3, 0.5, 56.7)):
        left = 612 - round(part * 576)
        ratio = 100 * prefill_flops(VICUNA, [612] * layer + [left] * (32 - layer), "fastv") / full
        assert ratio == pytest.approx(published, abs=0.05)
    for n, swiglu, exact, fastv in (
        (576, 3.817, 7.634, 2.986),
        (64, 0.416, 0.831, 0.323),
        (2880, 20.825, 41.650, 16.670),
    ):
        found = [prefill_flops(VICUNA, [n] * 32, how) / 1e12 for how in ("swiglu_mac", "exact", "fastv")]
        assert found == pytest.approx([swiglu, exact, fastv], abs=6e-4)
    qwen = Shape(3584, 18944, 28, 28, 4, 128)
    assert prefill_flops(qwen, [768] * 28) / 1e12 == pytest.approx(10.260, abs=6e-4)
    assert prefill_flops(qwen, [768] * 28, "swiglu_mac") / 1e12 == pytest.approx(5.60, abs=6e-3)
    pairs = prefill_flops(VICUNA, [10]) - prefill_flops(VICUNA, [10], causal=True)
    assert pairs == 2 * 2 * (100 - 55) * 4096
    with pytest.raises(ValueError, match=r"convention='mine'.*exact, swiglu_mac, fastv"):
        prefill_flops(VICUNA, [10], "mine")


def test_vision_flops_are_what_torch_counts() -> None:
    import transformers

    config = transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
    )
    model: Any = transformers.CLIPVisionModel(config).eval()
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, 28, 28))
    assert vit_flops(config) == counter.get_total_flops()
    clip = SimpleNamespace(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, image_size=336, patch_size=14
    )
    assert vit_flops(clip, 23) / 1e12 == pytest.approx(0.3660, abs=6e-5)
    assert mlp_projector_flops(576, 1024, 4096) / 1e12 == pytest.approx(0.0242, abs=6e-5)
