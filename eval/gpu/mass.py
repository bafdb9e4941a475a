# SPDX-License-Identifier: Apache-2.0
"""Step `mass`: what it costs that a merged token weighs as much as what it stands for: log mass on the logit of its key.

Two ways to say so to torch's attention: a mask of numbers, which the flash kernel does not take; or one more channel, one in the
queries and log mass in the keys (eight, since kernels want such widths). Both beside plain attention, in the shapes of 7B models,
prefill and a decode step; and the whole prefill of a model whose plan merges, with its masses and without.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cost.masses import ATTENTIONS, PLAN, mass_costs, there
from ..cost.midsize import build, one_image_prompt
from .bench import Bench, Item
from .models import TINY

SHAPES = {
    "prefill 720": (720, 720),
    "prefill 2,880": (2880, 2880),
    "decode behind 720": (1, 720),
    "decode behind 2,880": (1, 2880),
}
WIDTH, HEADS = 128, 32
CHANNELS = 8


def mass(bench: Bench) -> dict[str, Item]:
    found: dict[str, Item] = {}
    for name, (queries, keys) in bench.pick(SHAPES, {"prefill 24": (24, 24), "decode behind 24": (1, 24)}).items():
        for batch in bench.pick((1, 8), (1,)):
            found[f"{name}, batch {batch}"] = partial(_attention, bench, name, batch, queries, keys)
    found["model"] = partial(_model, bench)
    return found


def _attention(bench: Bench, name: str, batch: int, queries: int, keys: int) -> Iterator[dict[str, Any]]:
    heads, width = bench.pick((HEADS, WIDTH), (2, 16))
    dtype = bench.pick(torch.bfloat16, torch.float32)
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(bench.device, dtype)

    q, k, v = noise(batch, heads, queries, width), noise(batch, heads, keys, width), noise(batch, heads, keys, width)
    log_mass = torch.randint(1, 5, (batch, keys), generator=generator).float().log().to(bench.device, dtype)
    causal = queries > 1
    bias = log_mass[:, None, None].expand(batch, 1, queries, keys)
    if causal:
        ahead = torch.ones(queries, keys, dtype=torch.bool, device=bench.device).triu(1)
        bias = bias.masked_fill(ahead, torch.finfo(dtype).min)
    bias, scale = bias.contiguous(), width**-0.5
    wide_q = F.pad(q, (0, CHANNELS))
    wide_q[..., width] = 1 / scale
    wide_k, wide_v = F.pad(k, (0, CHANNELS)), F.pad(v, (0, CHANNELS))
    wide_k[..., width] = log_mass[:, None]
    ways = {
        "plain": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale),
        "additive mask": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale),
        "extra channel": lambda: F.scaled_dot_product_attention(wide_q, wide_k, wide_v, is_causal=causal, scale=scale)[
            ..., :width
        ],
    }
    exact = (q.float() @ k.float().transpose(2, 3) * scale + bias.float()).softmax(-1) @ v.float()
    for way, run in ways.items():
        error = float((run().float() - exact).abs().max()) if way != "plain" else None
        yield {
            "what": "attention", "shape": name, "batch": batch, "heads": heads, "width": width, "way": way,
            "ms": bench.wall(run, bench.pick(20, 1), 0.5), "device_ms": bench.replayed(run), "largest_error": error,
        }  # fmt: skip


def _model(bench: Bench) -> Iterator[dict[str, Any]]:
    """A mid-size model without a plan, with one that merges, and with its masses in every way: `mmcompress bench mass`."""
    sizes: dict[str, Any] = bench.pick({"num_hidden_layers": 16, "hidden_size": 2048, "intermediate_size": 5632}, TINY)
    model = build("llava", bench.pick(torch.bfloat16, torch.float32), **sizes).to(bench.device)
    repeats, warmup, new_tokens = bench.pick((9, 2, 16), (1, 0, 2))
    attentions = there(model)
    for row in mass_costs(model, one_image_prompt(model), PLAN, attentions, repeats, warmup, new_tokens):
        yield {"what": "model", "plan": PLAN, **dataclasses.asdict(row)}
    for name in sorted(set(ATTENTIONS) - set(attentions)):
        yield {"what": "model", "plan": PLAN, "attention": name, "way": "not installed"}
