# SPDX-License-Identifier: Apache-2.0
"""Step `selection`: every method's selection of 288 of 2,880 tokens of 4,096 features, alone, and in eight streams at once."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mmcompress as mm

from ...kernels.dispatch import preferring
from ...plan import methods
from ...stage import InputStage, LayerStage, Selecting
from ..cost.selection import WRITTEN, Sizes, anyres, random_visuals
from .bench import Bench, Item, copied, same_bits

STREAMS = 8
KEEP = 0.1


def cases(bench: Bench) -> list[str]:
    """Methods with a stage that selects."""
    names = [name for name, cls in methods().items() if cls.kind != "recipe"]
    selects = [n for n in names if any(isinstance(p, InputStage | LayerStage) for p in _parts(n))]
    return bench.pick(selects, [name for name in selects if name in ("divprune", "fastv", "visionzip", "prumerge")])


def _parts(name: str) -> Any:
    return mm.as_pipeline(WRITTEN.get(name, name)).parts


def inputs_of(bench: Bench, name: str, dtype: torch.dtype = torch.float32) -> Iterator[tuple[Selecting, mm.Visuals]]:
    """The stages of a method that select, each with what it may read, on the device."""
    layout = anyres(bench.pick(24, 4))
    sizes = bench.pick(Sizes(), Sizes(features=32, encoder=16, keys=8, heads=2, text=4))
    for stage in _parts(name):
        if isinstance(stage, InputStage | LayerStage):
            visuals = random_visuals(stage, round(KEEP * layout.cells), layout, sizes)
            signals = {key: value.to(bench.device) for key, value in visuals.signals.items()}
            features = visuals.features.to(bench.device, dtype)
            yield stage, dataclasses.replace(visuals, features=features, signals=signals)


def select(stage: Selecting, visuals: mm.Visuals) -> Tensor:
    chosen = stage.select(visuals)
    return chosen.rows if chosen.rows is not None else chosen.apply(visuals.features)


def selection(bench: Bench) -> dict[str, Item]:
    return {name: partial(_method, bench, name) for name in cases(bench)}


def _method(bench: Bench, name: str) -> Iterator[dict[str, Any]]:
    for stage, visuals in inputs_of(bench, name):
        run = partial(select, stage, visuals)
        expected = copied(run())
        alone = bench.wall(run, bench.pick(9, 1), 0.5)
        with preferring("naive") as naive:
            twin = bench.wall(run, bench.pick(3, 1), 0.5)
        together, equal = in_streams(bench, run, expected, rounds=bench.pick(4, 1))
        yield {
            "stage": stage.name, "tokens": visuals.n, "features": visuals.features.shape[-1], "kept": visuals.k,
            "ms": alone, "naive_ms": twin if naive.used else None, "streams": STREAMS, "ms_each_in_streams": together,
            "same_bits_in_streams": equal,
        }  # fmt: skip


def in_streams(bench: Bench, run: Any, expected: list[Tensor], rounds: int) -> tuple[float, bool]:
    """Milliseconds per selection where eight threads select at once, each in a stream of its own, and whether all of them
    found what one found alone."""
    found: list[list[Tensor]] = [[] for _ in range(STREAMS)]
    errors: list[BaseException] = []
    barrier = threading.Barrier(STREAMS + 1)

    def work(number: int) -> None:
        try:
            with torch.no_grad(), _stream(bench):
                found[number] = copied(run())  # what belongs to the stream is made before the clock runs
                _wait(bench)
                barrier.wait(60)
                for _ in range(rounds):
                    found[number] = copied(run())
                _wait(bench)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    _wait(bench)  # inputs were made in the default stream
    threads = [threading.Thread(target=work, args=(i,)) for i in range(STREAMS)]
    for thread in threads:
        thread.start()
    with contextlib.suppress(threading.BrokenBarrierError):
        barrier.wait(60)
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    took = 1000 * (time.perf_counter() - start)
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return took / (rounds * STREAMS), all(same_bits(one, expected) for one in found)


def _stream(bench: Bench) -> Any:
    return contextlib.nullcontext() if bench.dry else torch.cuda.stream(torch.cuda.Stream())


def _wait(bench: Bench) -> None:
    if not bench.dry:
        torch.cuda.current_stream().synchronize()
