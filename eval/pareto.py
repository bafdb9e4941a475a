# SPDX-License-Identifier: Apache-2.0
"""The plots of a sweep: what is retained against FLOPs, time to the first token and KV cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from .evaluator import STOCK
from .retained import AXES, Standing, front

MARKERS = "osD^vP*X<>hpd8"


def plot(rows: Sequence[Standing], title: str, path: Path) -> Path:
    """Write one picture with a plot for each cost; needs matplotlib (`pip install mmcompress[viz]`). A line joins what no plan
    beats at its cost; bars are one standard error."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'mmcompress[viz]'") from error
    figure = Figure(figsize=(15, 5.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    colors = colormaps["tab20"].colors  # type: ignore[attr-defined]
    names = list(dict.fromkeys(row.method for row in rows if row.plan != STOCK))
    for axes, (axis, (label, _)) in zip(figure.subplots(1, len(AXES)), AXES.items(), strict=True):
        for number, name in enumerate(names):
            mine = [row for row in rows if row.method == name and axis in row.cost and not math.isnan(row.relative)]
            mine.sort(key=lambda row: row.cost[axis])
            axes.errorbar(
                [row.cost[axis] for row in mine], [row.relative for row in mine], [row.error for row in mine],
                marker=MARKERS[number % len(MARKERS)], color=colors[number % len(colors)], label=name, linestyle=":", linewidth=0.8,
                elinewidth=0.8, markersize=5,
            )  # fmt: skip
        for row in rows:
            if row.plan == STOCK and axis in row.cost:
                axes.plot(
                    row.cost[axis], row.relative, marker="*", markersize=14, color="black", label=STOCK, linestyle=""
                )
        best = front(rows, axis)
        axes.plot(
            [row.cost[axis] for row in best], [row.relative for row in best], color="black", linewidth=1.2, zorder=1
        )
        axes.set_xlabel(label)
        axes.set_ylabel("RelAcc, % of the stock model")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
