# SPDX-License-Identifier: Apache-2.0
"""How fast every kernel is, what it holds, and what the device would allow: `mmcompress bench kernels`."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import queue
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from ... import kernels, records
from ..machine import machine, processor
from .operations import DTYPES, OPERATIONS, Size, sizes
from .worker import START

PROVIDERS = ("naive", "compile", "blocked", "triton")
COMPILE_LIMIT = 300.0
"""Seconds that torch.compile may take for one case."""
AS_BEFORE = "not tried, as with N ="
"""So begin the notes of sizes above one that could not be done."""
SLOW = 1000.0
"""Milliseconds from which on the first run counts, too: there is nothing to warm up."""
FEWEST = 3
"""Rounds that are run however long they take."""
KIND = "`mmcompress bench kernels`"
EVAL = Path(__file__).resolve().parent.parent
REPOSITORY = EVAL.parent


@dataclass
class Row:
    """One provider at one size. Where it did not run, `note` says why and the measured fields are empty.

    q20_ms, q50_ms, q80_ms  quantiles of `rounds` synchronised runs, interleaved with those of the other providers.
    peak_bytes              beyond inputs and outputs, see `worker.extra_bytes`.
    flops, bytes            of the operation, not of the provider: see `operations`.
    roofline                max(flops / matmul_flops_per_s, bytes / copy_bytes_per_s) over the median time.
    """

    op: str
    provider: str
    n: int
    d: int
    k: int
    dtype: str
    q20_ms: float | None
    q50_ms: float | None
    q80_ms: float | None
    rounds: int
    peak_bytes: int | None
    flops: float
    bytes: float
    roofline: float | None
    note: str | None
    device: str
    threads: int
    copy_bytes_per_s: float
    matmul_flops_per_s: float
    platform: str
    python: str
    torch: str
    triton: str | None
    mmcompress: str
    commit: str | None

    HEADINGS: ClassVar = ("N", "D", "k", "provider", "0.2", "ms", "0.8", "over naive", "extra MiB", "roofline")

    def key(self) -> tuple[Any, ...]:
        """Rows of equal keys measured the same."""
        return self.device, self.op, self.n, self.d, self.k, self.dtype, self.provider

    def cells(self, naive: Row | None) -> list[str]:
        """A line of a table with these headings; `naive`: the plain one at the same size."""
        start = [str(self.n), str(self.d), str(self.k or "-"), self.provider]
        if self.q20_ms is None or self.q50_ms is None or self.q80_ms is None or self.roofline is None:
            return [*start, *["-"] * (len(self.HEADINGS) - len(start))]
        times = [digits(x) for x in (self.q20_ms, self.q50_ms, self.q80_ms)]
        faster = f"{naive.q50_ms / self.q50_ms:.2f}x" if naive and naive.q50_ms else "-"
        held = "-" if self.peak_bytes is None else f"{self.peak_bytes / 2**20:.2f}"
        return [*start, *times, faster, held, f"{digits(100 * self.roofline)} %"]


def digits(x: float) -> str:
    """Three digits that count."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


