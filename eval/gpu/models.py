# SPDX-License-Identifier: Apache-2.0
"""Step `models`: prefill, decode, cache and peak memory of released shapes with random weights, stock and with plans, for one
prompt and for eight, with the attention of torch and with flash attention where that is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

from ..cost import released
from ..cost.midsize import build as midsize
from .bench import Bench, Item, Skip

PLANS = ("divprune(keep=0.25)", "visionzip(keep=0.25)", "fastv(layer=2, keep=0.25)", "divprune(keep=0.11)")
ATTENTION = ("sdpa", "flash_attention_2")
TINY: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2,
}  # fmt: skip
HELD: dict[str, Any] = {}
"""The model that was built last: one at a time."""


def models(bench: Bench) -> dict[str, Item]:
    names = bench.pick(released.NAMES, released.NAMES[:1])
    variants = [(batch, attention) for batch in bench.pick((1, 8), (2,)) for attention in ATTENTION]
    return {
        f"{name}, batch {batch}, {attention}": partial(_measure, bench, name, batch, attention)
        for name in names
        for batch, attention in variants
    }


def _model(bench: Bench, name: str) -> Any:
    if name not in HELD:
        HELD.clear()
        HELD[name] = midsize("llava", **TINY) if bench.dry else released.build(name, device="cuda")
    return HELD[name]


def _measure(bench: Bench, name: str, batch: int, attention: str) -> Iterator[dict[str, Any]]:
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise Skip(
            "flash_attn is not installed (the attention of torch uses its own flash kernel where no mask is needed)"
        )
    model = _model(bench, name)
    found = released.measure(
        name, bench.pick(PLANS, PLANS[:1]), batch=batch, attention=attention, model=model, device=bench.device.type,
        repeats=bench.pick(3, 1), warmup=bench.pick(1, 0), new_tokens=bench.pick(12, 2),
    )  # fmt: skip
    about = {key: value for key, value in found.about.items() if key != "machine"}  # of the whole record
    for row in found.to_dict().pop("rows"):
        yield {**about, "attention_of_run": attention, **row}
