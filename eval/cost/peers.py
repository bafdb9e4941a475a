# SPDX-License-Identifier: Apache-2.0
"""Our selections against plain PyTorch ones in the same run: `mmcompress bench peers`.

Every method that calls a kernel runs once as it is and once with the naive twins of all kernels: the steps of the paper, written
down without regard to time. Two algorithms also run against the loops that official code has (`plain`).
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

import mmcompress as mm

from ...kernels.coverage import max_coverage
from ...ops.density import density_peaks
from ...stage import InputStage, LayerStage
from ..kernel_bench.worker import memory_limit, reason
from . import plain
from .selection import WRITTEN, Sizes, anyres, random_visuals, whole

USUAL = ((64, 64), (576, 1024), (2880, 1024))
FULL = ((64, 64), (576, 1024), (576, 4096), (2880, 1024), (2880, 4096), (8192, 1024), (32768, 1024))
"""Numbers of tokens and their widths."""
LEVEL = 0.95
"""Part of the peer's speed from which on we count as level."""
FEWEST = 3
WARM = 0.05
"""Seconds of a run from which on they say something about larger sizes."""


@dataclass(frozen=True)
class Race:
    """What is measured. keep: part of the tokens that stay; repeats, seconds: rounds of a case and when no more are begun (after
    three); patience: seconds that a run may take by its time at the size before."""

    sizes: Sequence[tuple[int, int]] = USUAL
    keep: float = 0.1
    repeats: int = 12
    seconds: float = 0.5
    patience: float = 2.0

    @staticmethod
    def usual(full: bool, repeats: int, patience: float | None) -> Race:
        """A few minutes; `full`: every size up to 32,768 tokens, about an hour on two cores."""
        most = patience if patience is not None else 60.0 if full else 2.0
        return Race(FULL if full else USUAL, repeats=repeats, seconds=5.0 if full else 0.5, patience=most)


@dataclass
class Row:
    """One selection and one peer at a size. cpu: median milliseconds of the process, all threads together; wall: by the clock;
    None where it did not run, then `note` says why. ratio: peer over ours, in CPU time with one thread, by the clock with more."""

    name: str
    peer: str
    n: int
    d: int
    k: int
    threads: int
    rounds: int = 0
    cpu: float | None = None
    wall: float | None = None
    peer_cpu: float | None = None
    peer_wall: float | None = None
    ratio: float | None = None
    note: str | None = None

    HEADINGS: ClassVar = ("selection", "against", "N", "D", "k", "threads", "ours ms", "peer ms", "times as fast")

    def cells(self) -> list[str]:
        """A line of a table with HEADINGS."""
        one = self.threads == 1
        times = (self.cpu, self.peer_cpu, self.ratio) if one else (self.wall, self.peer_wall, self.ratio)
        shown = ["-" if x is None else f"{x:.3g}" for x in times]
        return [self.name, self.peer, *map(str, (self.n, self.d, self.k, self.threads)), *shown]


Pair = tuple[str, str, Callable[[], Any], Callable[[], Any]]
"""Name, peer, and both calls."""


def names() -> list[str]:
    """Every registered method, and the algorithms that have a plain peer."""
    return [*(name for name, cls in mm.methods().items() if cls.kind != "recipe"), *ALGORITHMS]