@dataclass(frozen=True)
class Sweep:
    """What is measured.

    patience  longest run in seconds. A provider that would need longer, by its time at the size before, is left out; of ours
              the memory is measured up to ten times of that, for the narrowest tokens.
    seconds   after so long a case gets no more rounds than the fewest.
    """

    ops: Sequence[str] = tuple(OPERATIONS)
    n: Sequence[int] = (576, 2880, 8192, 32768)
    d: Sequence[int] = (64, 1024)
    k: Sequence[int] = (288,)
    dtypes: Sequence[str] = ("float32",)
    providers: Sequence[str] = ("naive", "blocked")
    device: str = "cpu"
    repeats: int = 12
    patience: float = 5.0
    seconds: float = 2.0

    def __post_init__(self) -> None:
        known = {"ops": OPERATIONS, "dtypes": DTYPES, "providers": PROVIDERS}
        for name, allowed in known.items():
            given = getattr(self, name)
            if wrong := [value for value in given if value not in allowed]:
                raise ValueError(f"bench kernels: no {name[:-1]} {wrong[0]!r}; choose among {', '.join(allowed)}")
            if len(set(given)) < len(given):
                raise ValueError(f"bench kernels: {', '.join(given)}: give each {name[:-1]} once")
        for name in ("n", "d", "k"):
            if below := [value for value in getattr(self, name) if value < 1]:
                raise ValueError(f"bench kernels: {name}={below[0]}; give numbers from 1")
        if not all((self.ops, self.n, self.d, self.k, self.dtypes, self.providers)):
            raise ValueError(
                "bench kernels: nothing to measure; give at least one of each of op, n, d, k, dtype and provider"
            )
        if self.repeats < 1 or not self.patience > 0:
            raise ValueError(
                f"bench kernels: repeats={self.repeats}, patience={self.patience}; give at least one run and some time for it"
            )
        kind = self.device.partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"bench kernels: device {self.device!r}; choose cpu or cuda")
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError("bench kernels: there is no CUDA device here; choose cpu")
        if kind == "cpu" and "triton" in self.providers:
            raise ValueError(
                "bench kernels: provider triton needs a CUDA device (its interpreter on the CPU is there for tests, its times mean "
                "nothing); leave it out"
            )

    @classmethod
    def usual(cls, device: str, full: bool = False, **given: Any) -> Sweep:
        """What the command measures where it is not told: a few minutes on two cores; `full`: the whole table, hours there.
        Options that are None are left to it."""
        chosen: dict[str, Any] = {}
        if full:
            chosen = {
                "d": (64, 1024, 4096), "k": (64, 288, 640), "dtypes": tuple(DTYPES), "providers": ("naive", "compile", "blocked"),
                "patience": 60.0, "seconds": 10.0,
            }  # fmt: skip
        if device.startswith("cuda"):
            chosen |= {"d": (64, 1024, 4096), "k": chosen.get("k", (288, 640)), "providers": PROVIDERS}
            chosen["dtypes"] = tuple(DTYPES) if full else ("float32", "bfloat16")
        return cls(device=device, **{**chosen, **{key: value for key, value in given.items() if value is not None}})


class Failure(Exception):
    """Why there is no number."""


class Late(Failure):
    """It took too long."""


class Worker:
    """A process that runs kernels of one folder; started when first asked, and again after it ended."""

    def __init__(self, kernels_folder: Path) -> None:
        self.folder = kernels_folder
        self.process: subprocess.Popen[str] | None = None
        self.case: dict[str, Any] | None = None

    def prepare(self, case: dict[str, Any]) -> None:
        """Say what the next runs are of."""
        self.case = case
        if self.process is not None:
            with contextlib.suppress(Failure):  # started again, with this case, when it is asked for a run
                self.ask("case", 60, **case)

    def ask(self, do: str, limit: float, **request: Any) -> Any:
        """The answer to a request. Raises Failure with the reason for an error, the end of the process and `limit` seconds
        without an answer (which end it)."""
        if self.process is None:
            self._start()
            if self.case is not None:
                self._exchange({"do": "case", **self.case}, 120)
        return self._exchange({"do": do, **request}, limit)

    def _start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-c", START, str(self.folder), str(EVAL)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=environment | {"TORCHINDUCTOR_COMPILE_THREADS": "1"},
            start_new_session=True,  # so that compilers which it has started can be ended with it
        )
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, self.answers), daemon=True).start()

    @staticmethod
    def _listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            answers.put(line)
        answers.put("")

    def _exchange(self, request: dict[str, Any], limit: float) -> Any:
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise Late(f"a run took longer than {limit:.0f} s") from None
        except BrokenPipeError:
            line = ""
        if not line:
            raise Failure(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer["answer"]

    def _last_words(self) -> str:
        assert self.process is not None
        status = self.process.wait()
        self.errors.seek(0)
        said = [line for line in self.errors.read().splitlines() if line.strip()]
        self.close()
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}, as happens where memory is short"
        return f"its process ended: {said[-1] if said else f'exit status {status}'}"[:300]

    def close(self) -> None:
        if self.process is None:
            return
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None
        self.errors.close()


@dataclass
class Contender:
    """One provider in a run: its name in the record, where it runs, and what is known about it."""

    name: str
    provider: str
    worker: Worker
    commit: str | None
    given_up: dict[tuple[Any, ...], str] = field(default_factory=dict)
    took: dict[tuple[Any, ...], tuple[int, float, float]] = field(default_factory=dict)
    """Of the last size of each series: its N, its weight, and the seconds of a run."""

    def limit(self, patience: float) -> float:
        """Seconds after which a request is given up."""
        return COMPILE_LIMIT if self.provider in ("compile", "triton") else max(60.0, 10 * patience)


