# SPDX-License-Identifier: Apache-2.0
"""The plots of sweeps: what is retained against FLOPs, time to the first token and KV cache."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...budget import keep_text
from ...visualize.figure import new_figure, written
from ..evaluator import STOCK
from .retained import AXES, FLOORS, Standing, front

FEW = 8
"""Up to so many methods have a colour each; of more all that act in the same place share one, and the legend lists them."""
LONGEST = 30
"""Letters of a label."""
MARKS = {"keyframes": "^", "downsample": "v", "uniform": "P", "random": "X"}
"""Of the floors."""
ROOM = 30.0
"""Percent above 100, for labels."""


@dataclass(frozen=True)
class Family:
    """Points that look alike. methods: all of them by name."""

    name: str
    colour: Any
    marker: str = "o"
    methods: tuple[str, ...] = ()

    @property
    def legend(self) -> str:
        if self.methods == (self.name,):
            return f"{self.name} (floor)" if self.name in FLOORS else self.name
        return textwrap.fill(f"{self.name}: {', '.join(self.methods)}", 150, subsequent_indent="    ")


def plot(models: Mapping[str, Sequence[Standing]], title: str, path: Path) -> Path:
    """Write one picture with a row for each model and a plot for each cost that was measured; needs matplotlib (`pip install
    mmcompress[viz]`).

    A black line joins the plans that no other one beats at the same or a lower cost; they have their names. The legend names all
    methods; stock and floors have marks of their own. Bars are one standard error. Both axes begin at 0.
    """
    known = [axis for axis in AXES if any(axis in row.cost for rows in models.values() for row in rows)]
    from matplotlib import colormaps

    found = families([row for rows in models.values() for row in rows], colormaps["tab10"].colors)  # type: ignore[attr-defined]
    shown = list(dict.fromkeys(found.values()))
    lines = sum(one.legend.count("\n") + 1 for one in shown)
    figure = new_figure(16, 1.2 + 4.4 * len(models) + 0.18 * lines, title, dpi=90)
    grid = figure.subplots(len(models), len(known), squeeze=False)
    for line, (model, rows) in zip(grid, models.items(), strict=True):
        for axes, axis in zip(line, known, strict=True):
            _panel(axes, rows, axis, found)
            axes.set_xlabel(AXES[axis][0])
            axes.set_title(model, fontsize=10, parse_math=False)
        line[0].set_ylabel("RelAcc, % of the stock model")
    columns = 1 if any(len(one.methods) > 1 for one in shown) else min(6, len(shown) + 2)
    figure.legend(
        handles=_handles(shown), loc="outside lower center", ncols=columns, fontsize=8, frameon=False, alignment="left"
    )
    figure.draw_without_rendering()  # only now the places of points on the page are known
    for line, rows in zip(grid, models.values(), strict=True):
        for axes, axis in zip(line, known, strict=True):
            _name(axes, front(rows, axis), axis)
    return written(figure, path)


def families(rows: Sequence[Standing], palette: Sequence[Any]) -> dict[str, Family]:
    """How the points of each method look: floors by their marks, the others each in a colour, or by where they act."""
    names = {row.family: row.acts for row in rows if row.plan != STOCK}
    methods = [name for name in names if name not in FLOORS]
    places = dict.fromkeys(names[name] for name in methods)
    found = {name: Family(name, "0.25", MARKS[name], (name,)) for name in names if name in FLOORS}
    if len(methods) <= FEW:
        return {name: Family(name, palette[i], "o", (name,)) for i, name in enumerate(methods)} | found
    for colour, place in zip(palette, places, strict=False):
        mine = tuple(sorted(name for name in methods if names[name] == place))
        found |= dict.fromkeys(mine, Family(place, colour, "o", mine))
    return found


def _handles(shown: Sequence[Family]) -> list[Any]:
    from matplotlib.lines import Line2D

    stock = Line2D([], [], color="black", marker="*", markersize=12, linestyle="", label="stock model")
    line = Line2D([], [], color="black", linewidth=1, label="the front: nothing is better at the same or a lower cost")
    return [
        stock, line,
        *(Line2D([], [], color=one.colour, marker=one.marker, linestyle="", label=one.legend) for one in shown),
    ]  # fmt: skip


def _panel(axes: Any, rows: Sequence[Standing], axis: str, found: Mapping[str, Family]) -> None:
    known = [row for row in rows if axis in row.cost and not math.isnan(row.relative)]
    best = front(known, axis)
    for row in known:
        if row.plan == STOCK:
            axes.plot(row.cost[axis], row.relative, marker="*", markersize=13, color="black", zorder=4)
            continue
        look, on = found[row.family], row in best
        axes.errorbar(
            row.cost[axis], row.relative, row.error if on else None, marker=look.marker, elinewidth=0.8, color=look.colour,
            markersize=7 if on or row.family in FLOORS else 5, zorder=3 if on else 2 if row.family in FLOORS else 1,
            alpha=1.0 if on or row.family in FLOORS else 0.65, markeredgewidth=0,
        )  # fmt: skip
    axes.plot([row.cost[axis] for row in best], [row.relative for row in best], color="black", linewidth=1, zorder=2)
    highest = max((row.relative for row in known), default=100.0)
    axes.set_ylim(0, max(100.0, highest) + ROOM)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlim(0, 1.05 * max((row.cost[axis] for row in known), default=1.0))
    axes.grid(alpha=0.25)


def _name(axes: Any, rows: Sequence[Standing], axis: str) -> None:
    """Labels of a front above its points, to the left where there is room, each clear of those before."""
    taken: list[tuple[float, float, float]] = []
    edge = axes.get_window_extent()
    points = axes.transData.transform([(row.cost[axis], row.relative) for row in rows]) if rows else ()
    for row, (x, y) in sorted(zip(rows, points, strict=True), key=lambda pair: (-pair[1][0], pair[1][1])):
        text, up = label(row), 6.0
        width = 5.3 * len(text)
        left = x - width - 5 if x - width - 5 > edge.x0 + 4 else x + 6
        while any(
            left < right and left + width > first and abs(y + up - height) < 12 for first, right, height in taken
        ):
            up += 2
        taken.append((left, left + width, y + up))
        scale = 72 / axes.figure.dpi
        axes.annotate(
            text, (row.cost[axis], row.relative), xytext=((left - x) * scale, up * scale), textcoords="offset points",
            fontsize=7, ha="left", zorder=5, parse_math=False,
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5} if up > 12 else None,
            bbox={"boxstyle": "square,pad=0.05", "facecolor": "white", "edgecolor": "none", "alpha": 0.7},
        )  # fmt: skip


def label(row: Standing) -> str:
    """A short name of a plan."""
    text = row.method if row.keep is None else row.plan if "{" in row.method else f"{row.method} {keep_text(row.keep)}"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
