# SPDX-License-Identifier: Apache-2.0
"""What a sweep comes to: the best plan for each budget of visual tokens, and one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...budget import keep_text
from ..comparison import shown
from ..evaluator import STOCK
from ..margins import marks_of
from ..statistics import BETTER, POINT, SAME, Difference, about, bootstrap
from ..tasks import task_of
from .retained import FLOORS, Standing

BUDGETS = (0.5, 0.25, 0.1, 0.05)
"""Of sweeps whose plans have a ratio of their own."""
SLACK = 1.05
"""How many more tokens than a budget a plan may have: rounding, tokens that structure a picture."""
KEPT = 97.0
"""What a plan has to keep of the stock model's score to be the answer, in percent."""


@dataclass(frozen=True)
class Best:
    """The best plan of a budget. second: the next one, change: best less second on the same questions; floor: the best of the
    methods that anything has to beat; others: how many more plans there are."""

    budget: str
    row: Standing
    second: Standing | None = None
    change: Difference | None = None
    floor: Standing | None = None
    others: int = 0


def bests(content: dict[str, Any], rows: Sequence[Standing]) -> list[Best]:
    """The best plan of each budget, of the largest first; a plan counts where it just fits by the tokens that it gives the LLM's
    layers, on average. Budgets are the ratios of the sweep, with what the cheapest plan needs for each, or BUDGETS."""
    known = [row for row in rows if row.plan != STOCK and row.share < 0.999 and not math.isnan(row.relative)]
    sizes: dict[str, float] = {}
    for row in known:
        if row.keep is not None:
            name = keep_text(row.keep)
            sizes[name] = min(row.share, sizes.get(name, 1.0))
    limits = sorted((sizes or {keep_text(keep): keep for keep in BUDGETS}).items(), key=lambda entry: entry[1])
    limits.append((f"above {limits[-1][0]}", 1.0))
    parts: dict[str, list[Standing]] = {name: [] for name, _ in limits}
    for row in known:
        parts[next(name for name, most in limits if row.share <= SLACK * most)].append(row)
    return [_best(content, name, found) for name, found in reversed(parts.items()) if found]


def _best(content: dict[str, Any], budget: str, rows: Sequence[Standing]) -> Best:
    ranked = sorted(rows, key=lambda row: (-row.relative, row.share))
    floor = next((row for row in ranked if row.family in FLOORS), None)
    if len(ranked) == 1:
        return Best(budget, ranked[0], floor=floor)
    first, second = ranked[:2]
    return Best(budget, first, second, between(content, first.plan, second.plan), floor, len(ranked) - 1)


def between(content: dict[str, Any], plan: str, other: str) -> Difference:
    """The part of the questions of all tasks that `plan` has right less that of `other`, paired."""
    points = {point["plan"]: point for point in content["points"]}
    marks = [[mark for task in content["tasks"] for mark in marks_of(points[name], task)] for name in (plan, other)]
    pairs = np.array([(a == "1", b == "1") for a, b in zip(*marks, strict=True) if "-" not in (a, b)], dtype=float)
    ones = np.ones(len(pairs))
    names = [str(i) for i in range(len(pairs))]
    return bootstrap([(1.0, pairs[:, 1], ones)], [(1.0, pairs[:, 0], ones)], names)


def runner_up(best: Best) -> str:
    """How the second best plan stands to the best, in words; what cannot be told is not called the same."""
    if best.second is None or best.change is None:
        return "no other plan here"
    change, name = best.change, best.second.plan
    told = f"{100 * change.value:+.1f} ± {100 * change.error:.1f} points"
    if change.verdict == BETTER:
        return f"clear of {name}: {told}"
    if change.verdict == SAME:
        return f"{name} is as good, within a point: {told}"
    needed = about(change.needed(POINT))
    return f"not told from {name}: {told}; {change.clusters} questions, about {needed} would show a point"


def accuracy(row: Standing) -> str:
    """The score of a plan: of one task in its unit, of several as RelAcc."""
    if len(row.comparisons) != 1:
        return f"{row.relative:.1f} % of stock"
    ((name, one),) = row.comparisons.items()
    return shown(one.score, task_of(name).percent)


def loss(row: Standing) -> str:
    """What a plan changes against the stock model, paired, with its standard error."""
    changes = [(task_of(name), one.change) for name, one in row.comparisons.items() if one.change]
    if len(row.comparisons) != 1 or not changes:
        return f"{row.relative - 100:+.1f} ± {row.error:.1f} %"
    ((task, change),) = changes
    if not change.changed:
        return f"no answer of {change.clusters} differs"
    scale = 100 if task.percent else 1
    return f"{scale * change.value:+.1f} ± {scale * change.error:.1f}{' points' * task.percent}"


def savings(row: Standing, stock: Standing) -> str:
    """What a plan costs: FLOPs, and time where it was measured on a model of some size."""
    parts = [f"{row.cost['flops']:.0f} % of the FLOPs"] if "flops" in row.cost else []
    parts += [f"the first token {stock.cost['ttft'] / row.cost['ttft']:.2f}x as fast"] if "ttft" in row.cost else []
    return ", ".join(parts) or "not measured"


def headline(rows: Sequence[Standing], found: Sequence[Best]) -> str:
    """What a sweep comes to in a sentence: the plan with the fewest tokens that keeps KEPT percent of the stock score."""
    known = [best.row for best in found]
    if not known:
        return "No plan here has fewer visual tokens and a known score: there is nothing to choose."
    good = [row for row in known if row.relative >= KEPT]
    row = min(good, key=lambda row: row.share) if good else max(known, key=lambda row: row.relative)
    (best,) = [one for one in found if one.row is row]
    error = f" ± {row.error:.1f}" if row.error else ""
    kept = f"{row.relative:.1f}{error} % {{}}with {100 * row.share:.0f} % of its visual tokens"
    cost = savings(row, rows[0]) if row.cost else ""
    whose = kept.format("of the stock model's score ")
    text = f"{row.plan} keeps {whose}{f' ({cost})' if cost else ''}"
    if not good:
        text = f"No plan keeps {KEPT:.0f} % of the stock model's score; nearest comes {row.plan}, which keeps {kept.format('')}"
    if best.floor is not None and best.floor is not row:
        text += f"; at this budget {best.floor.plan} keeps {best.floor.relative:.1f} %"
    few = "too few questions to tell it from the stock model" if "too few" in row.verdict else ""
    return f"{text}{f'; {few}' if few else ''}."
