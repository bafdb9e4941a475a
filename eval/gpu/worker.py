# SPDX-License-Identifier: Apache-2.0
"""The process that runs steps: a request per line of its input, {"step", "lines", "folder", "until", "dry"}, and an answer
per line, {"done"}. What an item finds goes at once into the file `lines`, so that nothing is lost with the process."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ...kernels import configs
from ..kernel_bench.worker import reason
from .bench import Bench, Item, Skip
from .plan import STEPS

POISONED = 3
"""Exit status after an error that the device does not recover from in this process."""


def items_of(step: str, bench: Bench) -> Mapping[str, Item]:
    """What a step has to do here."""
    module = importlib.import_module(f".{STEPS[step].module}", __package__)
    return getattr(module, step)(bench)


def go(items: Mapping[str, Item], bench: Bench, lines: Path) -> bool:
    """Do what is not in the file yet, as long as there is time. False if the device is lost."""
    done = {line["item"] for line in read(lines)}
    for name, item in items.items():
        if name in done:
            continue
        if bench.left() <= 0:
            _write(lines, bench, item=name, skipped="no time was left")
            continue
        _write(lines, bench, item=name, began=True)
        start = time.monotonic()
        try:
            with torch.no_grad():
                for row in item():
                    _write(lines, bench, item=name, row=row)
        except Skip as skip:
            _write(lines, bench, item=name, skipped=str(skip))
        except Exception as error:
            _write(lines, bench, item=name, failed=reason(error), where=where(error))
            traceback.print_exc()
            if lost(bench):
                return False
        else:
            _write(lines, bench, item=name, done=round(time.monotonic() - start, 3))
    return True


def _write(lines: Path, bench: Bench, **line: Any) -> None:
    with lines.open("a") as file:
        file.write(json.dumps({**line, "dry": bench.dry}) + "\n")


def read(lines: Path) -> list[dict[str, Any]]:
    """What was written so far, but for a last line that was not finished."""
    if not lines.exists():
        return []
    return list(_whole(lines.read_text().splitlines()))


def _whole(lines: list[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        try:
            yield json.loads(line)
        except ValueError:
            return


def where(error: BaseException) -> str:
    """The innermost line outside of torch and Triton."""
    frames = traceback.extract_tb(error.__traceback__)
    mine = [f for f in frames if not any(part in f.filename for part in ("/torch/", "/triton/"))] or frames
    return f"{'/'.join(Path(mine[-1].filename).parts[-3:])}:{mine[-1].lineno}" if mine else ""


def lost(bench: Bench) -> bool:
    """Whether the device answers no longer."""
    if bench.dry:
        return False
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(8, device=bench.device).sum() != 8)
    except RuntimeError:
        return True


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anything else prints must not stand between the answers
    for line in sys.stdin:
        request = json.loads(line)
        importlib.reload(configs)  # the step before may have written it
        bench = Bench(request["dry"], Path(request["folder"]), request["until"])
        lines = Path(request["lines"])
        try:
            items = items_of(request["step"], bench)
        except Exception as error:
            traceback.print_exc()
            items = {}
            _write(lines, bench, item=request["step"], failed=reason(error), where=where(error))
        if not go(items, bench, lines):
            os._exit(POISONED)
        if not bench.dry:
            torch.cuda.empty_cache()
        print(json.dumps({"done": request["step"]}), file=replies, flush=True)


if __name__ == "__main__":
    main()