@torch.no_grad()
def race(race: Race, chosen: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows, method by method, N rising; those without any kernel are left out. One that cannot run at a size says why."""
    more = torch.get_num_threads()
    for name in chosen or names():
        before: dict[tuple[str, int], tuple[int, int, float]] = {}
        for n, d in race.sizes:
            k = max(1, round(race.keep * n))
            try:
                pairs = list(_pairs(name, n, d, k))
            except (ValueError, NotImplementedError, RuntimeError, MemoryError) as error:
                yield Row(name, "-", n, d, k, 1, note=reason(error))
                continue
            for label, peer, ours, theirs in pairs:
                for threads in sorted({1, more}):
                    yield _row(Row(label, peer, n, d, k, threads), ours, theirs, race, before)


def _row(row: Row, ours: Callable[[], Any], theirs: Callable[[], Any], race: Race, before: dict[Any, Any]) -> Row:
    last = before.get((row.name, row.threads))
    if last is not None and last[2] > WARM:
        old_n, old_d, seconds = last
        expected = seconds * (row.n / old_n) ** 2 * max(1, row.d / old_d)
        if expected > race.patience:
            row.note = f"not tried: {row.peer} would take about {expected:.0f} s a run, by its time with N = {old_n}"
            return row
    try:
        with threads_set(row.threads), memory_limit(torch.device("cpu")):
            ours()
            theirs()
            seconds = clock(theirs)[0] / 1000
            before[row.name, row.threads] = row.n, row.d, seconds
            row.rounds = max(FEWEST, min(race.repeats, int(race.seconds / max(1e-6, seconds))))
            times = [(clock(ours), clock(theirs)) for _ in range(row.rounds)]
    except (RuntimeError, MemoryError) as error:
        row.note = reason(error)
        return row
    row.cpu, row.wall = _medians([mine for mine, _ in times])
    row.peer_cpu, row.peer_wall = _medians([other for _, other in times])
    row.ratio = row.peer_cpu / row.cpu if row.threads == 1 else row.peer_wall / row.wall
    return row


def clock(run: Callable[[], Any]) -> tuple[float, float]:
    """Milliseconds of the process (all its threads) and by the clock."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    return 1000 * (time.process_time() - cpu), 1000 * (time.perf_counter() - wall)


def _medians(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return statistics.median(cpu for cpu, _ in times), statistics.median(wall for _, wall in times)


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    """Within the block torch computes with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def grid(n: int) -> mm.Layout:
    """A layout of n tokens: a thumbnail and tiles for 2,880, else one picture as near to a square as can be."""
    if n == 2880:
        return anyres()
    height = max(side for side in range(1, math.isqrt(n) + 1) if n % side == 0)
    return mm.Layout((mm.View((height, n // height)),))


def _pairs(name: str, n: int, d: int, k: int) -> Iterator[Pair]:
    """What a name stands for at a size: stages that select tokens before or in the LLM, or an algorithm."""
    if name in ALGORITHMS:
        yield ALGORITHMS[name](n, d, k)
        return
    sizes = Sizes(features=d, encoder=min(d, 1024), heads=8)
    for stage in mm.as_pipeline(WRITTEN.get(name, name)).parts:
        if isinstance(stage, InputStage | LayerStage):
            visuals = random_visuals(stage, k, grid(n), sizes)
            if whole(stage, visuals):
                naive = partial(whole, stage, visuals, "naive")
                yield stage.name, "naive twin", partial(whole, stage, visuals), naive


def _tokens(n: int, d: int) -> Tensor:
    """[1, n, d]: clusters of about 16."""
    generator = torch.Generator().manual_seed(5)
    centres = torch.randn(-(-n // 16), d, generator=generator)
    near = centres[torch.randint(len(centres), (n,), generator=generator)]
    return (near + 0.5 * torch.randn(n, d, generator=generator))[None]


def _dpc_knn(n: int, d: int, k: int) -> Pair:
    x = _tokens(n, d)
    return "dpc_knn", "cdist", lambda: density_peaks(x, k), lambda: plain.density_peaks(x, k)


def _coverage(n: int, d: int, k: int) -> Pair:
    unit = torch.nn.functional.normalize(_tokens(n, d), dim=-1)
    table = (unit @ unit.transpose(1, 2) / 0.2).softmax(-1) / n
    return "max_coverage", "dense table", lambda: max_coverage(table, k), lambda: plain.max_coverage(table, k)


ALGORITHMS = {"dpc_knn": _dpc_knn, "max_coverage": _coverage}
"""What has a plain peer beside the naive twin."""
