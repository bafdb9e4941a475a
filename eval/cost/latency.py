# SPDX-License-Identifier: Apache-2.0
"""Honest clocks: prefill, decode and memory of a model with and without a plan, in one run."""

from __future__ import annotations

import gc
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

import mmcompress as mm

from ...api import plan_for
from ...flops import counted
from ...runtime.cache import CACHE, cache_of
from ..machine import synchronize
from .clock import Spread
from .counts import language_model
from .midsize import one_image_prompt


@dataclass
class Timing:
    """Medians of one plan, milliseconds; `iqr` is the spread of the middle half. `select_ms` is a part of the prefill:
    signals, choice and packing."""

    plan: str
    prefill_ms: float
    prefill_iqr_ms: float
    decode_ms_per_token: float
    decode_iqr_ms: float
    select_ms: float
    flops_ratio: float
    kv_bytes: int
    prefill_speedup: float = 1.0
    speedup_over_flops_ratio: float = 1.0
    decode_overhead_percent: float = 0.0

    HEADINGS: ClassVar = (
        "plan",
        "prefill ms",
        "speed-up",
        "FLOPs ratio",
        "reached",
        "selection ms",
        "decode ms",
        "decode",
        "KV MiB",
    )

    def cells(self) -> list[str]:
        """A line of a table with these headings."""
        return [
            self.plan,
            f"{self.prefill_ms:.0f} ± {self.prefill_iqr_ms / 2:.0f}",
            f"{self.prefill_speedup:.2f}x",
            f"{self.flops_ratio:.2f}x",
            f"{100 * self.speedup_over_flops_ratio:.0f} %",
            f"{self.select_ms:.1f}",
            f"{self.decode_ms_per_token:.1f}",
            f"{self.decode_overhead_percent:+.1f} %",
            f"{self.kv_bytes / 2**20:.1f}",
        ]


def milliseconds(run: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return 1000 * (time.perf_counter() - start)


def count_flops(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """FLOPs (2 per multiply-add) of the whole prefill, vision included, as torch counts them."""
    return counted(model, inputs, language_model(model)).total


@torch.no_grad()
def measure(model: Any, plans: Sequence[str], repeats: int = 20, warmup: int = 1, new_tokens: int = 32) -> list[Timing]:
    """Time the stock model and every plan, interleaved (one run of each per round), batch 1, one image.

    Prefill is one forward pass on preprocessed inputs with an empty cache: vision tower, projector, compression, LLM,
    last logits. Decode is the mean of `new_tokens` greedy steps behind it. Medians over `repeats` rounds.
    """
    plans = [plan if plan == "stock" else repr(plan_for(model, plan)) for plan in plans]
    inputs = one_image_prompt(model)
    prefill: dict[str, list[float]] = {plan: [] for plan in plans}
    decode: dict[str, list[float]] = {plan: [] for plan in plans}
    select: dict[str, list[float]] = {plan: [] for plan in plans}
    for round_ in range(warmup + repeats):
        for plan in plans:
            if plan != "stock":
                mm.compress(model, plan, timing=True)
            out: Any = None

            def run_prefill() -> None:
                nonlocal out
                out = model(**inputs, use_cache=True, logits_to_keep=1)

            def run_decode() -> None:
                nonlocal out
                for _ in range(new_tokens):
                    token = out.logits[:, -1].argmax(-1, keepdim=True)
                    out = model(input_ids=token, use_cache=True, **{CACHE: cache_of(out)})

            first = milliseconds(run_prefill)
            chosen = mm.report(model).milliseconds["select"] if plan != "stock" else 0.0
            steps = milliseconds(run_decode) / new_tokens
            if round_ >= warmup:
                prefill[plan].append(first)
                decode[plan].append(steps)
                select[plan].append(chosen)
            mm.uncompress(model)
    cost: dict[str, tuple[int, int]] = {}
    for plan in ("stock", *plans):
        if plan != "stock":
            mm.compress(model, plan)
        found = counted(model, inputs, language_model(model))
        cost[plan] = found.total, found.held
        mm.uncompress(model)
    rows = []
    for plan in plans:
        flops, kv = cost[plan]
        rows.append(
            Timing(
                plan,
                statistics.median(prefill[plan]),
                Spread.of(prefill[plan]).iqr,
                statistics.median(decode[plan]),
                Spread.of(decode[plan]).iqr,
                statistics.median(select[plan]),
                cost["stock"][0] / flops,
                kv,
            )
        )
    stock = rows[list(plans).index("stock")]
    for row in rows:
        row.prefill_speedup = stock.prefill_ms / row.prefill_ms
        row.speedup_over_flops_ratio = row.prefill_speedup / row.flops_ratio
        row.decode_overhead_percent = 100 * (row.decode_ms_per_token / stock.decode_ms_per_token - 1)
    return rows


def video_memory(plan: str, frames: int = 20, side: int = 64) -> dict[str, Any]:
    """Peak resident memory of a fresh process that runs the prefill of a 20,480-token video with `plan`, in MiB, and what
    the process held before the prefill (libraries, model, pixels; libraries are loaded by `compress` too, so that what the prefill
    adds is to be compared). frames, side: of another video, as `long_video` has them."""
    code = (
        "import sys, torch, mmcompress as mm; from mmcompress.eval.cost.midsize import long_video; "
        "from mmcompress.eval.cost.latency import peak_rss_mib; plan = sys.argv[1]; "
        "from mmcompress.eval.machine import resident_now; "
        "model, inputs = long_video(*map(int, sys.argv[2:])); "
        "plan == 'stock' or mm.compress(model, plan); before = (resident_now() or 0) / 2**20 or peak_rss_mib(); "
        "torch.set_grad_enabled(False); "
        "model(**inputs, use_cache=True, logits_to_keep=1); "
        "print(before, peak_rss_mib(), 0 if plan == 'stock' else mm.trace(model).visuals[0].kept)"
    )
    out = subprocess.run([sys.executable, "-c", code, plan, str(frames), str(side)], capture_output=True, text=True)
    if out.returncode:  # killed for its memory, or refused
        last = (out.stderr.strip().splitlines() or [f"exit status {out.returncode}"])[-1]
        raise ChildProcessError(f"{plan}: the process that measures its memory ended: {last}")
    before, peak, kept = map(float, out.stdout.split()[-3:])
    return {"plan": plan, "before_mib": before, "peak_mib": peak, "kept": int(kept)}


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far, MiB. Linux: VmHWM, since ru_maxrss is handed down by the parent process."""
    gc.collect()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return float(line.split()[1]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
