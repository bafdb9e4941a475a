# SPDX-License-Identifier: Apache-2.0
"""Step `kernels`: every kernel by the clock and on the device alone, beside naive and blocked torch, and what the device would
allow: the larger of its FLOPs over the matmul rate of its type and its bytes over the copy bandwidth."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ..kernel_bench.operations import OPERATIONS, Draw, Size, caller
from ..kernel_bench.worker import extra_bytes, reason
from .bench import Bench, Item
from .device import rates

SHAPES = ((2880, 1024), (576, 1024), (8192, 1024), (2880, 4096), (32768, 1024))
K = 288
MEASURED: dict[bool, dict[str, Any]] = {}


def kernels(bench: Bench) -> dict[str, Item]:
    shapes, dtypes = bench.pick(SHAPES, ((24, 16),)), bench.pick(("float32", "bfloat16"), ("float32",))
    found: dict[str, Item] = {}
    for n, d in shapes:  # the most wanted first: there may be no time for all
        for op, known in OPERATIONS.items():
            if known.d is not None and (n, d) != (n, next(wide for rows, wide in shapes if rows == n)):
                continue  # its width is its own: once per n
            for dtype in dtypes:
                size = Size(n, bench.width(op, d), bench.pick(K, 5) if known.k is None else known.k, dtype)
                found[f"{op} {size.n} x {size.d} {dtype}"] = partial(_case, bench, op, size)
    return found


def _case(bench: Bench, op: str, size: Size) -> Iterator[dict[str, Any]]:
    if bench.dry not in MEASURED:
        MEASURED[bench.dry] = rates(bench)
    ceilings, known = MEASURED[bench.dry], OPERATIONS[op]
    call = known.inputs(Draw(size, bench.device.type))
    flops, bytes_ = known.flops(size), known.bytes(size)
    bound = 1000 * max(flops / ceilings["matmul"][size.dtype], bytes_ / ceilings["copy"])
    row: dict[str, Any] = {
        "op": op, "n": size.n, "d": size.d, "k": size.k, "dtype": size.dtype, "flops": flops, "bytes": bytes_, "bound_ms": bound,
        "copy_bytes_per_s": ceilings["copy"], "matmul_flops_per_s": ceilings["matmul"][size.dtype],
    }  # fmt: skip
    run = caller(op, "triton", call)
    row["ms"] = bench.wall(run, bench.pick(9, 1), 0.5)
    row["device_ms"] = bench.replayed(run)
    row["share"] = bound / row["device_ms"]
    row["gb_per_s"], row["tflop_per_s"] = bytes_ / row["device_ms"] / 1e6, flops / row["device_ms"] / 1e9
    row["extra_bytes"] = extra_bytes(run, bench.device)
    for other in ("naive", "blocked"):
        run = caller(op, other, call)
        try:
            row[f"{other}_ms"] = bench.wall(run, bench.pick(5, 1), 0.3)
            row[f"{other}_extra_bytes"] = extra_bytes(run, bench.device)
        except RuntimeError as error:  # a table of all pairs that does not fit, most likely
            row |= {f"{other}_ms": None, f"{other}_extra_bytes": None, f"{other}_note": reason(error)}
    yield row
