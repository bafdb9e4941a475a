# SPDX-License-Identifier: Apache-2.0
"""The process in which `mmcompress bench kernels` runs a kernel: a clock and a memory meter behind lines of JSON.

Each in a process of its own, torch.compile, another commit and an operation that runs out of memory cannot disturb the others.
It knows only `mmcompress.kernels`, of whatever folder, and this package, no transformers.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves

from .operations import DTYPES, OPERATIONS, Call, Draw, Size, caller

START = """
import importlib.util, sys, types
root = sys.modules["mmcompress"] = types.ModuleType("mmcompress")
root.__path__ = []
for name, folder in (("mmcompress.kernels", sys.argv[1]), ("mmcompress.eval", sys.argv[2])):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py", submodule_search_locations=[folder])
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
from mmcompress.eval.kernel_bench.worker import main
main()
"""
"""What runs in the process: `python -c START KERNELS EVAL`."""


class Bench:
    """One case after the other, and for each of them one run after the other."""

    def case(self, op: str, n: int, d: int, k: int, dtype: str, device: str) -> None:
        """What the next runs are of; the inputs of the last case are forgotten."""
        self.op, self.size, self.device = op, Size(n, d, k, dtype), torch.device(device)
        self.call: Call | None = None
        gc.collect()

    def run(self, provider: str, warmup: bool = False) -> float:
        """Milliseconds of a run; with `warmup` of the second one, if the first was short or had something to compile."""
        with self._ready(provider) as run:
            found = milliseconds(run, self.device)
            if warmup and (found < 1000 or provider in ("compile", "triton")):
                found = milliseconds(run, self.device)
        return found

    def memory(self, provider: str) -> int:
        """Bytes beyond inputs and outputs at the peak of a run."""
        with self._ready(provider) as run:
            return extra_bytes(run, self.device)

    @contextlib.contextmanager
    def _ready(self, provider: str) -> Iterator[Callable[[], Any]]:
        with memory_limit(self.device), torch.no_grad():
            if self.call is None:
                self.call = OPERATIONS[self.op].inputs(Draw(self.size, str(self.device)))
            yield caller(self.op, provider, self.call)

    def rates(self, dtypes: list[str], device: str) -> dict[str, Any]:
        """Bytes per second of a copy (read and written) and FLOPs per second of a matmul by type. A type's rate is at least
        that of float32, since its numbers can be converted."""
        where = torch.device(device)
        x = torch.rand((2**28 if where.type == "cpu" else 2**30) // 4, device=where)
        y = torch.empty_like(x)
        copy = 2 * x.nbytes / _fastest(lambda: y.copy_(x), where)
        found = {dtype: _matmul_rate(DTYPES[dtype], where) for dtype in ("float32", *dtypes)}
        return {"copy": copy, "matmul": {dtype: max(found[dtype], found["float32"]) for dtype in dtypes}}


def _matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second, of matrices that grow until one product takes a while."""
    rate, side, seconds = 0.0, 256, 0.0
    while side <= 8192 and seconds < 0.02:
        a = torch.randn(side, side, device=device).to(dtype)  # of equal numbers it may be faster
        seconds = _fastest(lambda a=a: a @ a, device)
        rate, side = max(rate, 2 * side**3 / seconds), 2 * side
    return rate


def _fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of ten runs, fewer if they take longer than a second: what the device can do."""
    times: list[float] = []
    while len(times) < 10 and sum(times) < 1000:
        times.append(milliseconds(run, device))
    return min(times) / 1000


def milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start)


def extra_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes beyond its inputs and outputs that `run` holds at its peak. CUDA: by the allocator's statistics, outputs taken as
    there at the peak. CPU: by the allocator's records in the profiler, that is everything that torch allocates, in custom
    operations and compiled code too, but not the buffers of a BLAS. Of an output that is a part of something larger only the part
    counts as output."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        found = run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
        return max(0, peak - sum(_outputs(found).values()))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        found = run()
    records = sorted(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))  # type: ignore[union-attr]
    visible = _outputs(found)
    last = {pointer: i for i, (_, pointer, size) in enumerate(records) if size > 0}
    live, total, peak = {}, 0, 0
    for i, (_, pointer, size) in enumerate(records):
        if size > 0:
            live[pointer] = size - (visible.get(pointer, 0) if last[pointer] == i else 0)
            total += live[pointer]
            peak = max(peak, total)
        else:
            total -= live.pop(pointer, 0)  # what was there before does not count
    return peak


def _outputs(found: Any) -> dict[int, int]:
    """Bytes of the tensors in `found` by the address of their storage."""
    outputs: dict[int, int] = {}
    for x in tree_leaves(found):
        if isinstance(x, Tensor):
            pointer = x.untyped_storage().data_ptr()
            outputs[pointer] = min(outputs.get(pointer, 0) + x.nbytes, x.untyped_storage().nbytes())
    return outputs


def _allocations(events: Any) -> Iterator[tuple[int, int, int]]:
    """(time, address, bytes) of what was allocated (bytes above 0) and freed (below)."""
    todo = list(events)
    while todo:
        event = todo.pop()
        todo += event.children
        kind, fields = event.typed
        if kind == torch._C._profiler._EventType.Allocation and fields.device.type == "cpu":
            yield event.start_time_ns, fields.ptr, fields.alloc_size


@contextlib.contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """Half of the free memory may be taken: a table that does not fit raises instead of ending other processes. Linux, CPU."""
    info = Path("/proc/meminfo")
    if device.type != "cpu" or not info.exists():
        yield
        return
    import resource

    free = (
        next(int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("MemAvailable")) * 1024
    )
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + free // 2, hard))
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise MemoryError(f"needs more than half of the free memory ({free / 2**30:.1f} GiB)") from None
        raise
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def reason(error: BaseException) -> str:
    """One line of an error."""
    if isinstance(error, torch.OutOfMemoryError):
        return "the device has too little memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return text if isinstance(error, MemoryError) else f"{type(error).__name__}: {text}"[:300]


def main() -> None:
    """A request per line, {"do": method, ...}; an answer per line, {"answer": ...} or {"error": ...}."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints must not stand between the answers
    bench = Bench()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"answer": getattr(bench, request.pop("do"))(**request)}
        except Exception as error:
            answer = {"error": reason(error)}
        print(json.dumps(answer), file=replies, flush=True)
