# SPDX-License-Identifier: Apache-2.0
"""What a sweep says of each plan: retention over its tasks, beside what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ...flops import WHOLE
from ..comparison import Comparison, retained, shown
from ..evaluator import STOCK
from ..statistics import VERDICTS, unsettled
from ..tasks import task_of

AXES = {
    "flops": (f"FLOPs of the {WHOLE}, % of stock", lambda cost: 100 * cost["flops_ratio"]),
    "ttft": ("time to the first token, ms", lambda cost: cost["milliseconds"]["ttft"]["median"]),
    "kv": ("KV cache, MiB", lambda cost: cost["kv_bytes"] / 2**20),
}


@dataclass(frozen=True)
class Standing:
    """A plan of a sweep. relative: RelAcc in percent, error: its standard error by paired bootstrap; op, og, agreement: OP, OG and
    OL; comparisons: task -> against the stock model; cost: axis -> value."""

    plan: str
    method: str
    keep: float | int | None
    relative: float
    error: float
    op: float
    og: float
    agreement: float
    comparisons: dict[str, Comparison]
    cost: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def flips(self) -> tuple[int, int]:
        """Answers right to wrong and wrong to right, all tasks together."""
        every = [one.flips for one in self.comparisons.values()]
        return sum(flip.right_to_wrong for flip in every), sum(flip.wrong_to_right for flip in every)

    @property
    def verdict(self) -> str:
        """same, better, worse or too few questions to tell; with several tasks how many of each."""
        each = [one.change.verdict for one in self.comparisons.values() if one.change]
        kinds = [kind for kind in VERDICTS if kind in each]
        return ", ".join(f"{each.count(kind)} {kind}" if len(each) > 1 else kind for kind in kinds)


def standings(content: dict[str, Any]) -> list[Standing]:
    """The plans of a sweep that ran, the stock model first; raises ValueError if that is not there."""
    ran = [point for point in content["points"] if not point["refused"]]
    if not ran or ran[0]["plan"] != STOCK:
        raise ValueError("a sweep without the stock model has nothing to compare with")
    found = []
    for point in ran:
        cost = {name: read(point["cost"]) for name, (_, read) in AXES.items()} if point["cost"] else {}
        every = {task: Comparison.from_dict(one["against"]) for task, one in point["tasks"].items() if one["against"]}
        found.append(_standing(point, every, cost))
    return found


def _standing(point: dict[str, Any], every: dict[str, Comparison], cost: dict[str, float]) -> Standing:
    head = (point["plan"], point["method"], point["keep"])
    if point["plan"] == STOCK:
        return Standing(*head, 100.0, 0.0, 100.0, 0.0, 100.0, {}, cost)
    sums: dict[str, float] = {}
    notes: tuple[str, ...] = ()
    try:
        sums = retained(every)
    except ValueError as error:  # a base score of 0
        notes = (str(error),)
    known = [one for one in every.values() if one.change and one.base_score]
    error = math.sqrt(sum((one.change.error / one.base_score) ** 2 for one in known if one.change)) / max(1, len(known))
    same, asked = (sum(getattr(one.flips, what) for one in every.values()) for what in ("same", "questions"))
    values = [sums.get(name, math.nan) for name in ("RelAcc", "OP", "OG")]
    return Standing(*head, values[0], 100 * error, values[1], values[2], 100 * same / asked, every, cost, notes)


def front(rows: Sequence[Standing], axis: str) -> list[Standing]:
    """The plans that no other one beats at the same or a lower cost, from cheap to dear."""
    known = [row for row in rows if axis in row.cost and not math.isnan(row.relative)]
    found: list[Standing] = []
    for row in sorted(known, key=lambda row: (row.cost[axis], -row.relative)):
        if not found or row.relative > found[-1].relative:
            found.append(row)
    return found


HEADINGS = (
    "plan",
    "RelAcc",
    "OP",
    "OG",
    "agreement",
    "right>wrong",
    "wrong>right",
    "verdict",
    "FLOPs",
    "TTFT ms",
    "KV MiB",
)


def cells(row: Standing) -> list[str]:
    """A line of the table of a sweep."""
    percent: Callable[[float], str] = lambda value: "-" if math.isnan(value) else f"{value:.1f}"  # noqa: E731
    cost = [
        f"{row.cost[axis]:.{digits}f}" if axis in row.cost else "-"
        for axis, digits in (("flops", 1), ("ttft", 1), ("kv", 2))
    ]
    flips = ["", "", ""] if row.plan == STOCK else [*map(str, row.flips), row.verdict]
    relative = percent(row.relative) + (f" ± {row.error:.1f}" if row.plan != STOCK else "")
    og = "-" if math.isnan(row.og) else f"{row.og:.3f}"
    return [row.plan, relative, percent(row.op), og, percent(row.agreement), *flips, *cost]


def table(content: dict[str, Any], rows: Sequence[Standing]) -> Table:
    """All plans of a sweep."""
    made = Table(
        box=SIMPLE_HEAD,
        title=escape(f"{content['model']} on {', '.join(content['tasks'])}"),
        caption="RelAcc: mean over tasks of score / stock score in %, ± one standard error of a paired bootstrap; OP: root mean "
        "square of it; agreement: the parser reads the same in both replies; verdict: against the stock model (95 %), same: within "
        f"one point; FLOPs: {WHOLE}, % of stock",
    )
    for heading in HEADINGS:
        made.add_column(heading, justify="left" if heading in ("plan", "verdict") else "right")
    for row in rows:
        made.add_row(*map(escape, cells(row)))
    return made


def undecided(rows: Sequence[Standing]) -> list[str]:
    """For each task on which some plans cannot be told from the stock model: how many questions would."""
    found = []
    for task in dict.fromkeys(name for row in rows for name in row.comparisons):
        every = [row.comparisons[task] for row in rows if task in row.comparisons]
        if text := unsettled([one.change for one in every if one.change], every[0].questions):
            found.append(f"{task}: {text}")
    return found


def task_lines(rows: Sequence[Standing]) -> list[list[str]]:
    """plan, task, score, stock score, above chance, type by type: for the report."""
    found = []
    for row in rows:
        for name, one in row.comparisons.items():
            kinds = "; ".join(
                f"{kind or '-'} {100 * a:.0f}>{100 * b:.0f} ({d.verdict})" for kind, (_, a, b, d) in one.by_kind.items()
            )
            scale = task_of(name).percent
            found.append(
                [row.plan, name, shown(one.base_score, scale), shown(one.score, scale), shown(one.above_chance, True),
                 one.change.verdict if one.change else "-", kinds]
            )  # fmt: skip
    return found
