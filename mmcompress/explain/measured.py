# SPDX-License-Identifier: Apache-2.0
"""How faithful explanations were measured to be, for the models on which that was done."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..weights import fingerprint


@dataclass(frozen=True)
class Measured:
    """F1-IoU (0 to 1) of an explanation, with its standard error: how well maps of words that name an object lie on its true box,
    and how dark those of function words are.

    model, questions  on which, and of how many. plan: of the compressed model, "" for the stock one.
    """

    model: str
    questions: int
    plan: str
    f1: float
    error: float

    def __str__(self) -> str:
        how = f" with {self.plan}" if self.plan else ""
        return f"F1-IoU {100 * self.f1:.1f} ± {100 * self.error:.1f} % ({self.model}{how}, {self.questions} questions)"


def measured(model: Any, method: str, options: Mapping[str, Any], plan: str = "") -> Measured | None:
    """What was measured of an explanation on a model with these very weights, and with these options; with `plan`, else without
    compression; None if nothing was."""
    try:
        mine = fingerprint(model)
    except NotImplementedError:  # weights that are not in memory
        return None
    known = _records().get(mine)
    if known is None:
        return None
    options = {
        name: value for name, value in options.items() if name != "explain_question"
    }  # the other words' maps stay
    rows = {row["plan"]: row for row in known["rows"] if row["method"] == method and row["options"] == options}
    row = rows.get(plan) or rows.get("")
    return row and Measured(known["model"], row["questions"], row["plan"], row["f1"], row["error"])


@functools.cache
def _records() -> dict[str, Any]:
    """By fingerprint; made by `python -m mmcompress.eval.explained.faithful` of what it measured."""
    found: dict[str, Any] = json.loads(
        resources.files(__package__).joinpath("measured.json").read_text(encoding="utf-8")
    )
    return found
