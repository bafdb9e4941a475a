# SPDX-License-Identifier: Apache-2.0
"""A figure of a record of `mmcompress bench kernels`: time against N, one panel per operation, one line per provider."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...visualize.figure import new_figure, written
from ..machine import threads
from .measure import Row, digits
from .operations import OPERATIONS

COLORS = {"naive": "#888888", "compile": "#e69f00", "blocked": "#0072b2", "triton": "#009e73"}
MARKERS = {"naive": "o", "compile": "s", "blocked": "D", "triton": "^"}


def slice_of(rows: Sequence[Row], op: str) -> list[Row]:
    """The measured rows of an operation at the (D, k, type) of which there are most, of equals the widest; N rising."""
    mine = [row for row in rows if row.op == op and row.q50_ms is not None]
    counts = Counter((row.d, row.k, row.dtype) for row in mine)
    if not counts:
        return []
    best = max(counts, key=lambda key: (counts[key], key[0], key[1], key[2] == "float32"))
    return sorted((row for row in mine if (row.d, row.k, row.dtype) == best), key=lambda row: row.n)


def plot(rows: Sequence[Row], path: Path) -> Path:
    """Write the figure; rows of one device. Bands: quantiles 0.2 to 0.8. Dotted: what the device would allow."""
    if len(devices := sorted({row.device for row in rows})) > 1:
        raise ValueError(f"a plot shows one device, the record has {', '.join(devices)}")
    panels = {op: found for op in OPERATIONS if (found := slice_of(rows, op))}
    if not panels:
        raise ValueError("nothing was measured that could be drawn")
    across = min(4, len(panels))
    down = -(-len(panels) // across)
    figure = new_figure(3.4 * across, 2.8 * down + 0.8, dpi=130)
    axes = figure.subplots(down, across, squeeze=False).flatten()
    handles = {}
    for axis, (op, found) in zip(axes, panels.items(), strict=False):
        for name in dict.fromkeys(row.provider for row in found):
            line = [row for row in found if row.provider == name]
            kind = name.partition("@")[0]
            n, times = [row.n for row in line], [row.q50_ms for row in line]
            handles[name] = axis.plot(
                n, times, color=COLORS[kind], marker=MARKERS[kind], markersize=4, linestyle="--" if "@" in name else "-"
            )[0]
            axis.fill_between(n, [r.q20_ms for r in line], [r.q80_ms for r in line], color=COLORS[kind], alpha=0.15)
        bound = {row.n: row.roofline * row.q50_ms for row in found if row.roofline and row.q50_ms}
        handles["bound"] = axis.plot(list(bound), list(bound.values()), color="black", linestyle=":", linewidth=1)[0]
        first, ticks = found[0], sorted({row.n for row in found})
        named = ([f"D {first.d}"] if OPERATIONS[op].d is None else []) + (
            [f"k {first.k}"] if OPERATIONS[op].k is None else []
        )
        axis.set(xscale="log", yscale="log")
        axis.set_title(", ".join([op, *named]), fontsize=9)
        axis.set_xticks(ticks, [str(n) for n in ticks], fontsize=7)
        axis.set_xticks([], minor=True)
        axis.yaxis.set_major_formatter(lambda value, _: digits(value))
        axis.tick_params(axis="y", labelsize=7)
        axis.grid(True, alpha=0.3, linewidth=0.5)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    one = next(iter(panels.values()))[0]
    types = "/".join(sorted({found[0].dtype for found in panels.values()}))
    where = f"{one.device}, {threads(one.threads)}, {types}, torch {one.torch}, commit {one.commit}"
    figure.suptitle(f"milliseconds against number of tokens N ({where})", fontsize=9)
    labels = ["what the device would allow" if name == "bound" else name for name in handles]
    figure.legend(
        list(handles.values()), labels, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )
    return written(figure, path)
