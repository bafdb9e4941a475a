# SPDX-License-Identifier: Apache-2.0
"""Replays recorded cases. Indices have to be equal, values within 1e-5 relative to the largest value of the array."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import runners as _registers_all_runners  # noqa: F401
from .form import RUNNERS


def cases(folder: Path) -> list[tuple[str, str, Path]]:
    """(method, case, path) of every `<method>_<case>.npz` in `folder`."""
    return [(*path.stem.rsplit("_", 1), path) for path in sorted(folder.glob("*_*.npz"))]  # type: ignore[misc]


def replay(name: str, path: Path) -> str:
    """Run one case: "ok", or what differs."""
    if name not in RUNNERS:
        return "skipped: no runner for this name"
    with np.load(path) as loaded:
        arrays = {key: torch.from_numpy(np.asarray(loaded[key])) for key in loaded.files}
    params = json.loads(path.with_suffix(".json").read_text())["params"]
    wrong = [text for key, found in RUNNERS[name](arrays, params) if (text := compare(key, found, arrays[key]))]
    return " | ".join(wrong) or "ok"


def compare(key: str, found: Tensor, expected: Tensor) -> str:
    """What differs between an array and the recorded one, "" if nothing does."""
    if found.shape != expected.shape:
        return f"{key}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        wrong = int((found != expected).sum())
        return f"{key}: {wrong} of {expected.numel()} indices differ" if wrong else ""
    error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    return f"{key}: off by {error:.1e} of the largest value" if not error <= 1e-5 else ""
