# SPDX-License-Identifier: Apache-2.0
"""Explanations in several threads on one model: each is what it is alone, and nothing of them stays."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import mmcompress as mm
from mmcompress.explain import EXPLANATIONS

from . import reference  # noqa: F401 - registers by_feature, pairs_mean, by_hidden
from .families import build, image, prompts

THREADS = 4


def asked(model: Any, family: str) -> list[tuple[dict[str, Any], list[int]]]:
    """Prompts of different lengths and pictures, with answers of different lengths."""
    parts = (
        [3, image(family), 6],
        [1, image(family, other=True), 9],
        [2, image(family), 2, image(family, other=True), 4],
    )
    answers = ([31, 77, 31, 58], [44], [12, 99])
    return [(prompts(model, family, [list(p)], seed=s), a) for s, (p, a) in enumerate(zip(parts, answers, strict=True))]


def at_once(work: list[Callable[[], Any]]) -> list[Any]:
    """All of it in threads that begin together."""
    start = threading.Barrier(THREADS)
    with ThreadPoolExecutor(THREADS, initializer=start.wait) as pool:
        return list(pool.map(lambda one: one(), work))


def hooks(model: Any) -> dict[str, tuple[int, int]]:
    """How many each module has."""
    return {name: (len(m._forward_pre_hooks), len(m._forward_hooks)) for name, m in model.named_modules()}


def same(a: mm.Explanation, b: mm.Explanation) -> bool:
    alike = [torch.equal(x.nan_to_num(-1), y.nan_to_num(-1)) for x, y in ((a.maps, b.maps), (a.relevance, b.relevance))]
    seen = [torch.equal(x.valid, y.valid) for x, y in zip(a.visuals, b.visuals, strict=True)]
    return all([*alike, *seen, a.plan == b.plan, a.layers == b.layers, a.answer_ids == b.answer_ids])


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
@pytest.mark.parametrize("plan", ["", "pairs_mean(keep=0.5) >> by_hidden(layer=2, keep=0.5)"])
def test_each_is_what_it_is_alone(family: str, plan: str) -> None:
    model = build(family)
    if plan:
        mm.compress(model, plan)
    given = [(f, *one) for one in asked(model, family) for f in EXPLANATIONS.values()]
    alone = [f(model, None, inputs=inputs, answer=answer) for f, inputs, answer in given]
    expected = [model(**inputs).logits.detach() for _, inputs, _ in given]
    shown: list[bool] = []
    before = hooks(model)

    def explain(i: int) -> mm.Explanation:
        f, inputs, answer = given[i]
        return f(model, None, inputs=inputs, answer=answer)

    def plain(i: int) -> None:
        """A call of the model itself meanwhile."""
        with torch.no_grad():
            shown.append(torch.equal(model(**given[i][1]).logits, expected[i]))

    work: list[Callable[[], Any]] = []
    for i in range(len(given)):
        work += [lambda i=i: explain(i), lambda i=i: plain(i)]
    found = [one for one in at_once(work) if one is not None]
    assert len(found) == len(alone) and all(map(same, found, alone))
    assert len(shown) == len(given) and all(shown)
    assert hooks(model) == before and not model.training and all(p.requires_grad for p in model.parameters())


@torch.no_grad()
def test_the_trace_of_a_thread_is_that_of_its_own_call() -> None:
    """Explanations in other threads are not in it; a thread that made no call sees the last one of all."""
    model = mm.compress(build("llava"), "by_feature(keep=0.5)")
    (short, answer), _, (two, _) = asked(model, "llava")

    def traced() -> list[int]:
        model(**two)
        seen = []
        for _ in range(20):
            explained.wait(0.005)
            seen.append(len(mm.trace(model).visuals))
        return seen

    explained = threading.Event()

    def explain() -> list[int]:
        found = [mm.token_activation_map(model, None, inputs=short, answer=answer) for _ in range(3)]
        explained.set()
        return [len(one.trace.visuals) for one in found]

    counts = at_once([traced, explain, traced, explain])
    assert counts == [[2] * 20, [1] * 3, [2] * 20, [1] * 3]
    assert len(mm.trace(model).visuals) in (1, 2)  # of all threads: none of it was made in this one
    model(**short)
    at_once([lambda: model(**two)] * THREADS)
    assert len(mm.trace(model).visuals) == 1
    other = mm.compress(build("llava"), "by_feature(keep=0.25)")
    other(**two)
    assert len(mm.trace(other).visuals) == 2 and [v.kept for v in mm.trace(other).visuals] == [4, 4]


def test_what_trained_trains_again() -> None:
    """Module by module, when the last session has ended."""
    model = build("llava").train()
    model.model.vision_tower.eval()
    before = {name: module.training for name, module in model.named_modules()}
    assert len(set(before.values())) == 2
    inputs, answer = asked(model, "llava")[0]
    found = at_once([lambda: mm.token_activation_map(model, None, inputs=inputs, answer=answer)] * (2 * THREADS))
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(same(found[0], one) for one in found)
    with pytest.raises(ValueError, match="not compressed"):
        mm.trace(model)


def test_a_plan_that_comes_meanwhile_stays() -> None:
    model = build("llava")
    inputs, answer = asked(model, "llava")[0]
    from mmcompress.explain.session import session

    with session(model, None, None, "", inputs=inputs, answer=answer) as s:
        s.run()
        assert s.plan == "" and s.trace is not None
        mm.compress(model, "by_feature(keep=0.5)")
        with session(model, None, None, "", inputs=inputs, answer=answer) as other:
            other.run()
            assert other.plan == "by_feature(keep=0.5)"
    model(**inputs)
    assert [v.kept for v in mm.trace(model).visuals] == [8]
