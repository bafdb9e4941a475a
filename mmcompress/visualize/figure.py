# SPDX-License-Identifier: Apache-2.0
"""Figures of matplotlib, without its global state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..records import replacing


def need_matplotlib() -> tuple[Any, Any]:
    """Its classes Figure and FigureCanvasAgg, or an error that says how to get it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "these pictures need matplotlib: pip install 'mmcompress[viz]' (the HTML page is drawn without it)"
        ) from error
    return Figure, FigureCanvasAgg


def cannot_draw() -> str:
    """Why no pictures can be drawn; nothing if they can."""
    try:
        need_matplotlib()
    except ImportError as error:
        return str(error)
    return ""


def new_figure(width: float, height: float, title: str = "", dpi: int = 110) -> Any:
    """An empty figure of so many inches. Text of the user is never read as a formula."""
    figure_class, canvas_class = need_matplotlib()
    figure = figure_class(figsize=(width, height), dpi=dpi, layout="constrained")
    canvas_class(figure)
    if title:
        figure.suptitle(title, fontsize=13, parse_math=False)
    return figure


def show_picture(axis: Any, picture: Any, above: str = "", below: str = "", colour: str = "#333333") -> None:
    """A picture with a line above and one below it."""
    import numpy as np

    axis.set_axis_off()
    axis.imshow(np.asarray(picture))
    axis.set_title(above, fontsize=9, parse_math=False)
    axis.text(
        0.5, -0.03, below, transform=axis.transAxes, ha="center", va="top", fontsize=9, color=colour, parse_math=False
    )  # fmt: skip


def written(figure: Any, path: Path) -> Path:
    """Write a figure in one step, of the kind that the name says."""
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.removeprefix(".") or None)
    return path
