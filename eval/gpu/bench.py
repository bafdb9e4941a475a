# SPDX-License-Identifier: Apache-2.0
"""What a step has at hand: the device, sizes for it or for a dry run, clocks, and CUDA graphs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..kernel_bench.operations import OPERATIONS
from ..kernel_bench.worker import milliseconds

Item = Callable[[], Iterator[dict[str, Any]]]
"""One piece of a step: yields its rows. Raises Skip where something that it needs is not there."""
T = TypeVar("T")


class Skip(Exception):
    """Why an item is not done here."""


@dataclass(frozen=True)
class Bench:
    """dry: on the CPU, with tiny shapes. folder: where files of the run go. until: when the step has to be done (monotonic)."""

    dry: bool
    folder: Path
    until: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def pick(self, real: T, dry: T) -> T:
        """A size for the device, or for a dry run."""
        return dry if self.dry else real

    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()

    def width(self, op: str, d: int) -> int:
        """Of an operation's tokens: its own, or `d`. The interpreter takes a minute for the 64 maps of a rank filter."""
        own = OPERATIONS[op].d
        return d if own is None else self.pick(own, 2)

    # ------------------------------------------------------------------ clocks
    def wall(self, run: Callable[[], Any], repeats: int, seconds: float = 2.0) -> float:
        """Median milliseconds of `run` with the device waited for on both sides, after one that does not count; fewer than
        `repeats` if they take longer than `seconds`."""
        times: list[float] = []
        first = milliseconds(run, self.device)
        if self.dry:
            return first
        while len(times) < repeats and sum(times) < 1000 * seconds:
            if first > 1000 * seconds:
                return first
            times.append(milliseconds(run, self.device))
        return statistics.median(times)

    def replayed(self, run: Callable[[], Any], rounds: int = 7, target: float = 2.0) -> float:
        """Milliseconds of `run` on the device alone, without what launching costs: its CUDA graph, replayed back to back for
        about `target` milliseconds, median of `rounds`. Inputs that fit in the cache lie there. Dry: as `wall`."""
        if self.dry:
            return self.wall(run, 1)
        graph, _ = captured(run)
        graph.replay()
        one = _events(graph, 1)
        count = max(1, min(1000, int(target / max(one, 1e-3))))
        return statistics.median(_events(graph, count) for _ in range(rounds))


def _events(graph: torch.cuda.CUDAGraph, count: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / count


def captured(run: Callable[[], Any], warm: Callable[[], Any] | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The CUDA graph of `run` and what its replays write into. `warm` (by default `run`) runs twice before, on the stream of the
    capture: by then all kernels are compiled, and libraries have their handles and work space there."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            (warm or run)()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph, stream=stream):
        found = run()
    return graph, found


# ---------------------------------------------------------------------- results
def tensors(found: Any) -> list[Tensor]:
    return [x for x in tree_leaves(found) if isinstance(x, Tensor)]


def same_bits(a: Any, b: Any) -> bool:
    """Whether two results are equal, NaN to NaN."""
    pairs = list(zip(tensors(a), tensors(b), strict=True))
    return all(x.shape == y.shape and torch.equal(_bytes(x), _bytes(y)) for x, y in pairs)


def _bytes(x: Tensor) -> Tensor:
    return x.detach().contiguous().flatten().view(torch.uint8)


def copied(found: Any) -> list[Tensor]:
    """The tensors of a result by themselves: what wrote them may write there again."""
    return [x.detach().clone() for x in tensors(found)]


@contextmanager
def sync_mode(mode: str, device: torch.device) -> Iterator[None]:
    """Within the block torch warns of operations that wait for the device, or raises."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values) if min(values, default=0.0) > 0 else float("inf")
