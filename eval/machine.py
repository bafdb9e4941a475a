# SPDX-License-Identifier: Apache-2.0
"""Where a number comes from, as every record names it."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import mmcompress as mm


def machine() -> dict[str, Any]:
    """Where a number comes from: device, threads, versions, commit."""
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": accelerator or processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mmcompress": mm.__version__,
        "commit": commit(),
    }


def threads(count: int) -> str:
    """How many, in words."""
    return f"{count} thread{'s' * (count != 1)}"


def told(here: Mapping[str, Any]) -> str:
    """What `machine` found, in words."""
    versions = f"torch {here['torch']}, transformers {here['transformers']}, commit {here['commit']}"
    return f"{here['device']}, {threads(here['threads'])}, {versions}"


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit that `folder` is of, "-dirty" where code or data differ from it: what measurements write, results/ and README,
    does not count. None outside a repository."""
    git = ["git", "-C", str(folder)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    others = [":/", ":(top,exclude)results", ":(top,exclude)README.md"]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--untracked-files=no", "--", *others], capture_output=True
    )
    return f"{found}{'-dirty' if changed.stdout else ''}" if found else None


def processor() -> str:
    """Name of the CPU."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def check_device(name: str) -> None:
    """Raise ValueError if torch cannot compute on a device: no driver, no such number, no such kind."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"--device {name} cannot be used: {str(error).strip().splitlines()[0]}") from error


def synchronize() -> None:
    """Wait for the accelerator, where there is one: only then a clock means something."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def resident_now() -> int | None:
    """Bytes of this process in memory, after what it no longer uses went back to the system; `resident_peak` counts from here.
    None where the system cannot tell (not Linux)."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    return _status("VmRSS")


def resident_peak() -> int:
    """Most bytes of this process in memory since `resident_now`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])
