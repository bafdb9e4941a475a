# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the Triton kernels, per operation and GPU family."""

from __future__ import annotations

import functools

import torch

FAMILIES = {7: "turing", 8: "ampere", 9: "hopper", 10: "blackwell", 12: "blackwell"}
"""Names of NVIDIA compute capabilities (8.9, Ada, counts as Ampere)."""

CONFIGS: dict[str, dict[str, dict[str, int]]] = {
    "attention": {"default": {"rows": 64, "columns": 64, "num_warps": 4, "num_stages": 2}},
    "compact": {"default": {"width": 1024, "num_warps": 4}},
    "components": {"default": {"rows": 64, "columns": 64, "width": 64, "num_warps": 8, "num_stages": 2}},
    "components_float32": {"default": {"rows": 32, "columns": 64, "width": 32, "num_warps": 8, "num_stages": 2}},
    "coverage": {"default": {"side": 64, "depth": 32, "num_warps": 4, "num_stages": 2, "tokens": 16, "pick_warps": 8}},
    "diverse": {
        "default": {
            "side": 64,
            "depth": 32,
            "num_warps": 4,
            "num_stages": 2,
            "pick_warps": 8,
            "tokens": 32,
            "held_tokens": 64,
            "reach": 128,
        },
    },
    "density": {"default": {"rows": 32, "columns": 64, "num_warps": 4}},
    "match": {"default": {"rows": 64, "columns": 64, "width": 64, "num_warps": 4, "num_stages": 2}},
    "match_float32": {"default": {"rows": 64, "columns": 64, "width": 32, "num_warps": 8, "num_stages": 2}},
    "merge": {"default": {"rows": 8, "width": 256, "num_warps": 4}},
    "rank_filter": {"default": {"cells": 64, "num_warps": 4}},
}
"""By operation and family; "default" is small enough for every GPU. The others were measured by `make gpu`, which writes them
here; none is measured at run time."""


@functools.cache
def family(device: torch.device) -> str:
    """Family of a device, "default" if it is no NVIDIA GPU or a newer one than this table."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "default"
    return FAMILIES.get(torch.cuda.get_device_capability(device)[0], "default")


def config(op: str, device: torch.device) -> dict[str, int]:
    """Block sizes and launch options of the operation `op` on `device`."""
    table = CONFIGS[op]
    return table.get(family(device), table["default"])
