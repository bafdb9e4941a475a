# SPDX-License-Identifier: Apache-2.0
"""VQA metrics and statistics beyond the recorded cases: slow twins, differences of protocols, published numbers."""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcompress.eval import metrics as vqa
from mmcompress.eval.cost.vision_flops import mlp_projector_flops, vit_flops
from mmcompress.eval.data import Question
from mmcompress.eval.statistics import (
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
    choices = ("mmbench", "scienceqa", "seedbench", "mmstar", "ai2d", "letter", "mmmu")
    for name, task in TASKS.items():
        gold = "B" if name in choices else golds.get(name, "red")
        options = (("A", "a cat"), ("B", "a dog")) if name in choices else ()
        question = Question("7", "?", (), (gold,) * (10 if name in ("textvqa", "vqav2") else 4), options, kind="color")
        for protocol in task.protocols:
            right = task.row(question, replies.get(name, gold), protocol)
            assert right.value == pytest.approx(1.0), (name, protocol)
            empty = task.row(question, "", protocol)
            # POPE's own parser takes an empty reply for a yes
            assert empty.value == (1.0 if (name, protocol) in {("pope", "official"), ("pope", "llava")} else 0.0), (
                name,
                protocol,
            )
            assert task.row(Question("7", "?", (), (), options, kind="color"), "x", protocol).value is None
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


def test_bootstrap_calls_ties_ties() -> None:
    rng = np.random.default_rng(0)
    before = (rng.random(400) < 0.7).astype(float)
    worse = before * (rng.random(400) > 0.1)
    rows, lost = ([_row(str(i), v) for i, v in enumerate(values)] for values in (before, worse))
    task = task_of("exact")
    same = difference(task, "official", rows, rows, draws=200)
    assert (same.value, same.low, same.high, same.verdict) == (0.0, 0.0, 0.0, "tie")
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
    assert difference(task, "official", right[:5], wrong[:5]).verdict == "tie"  # 5 of 5 may be chance
    few = difference(task, "official", rows[:20], [*lost[:19], rows[19]], draws=300)
    assert few.verdict == "tie"


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
