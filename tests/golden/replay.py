# SPDX-License-Identifier: Apache-2.0
"""Replays recorded cases. Indices have to be equal, values within 1e-5 relative to the largest value of the array; in cases
without arrays everything but floats has to be equal, floats within 1e-9."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import runners as _registers_all_runners  # noqa: F401
from .form import RUNNERS, TEXT_RUNNERS


def cases(folder: Path) -> list[tuple[str, str, Path]]:
    """(method, case, path) of every `<method>_<case>.npz` in `folder`, and of every .json that has no .npz."""
    alone = [path for path in folder.glob("*_*.json") if not path.with_suffix(".npz").exists()]
    paths = sorted([*folder.glob("*_*.npz"), *alone])
    return [(*path.stem.rsplit("_", 1), path) for path in paths]  # type: ignore[misc]


def replay(name: str, path: Path) -> str:
    """Run one case: "ok", or what differs."""
    if path.suffix == ".json":
        if name not in TEXT_RUNNERS:
            return "skipped: no runner for this name"
        found = list(TEXT_RUNNERS[name](json.loads(path.read_text())))
        wrong = [f"{key}: {got!r}, expected {want!r}" for key, got, want in found if not _same(got, want)]
        return " | ".join(wrong) or ("ok" if found else "nothing compared")
    if name not in RUNNERS:
        return "skipped: no runner for this name"
    with np.load(path) as loaded:
        arrays = {key: torch.from_numpy(np.asarray(loaded[key])) for key in loaded.files}
    params = json.loads(path.with_suffix(".json").read_text())
    params = params.get("params", params)
    wrong = [text for key, found in RUNNERS[name](arrays, params) if (text := compare(key, found, arrays[key]))]
    return " | ".join(wrong) or "ok"


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, float) and isinstance(found, (int, float)):
        return math.isclose(found, expected, rel_tol=1e-9)
    return found == expected


def compare(key: str, found: Tensor, expected: Tensor) -> str:
    """What differs between an array and the recorded one, "" if nothing does."""
    if found.shape != expected.shape:
        return f"{key}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not expected.is_floating_point():
        wrong = int((found != expected).sum())
        return f"{key}: {wrong} of {expected.numel()} indices differ" if wrong else ""
    error = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    return f"{key}: off by {error:.1e} of the largest value" if not error <= 1e-5 else ""
