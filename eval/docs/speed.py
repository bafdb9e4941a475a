# SPDX-License-Identifier: Apache-2.0
"""The tables of docs that `mmcompress bench real`, `peers`, `overhead`, `video` and `mass` fill."""

from __future__ import annotations

from typing import Any

from ...runtime.mass import ways
from ..cost.film import HEADINGS, SHARE, added, cells
from ..cost.overhead import Overhead
from ..cost.peers import LEVEL
from .markdown import NOT_YET, conditions, table


def real(record: dict[str, Any] | None) -> str:
    """Released shapes: a line for each plan of each run."""
    if not record:
        return NOT_YET
    body = []
    for run in record["runs"]:
        cut = "" if run["layers"] == run["layers_released"] else f" of {run['layers_released']}"
        name = f"{run['model']}, {run['dtype']}, {run['layers']}{cut} layers"
        for row in run["rows"]:
            times = row["milliseconds"]
            stock = row["plan"] == "stock"
            body.append(
                [
                    name, "stock" if stock else f"`{row['plan']}`", f"{times['ttft']['median'] / 1000:.1f}",
                    f"{row['speedup']:.2f}x", f"{1 / row['flops_ratio']:.2f}x", f"{row['reached']:.0%}",
                    f"{times['decode']['median']:.0f}", f"{row['peak_bytes'] / 2**30:.1f}" if row["peak_bytes"] else "-",
                ]
            )  # fmt: skip
            name = ""
    first = record["runs"][0]
    headings = ["model", "plan", "first token s", "speed-up", "FLOPs ratio", "reached", "decode ms", "peak GiB"]
    return (
        "Released shapes with random weights, one picture and 40 text tokens, batch 1, sdpa; medians of interleaved rounds "
        f"({', '.join(str(run['repeats']) for run in record['runs'])}). Reached: measured speed-up over the FLOPs ratio, "
        f"vision included.\n\n{table(headings, body)}\n\nShown by `mmcompress bench real NAME --out results/real.json` "
        f"({conditions(first)})."
    )


def peers(record: dict[str, Any] | None) -> str:
    """How many times as fast as plain PyTorch each selection is with one thread, by size; slower ones in bold."""
    if not record:
        return NOT_YET
    raced = [row for row in record["rows"] if row["ratio"] is not None and row["threads"] == 1]
    sizes = list(dict.fromkeys((row["n"], row["d"]) for row in raced))
    found = {(row["name"], row["peer"], row["n"], row["d"]): row["ratio"] for row in raced}

    def cell(name: str, peer: str, size: tuple[int, int]) -> str:
        ratio = found.get((name, peer, *size))
        if ratio is None:
            return "-"
        shown = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
        return f"**{shown}**" if ratio < LEVEL else shown

    lines = dict.fromkeys((row["name"], row["peer"]) for row in raced)
    body = [[f"`{name}`", peer, *(cell(name, peer, size) for size in sizes)] for name, peer in lines]
    slower = [row for row in raced if row["ratio"] < LEVEL]
    lost = f"{len(slower)} of {len(raced)} races are below {LEVEL}x (bold)." if slower else f"None is below {LEVEL}x."
    return (
        "Times as fast as plain PyTorch, selection and making of the output tokens, one thread, process time, medians of "
        f"interleaved rounds; a tenth of N tokens of width D is kept. {lost}\n\n"
        f"{table(['selection', 'against', *(f'{n} x {d}' for n, d in sizes)], body)}\n\nShown by `mmcompress bench peers` "
        f"({conditions(record)})."
    )


def overhead(record: dict[str, Any] | None) -> str:
    """What plans add to a prefill where there is next to nothing to compute: a line for each plan on each model."""
    if not record:
        return NOT_YET
    about = record["overhead"]
    rows = (Overhead(**row).cells() for row in about["rows"])
    shown = table(Overhead.HEADINGS, [[model, f"`{plan}`", *rest] for model, plan, *rest in rows], ("plan",))
    return (
        f"The embedded models with {about['layers']} layers and random weights, batch 1. ATen calls on the CPU, views included, "
        f"beyond those of stock; processor time of one thread in the engine's hooks, of which the last column is the "
        f"method's own choice: medians of {about['repeats']} prefills, ± half the width of the middle half.\n\n{shown}\n\n"
        f"Shown by `mmcompress bench overhead --out results/overhead.json` ({conditions(about)})."
    )


def film(record: dict[str, Any] | None) -> str:
    """What methods cost on a long video."""
    if not record:
        return NOT_YET
    stock, about, rows = record["stock"], record["conditions"], record["rows"]
    body = [
        [cell if at or row is stock else f"`{cell}`" for at, cell in enumerate(cells(row, stock))]
        for row in (stock, *rows)
    ]
    dear = [row["plan"] for row in rows if "refused" not in row and row["select_ms"] > SHARE * row["saved_ms"]]
    most = added(stock)
    more = [row["plan"] for row in rows if most is not None and (added(row) or 0.0) > most]

    def named(plans: list[str]) -> str:
        return ", ".join(f"`{plan}`" for plan in plans) or "none"

    how = (
        f"{about['tokens']:,} visual tokens of 40 frames in a mid-size random Qwen2.5-VL, float32, batch 1. Decode: of the file, "
        "and cutting into patches; signals: what the vision encoder takes longer for them; TTFT: the sum; of saved: selection, "
        "part of what the plan saves of the prefill; peak: MiB that a prefill adds in a smaller model with as many tokens, "
        "a process each."
    )
    weighed = sum(added(row) is not None for row in rows)
    verdict = f"Selections above {SHARE:.0%} of what they save: {named(dear)}."
    verdict += f" Peak above that of stock, of {weighed} plans weighed: {named(more)}."
    command = "`mmcompress bench video --out results/video_cost.json`"
    later = sorted({row["commit"] for row in rows} - {about["machine"]["commit"]})
    where = conditions(about) + (f"; some rows {', '.join(later)}" if later else "")
    return f"{how}\n\n{table(list(HEADINGS), body)}\n\n{verdict} Shown by {command} ({where})."


def masses(record: dict[str, Any] | None) -> str:
    """What each way of adding masses costs, by family of models and attention implementation, and which is the default."""
    if not record:
        return NOT_YET
    record = record["mass"]
    body = []
    for row in record["rows"]:
        if row["prefill_percent"] is None:
            continue
        family, attention, way = row.get("family", "llava"), row["attention"], row["way"]
        light = next(
            one for one in record["rows"]
            if (one.get("family", "llava"), one["attention"], one["way"]) == (family, attention, "none")
        )  # fmt: skip
        spreads = [100 * light[f"{part}_iqr_ms"] / light[f"{part}_ms"] for part in ("prefill", "decode")]
        added = [
            f"{row[f'{part}_percent']:+.1f} % (± {spread / 2:.0f})"
            for part, spread in zip(("prefill", "decode"), spreads, strict=True)
        ]
        body.append([family, attention, way, *added, "yes" if ways(attention)[0] == way else ""])
    shown = table(
        ["family", "attention", "way", "prefill", "decode step", "default"], body, ("attention", "way", "default")
    )
    return (
        f"What masses add to the mid-size models with `{record['plan']}`, {record['dtype']}, batch 1: medians of "
        f"{record['repeats']} interleaved rounds, each beside the same plan without masses; in brackets half the width of the "
        f"middle half of the rounds without.\n\n{shown}\n\nShown by `mmcompress bench mass` ({conditions(record)})."
    )
