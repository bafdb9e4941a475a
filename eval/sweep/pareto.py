# SPDX-License-Identifier: Apache-2.0
"""The plots of sweeps: what is retained against FLOPs, time to the first token and KV cache."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...budget import keep_text
from ...visualize.figure import new_figure, written
from ..evaluator import STOCK
from .retained import AXES, Standing, front

FEW = 8
"""Up to so many methods all have a colour and names; of more only the fronts have names, and the rest is grey."""
LONGEST = 30
"""Letters of a label."""
FLOOR = 50.0
"""Plots begin here, or where the lowest plan of a front is, if that is lower."""


def plot(models: Mapping[str, Sequence[Standing]], title: str, path: Path) -> Path:
    """Write one picture with a row for each model and a plot for each cost; needs matplotlib (`pip install mmcompress[viz]`).

    A line joins the plans that no other one beats at the same or a lower cost; they have their names. Bars are one standard
    error.
    """
    figure = new_figure(16, 1.0 + 4.4 * len(models), title, dpi=90)
    from matplotlib import colormaps

    colors = _colors(models, colormaps["tab10"].colors)  # type: ignore[attr-defined]
    grid = figure.subplots(len(models), len(AXES), squeeze=False)
    for line, (model, rows) in zip(grid, models.items(), strict=True):
        for axes, (axis, (label, _)) in zip(line, AXES.items(), strict=True):
            _panel(axes, rows, axis, colors)
            axes.set_xlabel(label)
            axes.set_title(model, fontsize=10)
        line[0].set_ylabel("RelAcc, % of the stock model")
    figure.draw_without_rendering()  # only now the places of points on the page are known
    for line, rows in zip(grid, models.values(), strict=True):
        for axes, axis in zip(line, AXES, strict=True):
            _name(axes, rows if colors else front(rows, axis), axis)
    return written(figure, path)


def _colors(models: Mapping[str, Sequence[Standing]], palette: Sequence[Any]) -> dict[str, Any]:
    """Method -> colour, if there are few."""
    every = list(dict.fromkeys(row.method for rows in models.values() for row in rows if row.plan != STOCK))
    return dict(zip(every, palette, strict=False)) if len(every) <= FEW else {}


def _panel(axes: Any, rows: Sequence[Standing], axis: str, colors: Mapping[str, Any]) -> None:
    known = [row for row in rows if axis in row.cost and not math.isnan(row.relative)]
    best = front(known, axis)
    for row in known:
        if row.plan == STOCK:
            axes.plot(row.cost[axis], row.relative, marker="*", markersize=13, color="black", zorder=4)
            continue
        on = row in best
        axes.errorbar(
            row.cost[axis], row.relative, row.error if on or colors else None, marker="o", elinewidth=0.8,
            color=colors.get(row.method, "tab:blue" if on else "0.72"), markersize=6 if on else 4, zorder=3 if on else 1,
        )  # fmt: skip
    axes.plot([row.cost[axis] for row in best], [row.relative for row in best], color="black", linewidth=1, zorder=2)
    lowest = min((row.relative for row in best), default=FLOOR)
    highest = max((row.relative for row in known), default=100.0)
    bottom = min(FLOOR, lowest - 5)
    axes.set_ylim(bottom, highest + 0.3 * (highest - bottom))
    costs = [row.cost[axis] for row in known] or [0.0, 1.0]
    span = max(costs) - min(costs) or 1.0
    axes.set_xlim(min(costs) - 0.4 * span, max(costs) + 0.05 * span)
    axes.set_xticks([tick for tick in axes.get_xticks() if tick >= 0 and tick <= max(costs) + 0.05 * span])
    axes.set_xlim(min(costs) - 0.4 * span, max(costs) + 0.05 * span)
    axes.grid(alpha=0.25)


def _name(axes: Any, rows: Sequence[Standing], axis: str) -> None:
    """Labels above and to the left of the points, where a front has nothing; the higher, the more of them there are."""
    taken: list[tuple[float, float, float]] = []
    rows = [row for row in rows if axis in row.cost and not math.isnan(row.relative)]
    if not rows:
        return
    points = axes.transData.transform([(row.cost[axis], row.relative) for row in rows])
    for row, (x, y) in sorted(zip(rows, points, strict=True), key=lambda pair: (-pair[1][0], pair[1][1])):
        text, up = label(row), 5.0
        left = x - 5.5 * len(text)
        while any(left < right and x > first and abs(y + up - height) < 12 for first, right, height in taken):
            up += 2
        taken.append((left, x, y + up))
        axes.annotate(
            text, (row.cost[axis], row.relative), xytext=(-5, up * 72 / axes.figure.dpi), textcoords="offset points",
            fontsize=7, ha="right", zorder=5,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5} if up > 12 else None,
        )  # fmt: skip


def label(row: Standing) -> str:
    """A short name of a plan."""
    text = row.method if row.keep is None else row.plan if "{" in row.method else f"{row.method} {keep_text(row.keep)}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
