# SPDX-License-Identifier: Apache-2.0
"""Block sizes of the Triton kernels that are fastest on the GPU at hand.

`python -m mmcompress.eval.gpu --only blocks` finds them and writes them into `kernels/configs.py`. A table of `CONFIGS` may serve
several operations and types; what counts is the geometric mean over all of them of the time over that of the sizes in use. What
does not run, or gives other results, is out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ...kernels import configs
from .operations import OPERATIONS, Draw, Size, caller

GAIN = 0.97
"""Other values have to take less than this part of the time."""
WRONG = 0.02
"""Part of whole numbers (indices, picks) that may differ: sums in another order round otherwise."""
K = 288

Config = dict[str, int]


@dataclass(frozen=True)
class Case:
    """An operation at a size."""

    op: str
    size: Size


def table_of(op: str, dtype: str) -> str:
    """The entry of `CONFIGS` that an operation reads."""
    package = OPERATIONS[op].package
    return f"{package}_float32" if dtype == "float32" and f"{package}_float32" in configs.CONFIGS else package


def cases_of(table: str, shapes: Sequence[tuple[int, int]], dtypes: Sequence[str], k: int = K) -> list[Case]:
    """What is timed for an entry of `CONFIGS`: every operation that reads it, for (N, D) of `shapes`."""
    found = []
    for op, known in OPERATIONS.items():
        for dtype in (d for d in dtypes if table_of(op, d) == table):
            sizes = {Size(n, known.d or d, k if known.k is None else known.k, dtype) for n, d in shapes}
            found += [Case(op, size) for size in sorted(sizes, key=lambda size: (size.n, size.d))]
    return found


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations with one value doubled or halved (stages: one more or less)."""
    for key, value in config.items():
        for other in (value + 1, value - 1) if key == "num_stages" else (2 * value, value // 2):
            if other >= 1:
                yield config | {key: other}


@contextmanager
def using(name: str, family: str, config: Config) -> Iterator[None]:
    """Within the block the operations that read the entry run with these block sizes."""
    before = configs.CONFIGS[name]
    configs.CONFIGS[name] = before | {family: config}
    try:
        yield
    finally:
        configs.CONFIGS[name] = before


@functools.lru_cache(maxsize=128)
def _prepared(case: Case, device: str) -> Callable[[], Any]:
    return caller(case.op, "triton", OPERATIONS[case.op].inputs(Draw(case.size, device)))


def attempt(table: str, config: Config, cases: Sequence[Case], device: torch.device) -> str | None:
    """Run all cases once with these sizes, which compiles them; why not, if that is so."""
    with using(table, configs.family(device), config):
        try:
            for case in cases:
                _prepared(case, str(device))()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as error:  # too large for this GPU, or too small to multiply: Triton has many names for that
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]
    return None


class Clock:
    """Times configurations of a table, by `time` (milliseconds of a run), against those in use at first."""

    def __init__(
        self, table: str, cases: Sequence[Case], device: torch.device, time: Callable[[Callable[[], Any]], float]
    ) -> None:
        self.table, self.cases, self.device, self.time = table, cases, device, time
        self.start = dict(configs.config(table, device))
        self.expected = [_copies(_prepared(case, str(device))()) for case in cases]
        self.first = [time(_prepared(case, str(device))) for case in cases]
        self.why: dict[tuple[int, ...], str] = {}

    def __call__(self, config: Config) -> float:
        """Geometric mean of the time over that at first; inf for what does not run or gives other results."""
        if why := attempt(self.table, config, self.cases, self.device):
            self.why[tuple(config.values())] = why
            return math.inf
        logs = []
        with using(self.table, configs.family(self.device), config):
            for case, expected, first in zip(self.cases, self.expected, self.first, strict=True):
                run = _prepared(case, str(self.device))
                if not alike(_copies(run()), expected, case.size.n):
                    self.why[tuple(config.values())] = f"other results in {case.op}, {case.size}"
                    return math.inf
                logs.append(math.log(self.time(run) / first))
        return math.exp(sum(logs) / len(logs))


