# SPDX-License-Identifier: Apache-2.0
"""The report of a sweep: one HTML page with what it comes to, pictures, plot and tables, nothing outside it."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...records import write_text
from ...visualize.page import embedded, environment
from ..comparison import shown
from ..machine import told
from ..tasks import task_of
from .best import Best, accuracy, bests, headline, loss, runner_up, savings
from .examples import Example, Gallery
from .retained import FLOORS, HEADINGS, Standing, cells, shown_columns, tiny, undecided

MOST = 9
"""Plans whose pictures stand side by side."""


def write_report(
    content: dict[str, Any], rows: Sequence[Standing], gallery: Gallery, plot: Path | None, path: Path, count: int = 3
) -> Path:
    """Write the report of a sweep. gallery: its answers and pictures; count: of examples (0: none)."""
    found = bests(content, rows)
    side = gallery.beside(chosen(found), count) if count else []
    lost = gallery.worst(count) if count else []
    values = {
        "title": f"{content['model']} on {', '.join(content['tasks'])}",
        "headline": headline(rows, found),
        "about": about(content),
        "budgets": [budget(best, rows[0]) for best in found],
        "costs": bool(content["cost"]),
        "side": [(one[0], list(map(panel, one))) for one in side],
        "plot": None if plot is None else f"data:image/png;base64,{base64.b64encode(plot.read_bytes()).decode()}",
        "columns": [(name, HEADINGS[name]) for name in shown_columns(rows)],
        "rows": list(table(rows)),
        "undecided": undecided(rows),
        "types": [types(task, rows) for task in content["tasks"]],
        "refused": [point for point in content["points"] if point["refused"]],
        "lost": {
            plan: [panel(one) for one in lost if one.plan == plan] for plan in dict.fromkeys(one.plan for one in lost)
        },
    }
    return write_text(path, environment().get_template("report.html").render(values))


def chosen(found: Sequence[Best]) -> list[str]:
    """The plans whose pictures stand side by side: the best of each budget and the floor under it."""
    plans = [row.plan for best in found for row in (best.row, best.floor) if row is not None]
    return list(dict.fromkeys(plans))[:MOST]


def about(content: dict[str, Any]) -> str:
    """How it was measured."""
    asked = ", ".join(f"{one['questions']} questions of {name}" for name, one in content["tasks"].items())
    cost = content["cost"]
    if not cost:
        return f"{asked}; costs were not measured; {told(content['machine'])}."
    rounds = (
        "times of a model as small as this one say nothing of real ones and are left out (--time-on MODEL@8x4 takes them)"
        if tiny(content)
        else f"times are medians of {cost['repeats']} round{'s' * (cost['repeats'] != 1)} of all plans in turn"
    )
    return (
        f"{asked}; costs of one prompt of {cost['prompt_tokens']} tokens to {cost['model']}, {cost['dtype']}, attention "
        f"{cost['attention']}; {rounds}; {told(cost['machine'])}."
    )


def budget(best: Best, stock: Standing) -> dict[str, str]:
    """A line of the first table."""
    floor = best.floor
    under = "" if floor is None else "itself a floor" if floor is best.row else f"{floor.plan}: {accuracy(floor)}"
    return {
        "budget": best.budget, "plan": best.row.plan, "accuracy": accuracy(best.row), "loss": loss(best.row),
        "saves": savings(best.row, stock), "second": runner_up(best), "floor": under or "none was swept",
    }  # fmt: skip


def panel(example: Example) -> dict[str, Any]:
    """A plan's answer with its pictures."""
    return {
        "plan": example.plan, "tokens": example.tokens, "right": example.right, "question": example.question,
        "before": example.before.strip(), "reply": example.row.reply.strip() or "(nothing)",
        "answers": ", ".join(example.row.answers[:3]), "task": example.task, "id": example.row.id, "kind": example.row.kind,
        "pictures": [(name, embedded(picture)) for name, picture in example.pictures],
    }  # fmt: skip


def table(rows: Sequence[Standing]) -> Iterator[dict[str, Any]]:
    """Lines of the table of all plans, the best first: texts, and by what they are sorted."""
    columns = shown_columns(rows)
    for row in sorted(rows, key=lambda row: -row.relative if not math.isnan(row.relative) else math.inf):
        texts = [cell for name, cell in zip(HEADINGS, cells(row), strict=True) if name in columns]
        yield {"cells": texts, "floor": row.family in FLOORS, "notes": row.notes}


def types(task: str, rows: Sequence[Standing]) -> dict[str, Any]:
    """Every plan by question type of a task: score, and of each type value, loss (0 to 1) and verdict."""
    scale = task_of(task).percent
    found = [(row, row.comparisons[task]) for row in rows if task in row.comparisons]
    kinds = list(found[0][1].by_kind) if found else []
    stock = [found[0][1].by_kind[kind][1] for kind in kinds]
    lines = []
    for row, one in sorted(found, key=lambda pair: -pair[1].score if not math.isnan(pair[1].score) else math.inf):
        values = [
            (f"{100 * after:.0f}", max(0.0, before - after), change.verdict if abs(before - after) > 0 else "")
            for _, before, after, change in (one.by_kind[kind] for kind in kinds if kind in one.by_kind)
        ]
        chance = shown(one.above_chance, True)
        lines.append({"plan": row.plan, "score": shown(one.score, scale), "chance": chance, "kinds": values})
    return {
        "task": task, "kinds": [kind or "-" for kind in kinds], "stock": [f"{100 * value:.0f}" for value in stock],
        "score": shown(found[0][1].base_score, scale) if found else "-", "lines": lines,
    }  # fmt: skip
