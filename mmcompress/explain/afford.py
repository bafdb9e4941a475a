# SPDX-License-Identifier: Apache-2.0
"""Whether explanations by gradients can be afforded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

CPU_PARAMETERS = 1e9
"""More than these on the CPU take too long: every token of the answer takes a backward pass."""


def unaffordable(model: Any, tokens: int) -> str:
    """Why gradients of an answer behind `tokens` tokens are too much for a model where it is; "" if they are not.

    They are if weights are offloaded, if the model is on the CPU and has more than 10^9 parameters, or if activations take more
    than half of the memory that is free.
    """
    parameters = list(model.parameters())
    if any(p.is_meta for p in parameters):
        return "weights that are offloaded would be moved again for every token of the answer"
    size, device = sum(p.numel() for p in parameters), parameters[0].device
    if device.type == "cpu" and size > CPU_PARAMETERS:
        return (
            f"{size / 1e9:.1f} billion parameters on the CPU would take a backward pass for every token of the answer"
        )
    need, free = activation_bytes(model, tokens), free_bytes(device)
    if free is not None and need > free / 2:
        return f"activations of {tokens:,} tokens take about {_gib(need)}, and {_gib(free)} are free"
    return ""


def activation_bytes(model: Any, tokens: int) -> int:
    """About what a forward pass of the language model keeps for the backward pass: 16 rows of the hidden size and 5 of the
    intermediate one per token and layer, with eager attention three maps."""
    config = model.config.get_text_config()
    layers, hidden = config.num_hidden_layers, config.hidden_size
    values = tokens * (16 * hidden + 5 * getattr(config, "intermediate_size", 4 * hidden))
    if getattr(config, "_attn_implementation", "") == "eager":
        values += 3 * config.num_attention_heads * tokens * tokens
    return int(layers * values * next(model.parameters()).dtype.itemsize)


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; None where that cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    known = Path("/proc/meminfo")
    if device.type != "cpu" or not known.exists():
        return None
    lines = dict(line.split(":", 1) for line in known.read_text().splitlines() if ":" in line)
    return 1024 * int(lines["MemAvailable"].split()[0]) if "MemAvailable" in lines else None


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
