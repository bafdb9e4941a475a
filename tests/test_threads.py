# SPDX-License-Identifier: Apache-2.0
"""Many callers, and calls that end badly: the state of a call belongs to the call, and nothing is left behind."""

from __future__ import annotations

import gc
import resource
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import mmcompress as mm
from mmcompress.runtime.scope import _STACK

from .families import build, image, prompts
from .tiny import GREEDY

PLANS = [
    "visionzip(keep=0.25) >> fastv(layer=2, keep=0.5)",
    "tome(keep=0.5) >> visionzip(keep=0.5)",
    "sparsevlm",
    "transprune",
    "explain_compress(keep=0.5)",
    "cdpruner(keep=0.4) >> dart(layer=1, keep=0.5)",
    "cmai",
    "sink_correction(dims=(3, 17)) >> var_attention_sink(dims=(3, 17))",
]


def questions(model: Any, family: str, count: int) -> list[dict[str, torch.Tensor]]:
    """Prompts of other lengths and pictures, some of several rows, some without any picture."""
    found = []
    for i in range(count):
        parts: list[Any] = [[2 + i, image(family, bool(i % 2)), 3 + i % 3]]
        if i % 3 == 1:
            parts.append([4, image(family), 2, image(family, True), 3])
        if i % 4 == 3:
            parts = [[5 + i]]
        found.append(prompts(model, family, parts, seed=i))
    return found


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "plan", "calls"),
    [
        *(("llava", plan, 200 if plan == PLANS[0] else 80) for plan in PLANS),
        ("internvl", PLANS[1], 80), ("qwen2_5_vl", PLANS[0], 80),
    ],
)  # fmt: skip
def test_eight_threads_get_what_one_gets(family: str, plan: str, calls: int) -> None:
    """Many calls, forward and generate, on one compressed model."""
    model = mm.compress(build(family), plan)
    asked = questions(model, family, 8)
    ask = [lambda x: model(**x).logits, lambda x: model.generate(**x, **GREEDY)]
    right = [[f(x) for f in ask] for x in asked]

    def work(number: int) -> bool:
        with torch.no_grad():
            which, how = number % 8, number // 8 % 5 == 4  # every fifth call generates
            return torch.equal(ask[how](asked[which]), right[which][how])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(calls)))
    finally:
        sys.setswitchinterval(before)


class Interrupted(BaseException):
    """As KeyboardInterrupt, which hooks that are always called do not see."""


@torch.no_grad()
@pytest.mark.parametrize("how", [ValueError, Interrupted])
@pytest.mark.parametrize("where", ["vision_tower", "language_model"])
def test_the_call_after_one_that_failed_is_right(how: type[BaseException], where: str) -> None:
    model = build("llava")
    first, second = questions(model, "llava", 2)
    mm.compress(model, PLANS[0])
    right = model(**second).logits

    def fail(*_: Any) -> None:
        raise how("in the middle")

    module = getattr(model.model, where)
    layer = module.layers[2] if where == "language_model" else module.encoder.layers[2]
    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(how):
        model(**first)
    handle.remove()
    assert torch.equal(model(**second).logits, right)
    mm.uncompress(model)
    assert not _STACK.scopes


@pytest.mark.slow
@torch.no_grad()
def test_soak() -> None:
    """2,000 calls with changing plans, errors and interrupts in between: answers right, memory flat, hooks gone."""
    model = build("llava")
    model(**questions(model, "llava", 1)[0])  # transformers puts its own hooks in at the first call
    stock = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    asked = questions(model, "llava", 8)
    plans = [None, *PLANS[:4], "divprune(keep=0.3)"]
    right: dict[tuple[int, int], torch.Tensor] = {}
    peaks = []
    for i in range(2000):
        plan, which = i // 7 % len(plans), i % 8
        if plans[plan] is None:
            mm.uncompress(model)
        elif i % 7 == 0:
            mm.compress(model, plans[plan])
        if i % 11 == 5:
            error = Interrupted if i % 2 else RuntimeError

            def fail(*_: Any, error: Any = error) -> None:
                raise error("in the middle")

            handle = model.model.language_model.layers[i % 4].register_forward_pre_hook(fail)
            with pytest.raises(error):
                model(**asked[which])
            handle.remove()
            continue
        logits = model(**asked[which]).logits
        assert torch.equal(right.setdefault((plan, which), logits), logits)
        if i % 100 == 99:
            gc.collect()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    mm.uncompress(model)
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == stock
    assert not _STACK.scopes and not _STACK.notes[1]
    assert peaks[-1] - peaks[4] < 20_000, f"kB over time: {peaks}"
