# SPDX-License-Identifier: Apache-2.0
"""Step `repeats`: the same inputs twice give the same bits, kernels, selections and logits. The digests tell two runs apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ...assets import MODELS
from ..kernel_bench.operations import OPERATIONS, Draw, Size, caller
from .bench import Bench, Item, copied, same_bits
from .selection import cases, inputs_of, select
from .waits import as_plan, loaded, plans, prefill, step

TIMES = 3


def repeats(bench: Bench) -> dict[str, Item]:
    found: dict[str, Item] = {f"kernel {op}": partial(_kernel, bench, op) for op in OPERATIONS}
    found |= {f"selection {name}": partial(_selection, bench, name) for name in cases(bench)}
    for name in bench.pick(MODELS[::2], MODELS[:1]):
        found |= {f"{name} {plan}": partial(_model, bench, name, plan) for plan in ("stock", *plans(bench))}
    return found


def _again(run: Any) -> tuple[bool, str]:
    """Whether runs give the same bits, and a digest of them."""
    first = copied(run())
    same = all(same_bits(first, copied(run())) for _ in range(TIMES - 1))
    digest = hashlib.sha256()
    for x in first:
        digest.update(x.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes())
    return same, digest.hexdigest()[:16]


def _kernel(bench: Bench, op: str) -> Iterator[dict[str, Any]]:
    known = OPERATIONS[op]
    for dtype in bench.pick(("float32", "float16", "bfloat16"), ("float32",)):
        n, d = bench.pick((2880, 1024), (24, 16))
        size = Size(n, bench.width(op, d), bench.pick(288, 5) if known.k is None else known.k, dtype)
        same, digest = _again(caller(op, "triton", known.inputs(Draw(size, bench.device.type))))
        yield {"op": op, "dtype": dtype, "same_bits": same, "digest": digest}


def _selection(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    for stage, visuals in inputs_of(bench, name):
        same, digest = _again(partial(select, stage, visuals))
        yield {"stage": stage.name, "same_bits": same, "digest": digest}


def _model(bench: Bench, name: str, plan: str) -> Iterator[dict[str, Any]]:
    model, inputs = loaded(bench, name)

    def run() -> list[torch.Tensor]:
        out = prefill(model, inputs)
        logits = [out.logits]
        for _ in range(2):
            out = step(model, out)
            logits.append(out.logits)
        return logits

    with as_plan(model, plan):
        run()
        same, digest = _again(run)
    yield {"model": name, "plan": plan, "same_bits": same, "digest": digest}
