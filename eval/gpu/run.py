# SPDX-License-Identifier: Apache-2.0
"""Goes through the steps, each under its limit, and writes what they found.

A process runs one step after the other; where it is late or lost, it is ended and the next step gets a new one. A step whose
process was lost goes on behind the item that it was lost in. Steps that end early leave their time to those behind them.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...records import write_json
from .plan import GROUPS, Step, seconds
from .worker import POISONED, read

FORMAT = 1
WORKER = [sys.executable, "-m", f"{__package__}.worker"]
Say = Callable[[str], None]


class Worker:
    """A process for steps, started when it is first asked, and again after it ended."""

    def __init__(self, dry: bool, log: Any) -> None:
        self.dry, self.log = dry, log
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any], limit: float) -> str:
        """ "ok", "late" (and ended), "lost" (it ended by itself)."""
        if self.process is None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.answers.get(timeout=max(1.0, limit))
        except queue.Empty:
            self.close()
            return "late"
        except BrokenPipeError:
            answer = ""
        if answer:
            return "ok"
        status = self.process.wait()
        if status != POISONED:
            self.log.write(f"\nthe process ended with status {status}\n")
        self.close()
        return "lost"

    def _start(self) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        if self.dry:
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=environment | {"PYTHONUNBUFFERED": "1"}, start_new_session=True, cwd=tempfile.gettempdir(),
        )  # fmt: skip
        self.answers: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_listen, args=(self.process, self.answers), daemon=True).start()

    def close(self) -> None:
        if self.process is None:
            return
        with contextlib.suppress(ProcessLookupError):  # what it has started is ended with it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None


def _listen(process: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        answers.put(line)
    answers.put("")


def one(step: Step, worker: Worker, folder: Path, until: float) -> dict[str, Any]:
    """Run a step until it is done or late; its part of the record."""
    start, lines = time.monotonic(), folder / f"{step.name}.lines"
    status, known = "lost", -1
    while status == "lost" and time.monotonic() < until and known < (known := len(read(lines))):
        left = until - time.monotonic()
        # an item that began in time may end a little late; what is later than that is ended
        request = {"step": step.name, "lines": str(lines), "folder": str(folder), "until": until - min(5.0, left / 4)}
        status = worker.ask({**request, "dry": worker.dry}, left)
        _close_open(lines, status, worker.dry)
    return part(step, read(lines), worker.dry, status, time.monotonic() - start)


def _close_open(lines: Path, status: str, dry: bool) -> None:
    """The item that a process was ended in has failed."""
    if status == "ok":
        return
    found = read(lines)
    over = {line["item"] for line in found if {"done", "failed", "skipped"} & line.keys()}
    words = "was ended: it took too long" if status == "late" else "was lost with its process"
    lines.write_text("".join(json.dumps(line) + "\n" for line in found))  # without half a line
    with lines.open("a") as file:
        for item in dict.fromkeys(line["item"] for line in found if line["item"] not in over):
            file.write(json.dumps({"item": item, "failed": words, "where": "", "dry": dry}) + "\n")


def part(step: Step, lines: Sequence[dict[str, Any]], dry: bool, status: str, took: float) -> dict[str, Any]:
    """What a record says of a step: status "ok", "late", "lost", or "failed" where an item did."""
    failed = [{k: line[k] for k in ("item", "failed", "where")} for line in lines if "failed" in line]
    skipped = [{k: line[k] for k in ("item", "skipped")} for line in lines if "skipped" in line]
    rows = [{"item": line["item"], **line["row"], "dry": dry} for line in lines if "row" in line]
    done = {line["item"]: line["done"] for line in lines if "done" in line}
    if status == "ok" and failed:
        status = "failed"
    return {
        "dry": dry, "text": step.text, "status": status, "budget_s": step.dry if dry else step.seconds, "took_s": round(took, 1),
        "items_s": done, "rows": rows, "skipped": skipped, "failed": failed,
    }  # fmt: skip


def run(
    folder: Path,
    dry: bool,
    commit: str | None = None,
    only: Sequence[str] = (),
    say: Say = print,
    groups: Sequence[tuple[Step, ...]] = GROUPS,
) -> Path:
    """Run the steps (of `only`, if given) and write `gpu.json` and `log.txt` into `folder`, after each step anew; dry runs write
    `gpu-dry.json` and `log-dry.txt`. Returns the record's path."""
    folder.mkdir(parents=True, exist_ok=True)
    end = "-dry" if dry else ""
    path, log_path = folder / f"gpu{end}.json", folder / f"log{end}.txt"
    record: dict[str, Any] = {
        "mmcompress": "gpu",
        "format": FORMAT,
        "dry": dry,
        "machine": here(dry, commit),
        "steps": {},
    }
    groups = [g for group in groups if (g := tuple(s for s in group if not only or s.name in only))]
    with log_path.open("w") as log, tempfile.TemporaryDirectory(prefix="mmcompress-gpu-") as scratch:
        workers = [Worker(dry, log) for _ in range(max(map(len, groups)))]
        until = time.monotonic()
        try:
            for group in groups:
                until += seconds(group, dry)
                say(f"{', '.join(step.name for step in group)}: at most {until - time.monotonic():.0f} s")
                for step, found in zip(group, _together(group, workers, Path(scratch), until), strict=True):
                    record["steps"][step.name] = found
                    say(f"  {summary(step.name, found)}")
                record["took_s"] = round(sum(p["took_s"] for p in record["steps"].values()), 1)
                write_json(path, record)
                for made in Path(scratch).glob("*.py"):
                    (folder / f"{made.stem}{end}.py").write_text(made.read_text())
        finally:
            for worker in workers:
                worker.close()
    say(f"record: {path}")
    return path


def _together(group: Sequence[Step], workers: Sequence[Worker], scratch: Path, until: float) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(group)) as pool:
        return list(pool.map(lambda pair: one(pair[0], pair[1], scratch, until), zip(group, workers, strict=False)))


def summary(name: str, found: dict[str, Any]) -> str:
    """One line about a step, and one for everything that failed or was skipped."""
    numbers = f"{len(found['rows'])} rows, {len(found['failed'])} failed, {len(found['skipped'])} skipped"
    lines = [f"{name}: {found['status']}, {found['took_s']:.0f} s of {found['budget_s']}, {numbers}"]
    lines += [f"    failed {one['item']}: {one['failed']} ({one['where']})" for one in found["failed"]]
    lines += [f"    skipped {one['item']}: {one['skipped']}" for one in found["skipped"]]
    return "\n".join(lines)


def here(dry: bool, commit: str | None) -> dict[str, Any]:
    """Where the numbers come from. A dry run names the processor and says what it is, whatever GPU there may be."""
    import importlib.metadata

    import torch

    from ..machine import machine, processor

    found = machine()
    found["commit"] = found["commit"] or commit
    versions = {}
    for name in ("triton", "flash_attn", "timm", "open_clip_torch", "decord"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    found |= {"cuda": torch.version.cuda, "packages": versions, "driver": None, "memory_bytes": None}
    if dry:
        return found | {"device": f"{processor()} (dry run: Triton's interpreter, tiny shapes, no measurement)"}
    free, memory = torch.cuda.mem_get_info()
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit",
        "--format=csv,noheader",
    ]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return found | {"memory_bytes": memory, "free_bytes": free}
