# SPDX-License-Identifier: Apache-2.0
"""Honest clocks: prefill, decode and memory of a model with and without a plan, in one run."""

from __future__ import annotations

import gc
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import mmcompress as mm
from mmcompress.trace import Shape, kv_bytes, prefill_flops


def midsize_llava(dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A random LLaVA-1.5 of about 230 M parameters: CLIP-L/14-336 cut to 4 layers (576 tokens), LLaMA 1024 x 12."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=4,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=32064, max_position_embeddings=4096,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=32000)
    )
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def one_image_prompt(model: Any, text_tokens: int = 40, seed: int = 0) -> dict[str, torch.Tensor]:
    """One image and `text_tokens` text tokens around it, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    vision = model.config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    text = torch.randint(5, 30000, (text_tokens,), generator=generator)
    ids = torch.cat([text[:5], torch.full((tokens,), model.config.image_token_id), text[5:]])[None]
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
    return {"input_ids": ids.to(model.device), "pixel_values": pixels.to(model.device, model.dtype)}


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
    peak_rss_mib: float | None = None


def synchronize() -> None:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _milliseconds(run: Callable[[], Any]) -> float:
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return 1000 * (time.perf_counter() - start)


def vision_flops(config: Any, merged: Sequence[int] | None = None) -> int:
    """FLOPs of a CLIP-style tower and a two-layer projector for one image, all blocks and the patch embedding included.

    merged: tokens that an encoder stage merges away between attention and MLP of each block.
    """
    v, width = config.vision_config, config.text_config.hidden_size
    patches = (v.image_size // v.patch_size) ** 2
    n, d, m = patches + 1, v.hidden_size, v.intermediate_size
    macs = patches * (3 * v.patch_size**2 * d + d * width + width * width)
    for gone in merged or [0] * v.num_hidden_layers:
        macs += 4 * n * d * d + 2 * n * n * d
        n -= gone
        macs += 2 * n * d * m
    return 2 * macs


@torch.no_grad()
def measure(model: Any, plans: Sequence[str], repeats: int = 20, warmup: int = 3, new_tokens: int = 32) -> list[Timing]:
    """Time the stock model and every plan, interleaved (one run of each per round), batch 1, one image.

    Prefill is one forward pass on preprocessed inputs with an empty cache: vision tower, projector, compression, LLM,
    last logits. Decode is the mean of `new_tokens` greedy steps behind it. Medians over `repeats` rounds.
    """
    inputs = one_image_prompt(model)
    prefill: dict[str, list[float]] = {plan: [] for plan in plans}
    decode: dict[str, list[float]] = {plan: [] for plan in plans}
    select: dict[str, list[float]] = {plan: [] for plan in plans}
    cost: dict[str, tuple[int, int]] = {}
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
                    out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)

            first = _milliseconds(run_prefill)
            if plan != "stock":
                report = mm.report(model)
                vision = vision_flops(model.config, mm.trace(model).call.merged)
                cost[plan] = (vision + report.flops, report.kv_bytes)
                chosen = report.milliseconds["select"]
            else:
                chosen = 0.0
            steps = _milliseconds(run_decode) / new_tokens
            if round_ >= warmup:
                prefill[plan].append(first)
                decode[plan].append(steps)
                select[plan].append(chosen)
            mm.uncompress(model)
    shape, length = Shape.of(model.config.text_config), inputs["input_ids"].shape[1]
    width = next(model.parameters()).dtype.itemsize
    stock_cost = vision_flops(model.config) + prefill_flops(shape, [length] * shape.layers)
    stock_kv = kv_bytes(shape, [length] * shape.layers, width)
    rows = []
    for plan in plans:
        flops, kv = cost.get(plan, (stock_cost, stock_kv))
        rows.append(
            Timing(
                plan,
                statistics.median(prefill[plan]),
                _iqr(prefill[plan]),
                statistics.median(decode[plan]),
                _iqr(decode[plan]),
                statistics.median(select[plan]),
                stock_cost / flops,
                kv,
            )
        )
    stock = rows[list(plans).index("stock")]
    for row in rows:
        row.prefill_speedup = stock.prefill_ms / row.prefill_ms
        row.speedup_over_flops_ratio = row.prefill_speedup / row.flops_ratio
        row.decode_overhead_percent = 100 * (row.decode_ms_per_token / stock.decode_ms_per_token - 1)
    return rows


def _iqr(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    quarters = statistics.quantiles(values, n=4)
    return quarters[2] - quarters[0]


def peak_memory(plan: str) -> float:
    """Peak resident memory in MiB of a fresh process that builds the mid-size model and generates with `plan`."""
    code = (
        "import sys, torch, mmcompress as mm; from mmcompress.eval.latency import *; "
        "model = midsize_llava(); plan = sys.argv[1]; plan == 'stock' or mm.compress(model, plan); "
        "model.generate(**one_image_prompt(model), do_sample=False, max_new_tokens=8, pad_token_id=0); print(peak_rss_mib())"
    )
    out = subprocess.run([sys.executable, "-c", code, plan], capture_output=True, text=True, check=True)
    return float(out.stdout.split()[-1])


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far, MiB (Linux counts in KiB, macOS in bytes)."""
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def machine() -> dict[str, Any]:
    """Where a number comes from: device, threads, versions, commit."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "device": accelerator or _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mmcompress": mm.__version__,
        "commit": commit or None,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def record(rows: Sequence[Timing], **conditions: Any) -> dict[str, Any]:
    """Everything of a run, for JSON."""
    return {"machine": machine(), "conditions": conditions, "rows": [asdict(row) for row in rows]}
