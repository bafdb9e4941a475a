# SPDX-License-Identifier: Apache-2.0
"""Step `device`: the ceilings of every share that is reported later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from ..kernel_bench.operations import DTYPES
from ..kernel_bench.worker import Bench as Meter
from .bench import Bench, Item


def device(bench: Bench) -> dict[str, Item]:
    return {"properties": lambda: _properties(bench), "rates": lambda: _rates(bench)}


def _properties(bench: Bench) -> Iterator[dict[str, Any]]:
    if bench.dry:
        yield {"name": "cpu", "capability": None, "multiprocessors": None, "l2_bytes": None, "memory_bytes": None}
        return
    found = torch.cuda.get_device_properties(bench.device)
    yield {
        "name": found.name, "capability": [found.major, found.minor], "multiprocessors": found.multi_processor_count,
        "l2_bytes": getattr(found, "L2_cache_size", None), "memory_bytes": found.total_memory,
    }  # fmt: skip


def rates(bench: Bench) -> dict[str, Any]:
    """Bytes per second of a copy (read and written), and FLOPs per second of a matmul by type, of random numbers."""
    return Meter().rates(bench.pick(list(DTYPES), ["float32"]), bench.device.type)


def _rates(bench: Bench) -> Iterator[dict[str, Any]]:
    found = rates(bench)
    yield {"copy_bytes_per_s": found["copy"], "matmul_flops_per_s": found["matmul"]}