def _copies(found: Any) -> list[Tensor]:
    return [x.clone() for x in tree_leaves(found) if isinstance(x, Tensor)]


def alike(found: Sequence[Tensor], expected: Sequence[Tensor], n: int) -> bool:
    """Whether results are the same but for rounding. Of fewer than `n` picks, their order may differ from one rounded tie on."""
    for a, b in zip(found, expected, strict=True):
        if a.is_floating_point():
            scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
            same = torch.isclose(a.float(), b.float(), rtol=1e-2, atol=1e-3 * scale, equal_nan=True)
        else:
            same = a == b
            if a.dtype != torch.bool and a.numel() < n:
                same = same if float((~same).float().mean()) <= WRONG else torch.isin(a, b)
                if float((~same).float().mean()) <= 5 * WRONG:
                    continue
        if float((~same).float().mean()) > WRONG:
            return False
    return True


@dataclass
class Descent:
    """The best configuration so far and what it takes of the time of the first; `known`: of all that were tried."""

    best: Config
    score: float
    known: dict[tuple[int, ...], float]

    @staticmethod
    def begin(start: Config) -> Descent:
        return Descent(start, 1.0, {tuple(start.values()): 1.0})

    def candidates(self) -> list[Config]:
        """What is to be tried next: the neighbours of the best, and all changes of one value together that were a gain."""
        wanted = list(neighbours(self.best))
        gains: Config = {}
        for other in neighbours(self.best):
            if self.known.get(tuple(other.values()), math.inf) < GAIN * self.score:
                gains |= {key: value for key, value in other.items() if value != self.best[key]}
        return [c for c in [*wanted, self.best | gains] if tuple(c.values()) not in self.known]

    def tell(self, config: Config, score: float) -> None:
        self.known[tuple(config.values())] = score

    def move(self) -> bool:
        """Go to the fastest that is known, if that is a gain; whether it was."""
        values = min(self.known, key=lambda key: self.known[key])
        if not self.known[values] < GAIN * self.score:
            return False
        self.best, self.score = dict(zip(self.best, values, strict=True)), self.known[values]
        return True


def descend(start: Config, clock: Callable[[Config], float]) -> tuple[Config, float]:
    """From `start` to the fastest neighbour and on from there, until none is a gain: it, and its part of the first time."""
    way = Descent.begin(start)
    while True:
        for config in way.candidates():
            way.tell(config, clock(config))
        for config in way.candidates():  # what were gains by themselves, together
            way.tell(config, clock(config))
        if not way.move():
            return way.best, way.score


# ---------------------------------------------------------------------- the table in the source
OPENING = "CONFIGS: dict[str, dict[str, dict[str, int]]] = {\n"
WIDTH = 120


def rendered(table: dict[str, dict[str, Config]]) -> str:
    """The table as it stands in the source, formatted."""
    lines = [OPENING.rstrip("\n")]
    for name, families in table.items():
        line = f'    "{name}": {_literal(families)},'
        if len(line) <= WIDTH and len(families) == 1:
            lines.append(line)
            continue
        lines.append(f'    "{name}": {{')
        for family, config in families.items():
            line = f'        "{family}": {_literal(config)},'
            if len(line) <= WIDTH:
                lines.append(line)
            else:
                lines += [
                    f'        "{family}": {{',
                    *(f'            "{k}": {v},' for k, v in config.items()),
                    "        },",
                ]
        lines.append("    },")
    return "\n".join([*lines, "}"]) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}": {_literal(inner)}' for key, inner in value.items()) + "}"
    return repr(value)


def written(source: str, family: str, found: dict[str, Config]) -> str:
    """The source of `kernels/configs.py` with what was found for a family of GPUs."""
    before, opening, rest = source.partition(OPENING)
    _, closing, after = rest.partition("\n}\n")
    if not opening or not closing:
        raise ValueError("kernels/configs.py has no table CONFIGS of the expected form")
    table = {
        name: {**families, **({family: found[name]} if name in found else {})}
        for name, families in configs.CONFIGS.items()
    }
    return before + rendered(table) + after