class Base:
    """The kernels of another commit of this repository, in a temporary folder."""

    def __init__(self, revision: str, repository: Path = REPOSITORY) -> None:
        self.name = revision
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        if not (repository / ".git").exists() or shutil.which("git") is None:
            raise ValueError(
                f"--base {revision}: this needs git and a checkout of the repository; {repository} is none"
            )
        self.git = ["git", "-C", str(repository)]
        found = subprocess.run(
            [*self.git, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}"],
            capture_output=True,
            text=True,
        )
        if found.returncode:
            raise ValueError(f"--base {revision}: no such commit in {repository}")
        self.commit = found.stdout.strip()
        paths = self._git("ls-tree", "-r", "--name-only", self.commit, "--", "kernels").split()
        self.packages = {path.split("/")[1] for path in paths if re.fullmatch(r"kernels/\w+/__init__\.py", path)}
        if not self.packages:
            raise ValueError(f"--base {revision}: commit {self.commit[:10]} has no kernels; choose a later one")

    def _git(self, *arguments: str) -> str:
        return subprocess.run([*self.git, *arguments], capture_output=True, text=True, check=True).stdout

    def __enter__(self) -> Path:
        """Its folder of kernels."""
        self.folder = tempfile.TemporaryDirectory(prefix="mmcompress-base-")
        archive = Path(self.folder.name) / "kernels.zip"
        self._git("archive", f"--output={archive}", self.commit, "kernels")
        shutil.unpack_archive(archive, self.folder.name)
        return Path(self.folder.name) / "kernels"

    def __exit__(self, *_: object) -> None:
        assert self.folder is not None
        self.folder.cleanup()


def versions() -> dict[str, Any]:
    """What all rows of a run share."""
    here = machine()
    try:
        triton: str | None = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {key: here[key] for key in ("threads", "platform", "python", "torch", "mmcompress", "commit")} | {
        "triton": triton
    }


def measure(sweep: Sweep, base: Base | None = None, kernels_folder: Path | None = None) -> Iterator[list[Row]]:
    """The rows of one case after the other: operation by operation, N rising."""
    ours = kernels_folder or Path(str(kernels.__file__)).parent
    name = processor() if sweep.device == "cpu" else torch.cuda.get_device_name(sweep.device)
    shared = {**versions(), "device": name}
    contenders = [Contender(p, p, Worker(ours), shared["commit"]) for p in sweep.providers]
    with contextlib.ExitStack() as stack:
        if base is not None:
            theirs = stack.enter_context(base)
            again = [p for p in sweep.providers if p in ("blocked", "triton")]
            contenders += [Contender(f"{p}@{base.name}", p, Worker(theirs), base.commit[:10]) for p in again]
        for c in contenders:
            stack.callback(c.worker.close)
        try:
            rates = contenders[0].worker.ask("rates", 600, dtypes=list(sweep.dtypes), device=sweep.device)
        except Failure as failure:
            raise ValueError(f"bench kernels: {sweep.device} could not be measured: {failure}") from None
        for op in sweep.ops:
            for series, cases in sizes(op, sweep.n, sweep.d, sweep.k, sweep.dtypes).items():
                for size in cases:
                    yield Case(sweep, contenders, op, series, size).rows(rates, shared)


