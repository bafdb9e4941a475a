# SPDX-License-Identifier: Apache-2.0
"""Plans for those who do not want to choose: `fast`, `balanced` and `quality`, for each family by what was measured.

`presets.json` has the numbers and where they come from; `python -m mmcompress.eval.presets` writes it from records of sweeps.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
NAMES = ("fast", "balanced", "quality")


@dataclass(frozen=True)
class Preset:
    """What a name stands for. family: that it was measured on, "" for the mean of all; points: accuracy less the stock model's on
    `questions` questions about `models`, with its paired standard error."""

    name: str
    plan: str
    family: str
    models: tuple[str, ...]
    questions: int
    points: float
    error: float

    def __str__(self) -> str:
        where = self.family or "families that were not measured"
        return (
            f"{self.name} for {where}: {self.points:+.1f} ± {self.error:.1f} points of accuracy against the stock model, on "
            f"{self.questions} questions to {', '.join(self.models)}"
        )


@functools.cache
def measured() -> dict[str, Any]:
    """The whole record: "rule", "sources", "families" by model type, and "others" for the rest."""
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def preset(name: str, family: str | None = None) -> Preset:
    """What `name` means for models of type `family`, as their config calls it; for types that were not measured, what held on
    average for those that were. Raises ValueError for another name."""
    if name not in NAMES:
        raise ValueError(f"no preset {name!r}: there is {', '.join(NAMES)}")
    record = measured()
    known = family if family and family in record["families"] else ""
    found = record["families"].get(known, record["others"])
    row = found["presets"][name]
    return Preset(name, row["plan"], known, tuple(found["models"]), found["questions"], row["points"], row["error"])
