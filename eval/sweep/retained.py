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

from ...assets import MODELS
from ...flops import WHOLE
from ...plan import as_pipeline
from ..comparison import Comparison, retained, shown
from ..evaluator import STOCK
from ..statistics import VERDICTS, unsettled
from ..tasks import task_of

AXES = {
    "flops": (f"FLOPs of the {WHOLE}, % of stock", lambda cost: 100 * cost["flops_ratio"]),
    "ttft": ("time to the first token, ms", lambda cost: cost["milliseconds"]["ttft"]["median"]),
    "kv": ("KV cache, MiB", lambda cost: cost["kv_bytes"] / 2**20),
}
FLOORS = ("keyframes", "downsample", "uniform", "random")
"""What a method has to beat: fewer frames (evenly spread), smaller pictures or frames, every so-many-th token, tokens by lot."""
ACTS = {
    "pixel": "before the encoder", "encoder": "in the encoder", "input": "before the LLM", "layer": "in the LLM",
    "attention": "in the LLM's attention", "recipe": "before and in the LLM",
}  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """A plan of a sweep. relative: RelAcc in percent, error: its standard error by paired bootstrap; op, og, agreement: OP, OG and
    OL; comparisons: task -> against the stock model; cost: axis -> value; share: visual tokens that an LLM layer sees, mean over
    layers and tasks, as a part of all of them (nan: there are none)."""

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
    share: float = math.nan

    @property
    def family(self) -> str:
        """The methods of the plan, whatever their options."""
        return STOCK if self.plan == STOCK else " >> ".join(stage.name for stage in as_pipeline(self.plan).stages)

    @property
    def acts(self) -> str:
        """Where the plan acts."""
        kinds = list(dict.fromkeys(stage.kind for stage in as_pipeline(self.plan).stages))
        return ACTS.get(kinds[0], kinds[0]) if len(kinds) == 1 else "several stages"

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


def tiny(content: dict[str, Any]) -> bool:
    """Whether times were taken on an embedded model as it is: they say nothing of real ones, and are not shown."""
    return bool(content["cost"]) and content["cost"]["model"] in MODELS


def standings(content: dict[str, Any]) -> list[Standing]:
    """The plans of a sweep that ran, the stock model first; raises ValueError if that is not there."""
    ran = [point for point in content["points"] if not point["refused"]]
    if not ran or ran[0]["plan"] != STOCK:
        raise ValueError("a sweep without the stock model has nothing to compare with")
    found = []
    axes = {name: read for name, (_, read) in AXES.items() if name != "ttft" or not tiny(content)}
    for point in ran:
        cost = {name: read(point["cost"]) for name, read in axes.items()} if point["cost"] else {}
        every = {task: Comparison.from_dict(one["against"]) for task, one in point["tasks"].items() if one["against"]}
        found.append(_standing(point, every, cost))
    return found


def _standing(point: dict[str, Any], every: dict[str, Comparison], cost: dict[str, float]) -> Standing:
    head = (point["plan"], point["method"], point["keep"])
    seen = [one["visual"] for one in point["tasks"].values() if one["visual"].get("prompt")]
    share = sum(one["mean_of_layers"] / one["prompt"] for one in seen) / len(seen) if seen else math.nan
    if point["plan"] == STOCK:
        return Standing(*head, 100.0, 0.0, 100.0, 0.0, 100.0, {}, cost, share=share)
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
    return Standing(*head, values[0], 100 * error, values[1], values[2], 100 * same / asked, every, cost, notes, share)


def front(rows: Sequence[Standing], axis: str) -> list[Standing]:
    """The plans that no other one beats at the same or a lower cost, from cheap to dear."""
    known = [row for row in rows if axis in row.cost and not math.isnan(row.relative)]
    found: list[Standing] = []
    for row in sorted(known, key=lambda row: (row.cost[axis], -row.relative)):
        if not found or row.relative > found[-1].relative:
            found.append(row)
    return found


HEADINGS = {
    "plan": "the plan",
    "tokens %": "visual tokens that a layer of the LLM sees, mean over its layers, % of the stock model's",
    "RelAcc": "mean over tasks of score / stock score in %, ± one standard error of a paired bootstrap",
    "OP": "root mean square of score / stock score over tasks, in %",
    "OG": "spread of score / stock score over tasks: standard deviation over mean",
    "agreement": "the benchmark's parser reads the same in both replies, % of the questions",
    "right>wrong": "answers that were right and are wrong",
    "wrong>right": "answers that were wrong and are right",
    "verdict": "against the stock model, 95 %; same: surely within one point",
    "FLOPs %": f"of the {WHOLE}, counted, % of the stock model's",
    "TTFT ms": "time to the first token, measured, plans in turn",
    "KV MiB": "keys and values that decoding reads",
}
"""Columns of the table of a sweep, and what they say."""


COSTS = {"FLOPs %": "flops", "TTFT ms": "ttft", "KV MiB": "kv"}


def cells(row: Standing) -> list[str]:
    """A line of the table of a sweep, a cell for each of HEADINGS."""
    percent: Callable[[float], str] = lambda value: "-" if math.isnan(value) else f"{value:.1f}"  # noqa: E731
    cost = [f"{row.cost[axis]:.{1 + (axis == 'kv')}f}" if axis in row.cost else "-" for axis in COSTS.values()]
    flips = ["", "", ""] if row.plan == STOCK else [*map(str, row.flips), row.verdict]
    relative = percent(row.relative) + (f" ± {row.error:.1f}" if row.plan != STOCK else "")
    og = "-" if math.isnan(row.og) else f"{row.og:.3f}"
    return [
        row.plan, percent(100 * row.share), relative, percent(row.op), og, percent(row.agreement), *flips, *cost
    ]  # fmt: skip


def table(content: dict[str, Any], rows: Sequence[Standing]) -> Table:
    """All plans of a sweep."""
    made = Table(
        box=SIMPLE_HEAD,
        title=escape(f"{content['model']} on {', '.join(content['tasks'])}"),
        caption="; ".join(f"{heading}: {HEADINGS[heading]}" for heading in shown_columns(rows)[1:]),
    )
    columns = shown_columns(rows)
    for heading in columns:
        made.add_column(heading, justify="left" if heading in ("plan", "verdict") else "right")
    for row in rows:
        made.add_row(*(escape(cell) for heading, cell in zip(HEADINGS, cells(row), strict=True) if heading in columns))
    return made


def shown_columns(rows: Sequence[Standing]) -> list[str]:
    """The headings of the columns that say something: no OP and OG of one task, no costs that were not measured."""
    one = max((len(row.comparisons) for row in rows), default=0) < 2
    empty = {"OP", "OG"} if one else set()
    empty |= {name for name, axis in COSTS.items() if not any(axis in row.cost for row in rows)}
    return [heading for heading in HEADINGS if heading not in empty]


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