@dataclass
class Case:
    """All providers at one size, in turn."""

    sweep: Sweep
    contenders: list[Contender]
    op: str
    series: tuple[int, int, str]
    size: Size

    def __post_init__(self) -> None:
        self.flops, self.bytes = OPERATIONS[self.op].flops(self.size), OPERATIONS[self.op].bytes(self.size)
        self.times: dict[str, list[float]] = {c.name: [] for c in self.contenders}
        self.peaks: dict[str, int] = {}
        self.notes: dict[str, str] = {}

    def rows(self, rates: dict[str, Any], shared: dict[str, Any]) -> list[Row]:
        request = {"op": self.op, **dataclasses.asdict(self.size), "device": self.sweep.device}
        for c in self.contenders:
            c.worker.prepare(request)
            self._try(c)
        self._race()
        copy, matmul = rates["copy"], rates["matmul"][self.size.dtype]
        bound_ms = 1000 * max(self.flops / matmul, self.bytes / copy)
        rows = []
        for c in self.contenders:
            times = self.times[c.name] if c.name not in self.notes else []
            q20, q50, q80 = quantiles(times)
            if times:
                c.took[(self.op, *self.series)] = self.size.n, self.flops or self.bytes, min(times) / 1000
            rows.append(
                Row(
                    self.op, c.name, self.size.n, self.size.d, self.size.k, self.size.dtype, q20, q50, q80, len(times),
                    self.peaks.get(c.name), self.flops, self.bytes, bound_ms / q50 if q50 else None, self.notes.get(c.name),
                    copy_bytes_per_s=copy, matmul_flops_per_s=matmul, **{**shared, "commit": c.commit},
                )
            )  # fmt: skip
        return rows

    def _try(self, c: Contender) -> None:
        """Warm up and measure the memory of a provider; note why if that is no use."""
        key = (self.op, *self.series)
        if known := c.given_up.get(key) or c.given_up.get((self.op,)):
            self.notes[c.name] = known
            return
        expected, n = self._expected(c)
        try:
            if expected <= self.sweep.patience:
                first = c.worker.ask("run", c.limit(self.sweep.patience), provider=c.provider, warmup=True)
                if first >= SLOW:
                    self.times[c.name].append(first)
            else:
                self.notes[c.name] = (
                    f"about {digits(expected)} s a run, by that with N = {n}: beyond {self.sweep.patience:g} s"
                )
                mine = c.provider in ("blocked", "triton") and self.size.d in (min(self.sweep.d), OPERATIONS[self.op].d)
                if not mine or expected > 10 * self.sweep.patience:
                    return
                self.notes[c.name] += ", its memory was measured alone"
            self.peaks[c.name] = c.worker.ask("memory", c.limit(self.sweep.patience), provider=c.provider)
        except Failure as failure:
            self.notes[c.name] = str(failure)
            hopeless = isinstance(failure, Late) and c.provider == "compile"
            c.given_up[(self.op,) if hopeless else key] = f"{AS_BEFORE} {self.size.n}: {failure}"

    def _expected(self, c: Contender) -> tuple[float, int]:
        """Seconds that a run should take by what the smaller size took, and that size; 0 for the smallest."""
        if (self.op, *self.series) not in c.took:
            return 0.0, 0
        n, work, seconds = c.took[(self.op, *self.series)]
        return seconds * (self.flops or self.bytes) / work, n

    def _race(self) -> None:
        """Rounds of one run of each, every time in another order: what ran before leaves its traces in the caches."""
        slow = 1000 * self.sweep.patience
        racing = [c for c in self.contenders if c.name not in self.notes and max(self.times[c.name], default=0) <= slow]
        start = time.perf_counter()
        for round_ in range(self.sweep.repeats):
            done = min((len(self.times[c.name]) for c in racing), default=0)
            if done >= FEWEST and time.perf_counter() - start > self.sweep.seconds:
                break
            for c in random.Random(round_).sample(racing, len(racing)):
                time.sleep(0.005)  # threads of another process wait busily for a while
                try:
                    self.times[c.name].append(c.worker.ask("run", c.limit(self.sweep.patience), provider=c.provider))
                except Failure as failure:
                    self.notes[c.name] = str(failure)
            racing = [c for c in racing if c.name not in self.notes]


def quantiles(values: list[float]) -> tuple[float, float, float] | tuple[None, None, None]:
    """The 0.2, 0.5 and 0.8 quantiles, linear between neighbours; None without any."""
    if not values:
        return None, None, None
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def read(path: Path) -> list[Row]:
    """The rows of a record, none if there is none. Raises RecordError for anything else."""
    return [Row(**row) for row in records.read(path, KIND, _fits) or []]


def _fits(value: Any) -> bool:
    names = {field.name for field in dataclasses.fields(Row)}
    return isinstance(value, list) and all(isinstance(row, dict) and set(row) == names for row in value)


def write(rows: Sequence[Row], path: Path) -> Path:
    """Write a record, a row per line."""
    return _write(path, list(map(dataclasses.asdict, rows)))


def _write(path: Path | str, rows: list[dict[str, Any]]) -> Path:
    return records.write_text(path, "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def write_csv(rows: Sequence[Row], path: Path) -> Path:
    """Write rows as a table."""
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, [field.name for field in dataclasses.fields(Row)])
    table.writeheader()
    table.writerows(map(dataclasses.asdict, rows))
    return records.write_text(path, text.getvalue())


def keep(rows: Sequence[Row], path: Path) -> None:
    """Add rows to what is in a record by now."""

    def add(old: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
        return list(map(dataclasses.asdict, merged([Row(**one) for one in old or []], rows)))

    records.update(path, KIND, add, _fits, _write)


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """The rows of both, in the place and with the values of the newer ones where both measured the same."""
    known = {row.key(): row for row in old}
    known.update({row.key(): row for row in new})
    return list(known.values())
