# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the Triton kernels that are fastest on the GPU at hand.

`python -m mmcompress.eval.kernel_bench.tune [OP ...]` prints the lines for `kernels.configs.CONFIGS`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ...kernels import configs
from .operations import OPERATIONS, Draw, Size, caller
from .worker import milliseconds

GAIN = 0.97
"""Another value has to take less than this part of the time."""
ROUNDS = 20


def table_of(op: str, dtype: str) -> str:
    """The entry of `CONFIGS` that an operation reads."""
    package = OPERATIONS[op].package
    return f"{package}_float32" if dtype == "float32" and f"{package}_float32" in configs.CONFIGS else package


def neighbours(config: dict[str, int]) -> Iterator[dict[str, int]]:
    """Configurations with one value doubled or halved (stages: one more or less)."""
    for key, value in config.items():
        for other in (value + 1, value - 1) if key == "num_stages" else (2 * value, value // 2):
            if other >= 1:
                yield config | {key: other}


@contextmanager
def using(name: str, family: str, config: dict[str, int]) -> Iterator[None]:
    """Within the block the operation runs with these block sizes."""
    before = configs.CONFIGS[name]
    configs.CONFIGS[name] = before | {family: config}
    try:
        yield
    finally:
        configs.CONFIGS[name] = before


def descend(start: dict[str, int], clock: Callable[[dict[str, int]], float]) -> tuple[dict[str, int], float]:
    """From `start` the fastest neighbour, and from there again, until none is faster: it and its time. `clock` gives inf for
    what does not run."""
    times = {tuple(start.items()): clock(start)}
    best, fastest = start, times[tuple(start.items())]
    while True:
        for other in neighbours(best):
            if (key := tuple(other.items())) not in times:
                times[key] = clock(other)
        found = min(neighbours(best), key=lambda x: times[tuple(x.items())])
        if not times[tuple(found.items())] < GAIN * fastest:
            return best, fastest
        best, fastest = found, times[tuple(found.items())]


def tune(op: str, size: Size, device: torch.device) -> tuple[dict[str, int], float, float]:
    """The best configuration of an operation on `device`, its milliseconds, and those of the one in use."""
    name, family = table_of(op, size.dtype), configs.family(device)
    run = caller(op, "triton", OPERATIONS[op].inputs(Draw(size, str(device))))

    def clock(config: dict[str, int]) -> float:
        with using(name, family, config):
            try:
                run()
            except Exception:  # too large for this GPU, or too small to multiply: Triton has many names for that
                return float("inf")
            return min(milliseconds(run, device) for _ in range(ROUNDS))

    start = configs.config(name, device)
    best, fastest = descend(start, clock)
    return best, fastest, clock(start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("op", nargs="*", help=f"operations (default: all): {', '.join(OPERATIONS)}")
    for option, value in (("--n", 2880), ("--d", 1024), ("--k", 288)):
        parser.add_argument(option, type=int, default=value)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    given = parser.parse_args()
    if unknown := [op for op in given.op if op not in OPERATIONS]:
        parser.error(f"no operation {unknown[0]!r}; choose among {', '.join(OPERATIONS)}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here, and times of the interpreter mean nothing")
    device = torch.device("cuda")
    for op in given.op or OPERATIONS:
        d, k = (x if x is not None else y for x, y in ((OPERATIONS[op].d, given.d), (OPERATIONS[op].k, given.k)))
        for dtype in given.dtype:
            best, fastest, before = tune(op, Size(given.n, d, k, dtype), device)
            print(
                f'{table_of(op, dtype)} ({op}, {dtype}): "{configs.family(device)}": {best},  # {before:.3f} -> {fastest:.3f} ms'
            )


if __name__ == "__main__":
    main()
