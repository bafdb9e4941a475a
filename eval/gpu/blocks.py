# SPDX-License-Identifier: Apache-2.0
"""Step `blocks`: block sizes of every kernel for the GPU at hand, written into `kernels/configs.py` for the steps behind this one.

Most of the time is compilation: other processes compile the candidates of a round, by running them, into Triton's cache on disk;
this one alone keeps the clock.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as Late  # of its own in Python 3.10
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...kernels import configs
from ..kernel_bench.tune import Case, Clock, Config, Descent, attempt, cases_of, written
from ..kernel_bench.worker import reason
from .bench import Bench, Item

SHAPES = ((576, 1024), (2880, 1024), (2880, 4096), (8192, 1024))
ROUNDS = 4
Tried = dict[str, "Future[str | None] | None"]


def blocks(bench: Bench) -> dict[str, Item]:
    found = _Found(bench)
    return {f"round {number + 1}": partial(found.round, number) for number in range(bench.pick(ROUNDS, 1))}


def _attempt(table: str, config: Config, cases: Sequence[Case], device: str) -> str | None:
    return attempt(table, config, cases, torch.device(device))


class _Found:
    """What is known after each round. A process that goes on where another was lost begins from what is in the source."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.family = configs.family(bench.device)
        tables = bench.pick(list(configs.CONFIGS), ["match_float32", "merge", "diverse"])
        dtypes = bench.pick(("float32", "bfloat16"), ("float32",))
        shapes, k = bench.pick(SHAPES, ((24, 16),)), bench.pick(288, 5)
        self.cases = {table: cases_of(table, shapes, dtypes, k) for table in tables}
        self.clocks: dict[str, Clock] = {}
        self.ways: dict[str, Descent] = {}
        self.pool: ProcessPoolExecutor | None = None

    def round(self, number: int) -> Iterator[dict[str, Any]]:
        """A row per table: the best sizes so far, and their part of the time that those in use took."""
        for table in self.cases:
            self.ways.setdefault(table, Descent.begin(dict(configs.config(table, self.bench.device))))
        wanted = {table: way.candidates() for table, way in self.ways.items()}
        if self.bench.dry:
            wanted = {table: some[:2] for table, some in wanted.items()}
        compiled = {table: self._compile(table, some) for table, some in wanted.items()}
        errors: list[str] = []
        try:
            for table, some in wanted.items():
                if not some or self.bench.left() <= 0:
                    continue
                try:
                    yield self._table(table, list(zip(some, compiled[table], strict=True)), number)
                except Exception as error:  # the sizes in use do not run, say
                    errors.append(f"{table}: {reason(error)}")
            if errors:
                raise RuntimeError("; ".join(errors))
        finally:
            self._write()
            if number + 1 == self.bench.pick(ROUNDS, 1) or self.bench.left() <= 0:
                self._close()

    def _compile(self, table: str, some: Sequence[Config]) -> list[Future[str | None] | None]:
        if self.bench.dry:
            return [None] * len(some)
        if self.pool is None:
            count = max(1, min(12, (os.cpu_count() or 2) - 3))
            self.pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))
        return [self.pool.submit(_attempt, table, config, self.cases[table], "cuda") for config in some]

    def _table(
        self, table: str, some: Sequence[tuple[Config, Future[str | None] | None]], number: int
    ) -> dict[str, Any]:
        way = self.ways[table]
        if table not in self.clocks:
            self.clocks[table] = Clock(table, self.cases[table], self.bench.device, self._time)
        clock, late = self.clocks[table], 0
        for config, compiled in some:
            if self.bench.left() <= 0:
                late += 1
                continue
            if compiled is not None:
                try:
                    why = compiled.result(max(0.1, self.bench.left()))
                except Late:
                    late += 1
                    continue
                if why:
                    clock.why[tuple(config.values())] = why
                    way.tell(config, float("inf"))
                    continue
            way.tell(config, clock(config))
        way.move()
        out = {" ".join(map(str, key)): why for key, why in clock.why.items()}
        return {
            "round": number + 1, "table": table, "family": self.family, "before": clock.start, "best": way.best,
            "part_of_time": way.score, "tried": len(way.known) - 1, "late": late, "out": out, "ms_before": clock.first,
            "cases": [f"{case.op} {case.size.n} x {case.size.d} {case.size.dtype}" for case in clock.cases],
        }  # fmt: skip

    def _time(self, run: Any) -> float:
        return self.bench.replayed(run, rounds=3, target=0.5)

    def _write(self) -> None:
        """The new source: beside the record, and, of a real run, in its place."""
        source = Path(str(configs.__file__))
        best = {table: self.ways[table].best for table in self.clocks}
        text = written(source.read_text(), "dry" if self.bench.dry else self.family, best)
        (self.bench.folder / "configs.py").write_text(text)
        if not self.bench.dry and self.family != "default":
            source.write_text(text)
            configs.CONFIGS.update({t: {**configs.CONFIGS[t], self.family: config} for t, config in best.items()})

    def _close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():  # what is still compiled would disturb the next step
                child.kill()
            self.pool = None
