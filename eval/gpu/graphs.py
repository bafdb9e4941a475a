# SPDX-License-Identifier: Apache-2.0
"""Step `graphs`: every kernel and a decode step of every plan as a CUDA graph, whose replay gives the bits of a plain run.

A decode step with a cache that grows is captured for the one length that it has: what is shown is that nothing in it waits,
copies from the host or asks the device, which is all that serving engines with their own caches need.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ...assets import MODELS
from ..kernel_bench.operations import OPERATIONS, Draw, Size, caller
from .bench import Bench, Item, captured, copied, same_bits
from .waits import as_plan, loaded, plans, prefill, step


def graphs(bench: Bench) -> dict[str, Item]:
    found: dict[str, Item] = {f"kernel {op}": partial(_kernel, bench, op) for op in OPERATIONS}
    models = bench.pick(MODELS[::2], MODELS[:1])
    for name in models:
        found |= {f"{name} {plan}": partial(_decode, bench, name, plan) for plan in ("stock", *plans(bench))}
    return found


def _kernel(bench: Bench, op: str) -> Iterator[dict[str, Any]]:
    known = OPERATIONS[op]
    k = 8 if known.k is None else known.k
    for n, d in bench.pick(((576, 1024), (5000, 128)), ((24, 16),)):
        run = caller(op, "triton", known.inputs(Draw(Size(n, bench.width(op, d), k), bench.device.type)))
        expected = copied(run())
        if bench.dry:
            found, is_captured = run(), None
        else:
            graph, found = captured(run)
            for x in found if isinstance(found, tuple | list) else (found,):
                if isinstance(x, torch.Tensor):
                    x.zero_()  # what the replay does not write shows
            graph.replay()
            torch.cuda.synchronize()
            is_captured = True
        yield {
            "op": op,
            "n": n,
            "d": bench.width(op, d),
            "captured": is_captured,
            "same_bits": same_bits(found, expected),
        }


def _decode(bench: Bench, name: str, plan: str) -> Iterator[dict[str, Any]]:
    model, inputs = loaded(bench, name)
    with as_plan(model, plan):
        plain, warm, mine = (prefill(model, inputs) for _ in range(3))
        token = plain.logits[:, -1].argmax(-1, keepdim=True)
        expected = step(model, plain, token).logits.clone()
        if bench.dry:
            found, is_captured = step(model, mine, token).logits, None
        else:
            graph, out = captured(lambda: step(model, mine, token), lambda: step(model, warm, token))
            found, is_captured = out.logits, True
            graph.replay()
            torch.cuda.synchronize()
    yield {
        "model": name, "plan": plan, "captured": is_captured, "same_bits": same_bits(found, expected),
        "largest_difference": float((found - expected).abs().max()),
    }  # fmt: skip
