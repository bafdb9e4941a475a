# SPDX-License-Identifier: Apache-2.0
"""What a record of `make gpu` shows, in Markdown: a section of docs/speed.md. A dry record shows nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ... import records
from ..cost.masses import MassCost
from ..kernel_bench.measure import digits
from .native import summed

KIND = "`make gpu`"
NONE = "Not measured on a GPU yet: `make gpu` measures all of this in nine minutes and fills this section."
Rows = list[dict[str, Any]]
NAMES = {field.name for field in dataclasses.fields(MassCost)}


def load(path: Path) -> dict[str, Any] | None:
    """The record, None if there is none. Raises RecordError for a dry one, whose numbers are none, and for anything else."""
    found = records.read(path, KIND, lambda v: isinstance(v, dict) and v.get("mmcompress") == "gpu")
    if found is not None and (found["dry"] or any(step["dry"] for step in found["steps"].values())):
        raise records.RecordError(f"{path} is a dry run of {KIND}, which measures nothing: move it away")
    return found


def section(record: dict[str, Any] | None) -> str:
    """The section: one paragraph or table per step that has rows, and what failed."""
    if record is None:
        return NONE
    steps, here = record["steps"], record["machine"]
    parts = [show(steps[name]["rows"]) for name, show in SHOWN.items() if name in steps and steps[name]["rows"]]
    failed = [f"{name}: {one['item']}" for name, step in steps.items() for one in step["failed"]]
    if failed:
        parts.append(f"Failed in this run: {'; '.join(failed)}.")
    versions = f"torch {here['torch']}, triton {here['packages'].get('triton')}, transformers {here['transformers']}"
    parts.append(
        f"Shown by `make gpu` ({here['device']}, driver {here['driver']}, {versions}, commit {here['commit']})."
    )
    return "\n\n".join(parts)


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ms(value: float | None) -> str:
    return "-" if value is None else digits(value)


def device(rows: Rows) -> str:
    for row in rows:
        if "copy_bytes_per_s" in row:
            rates = ", ".join(f"{kind} {rate / 1e12:.0f}" for kind, rate in row["matmul_flops_per_s"].items())
            return f"The device copies {row['copy_bytes_per_s'] / 1e12:.2f} TB/s and multiplies, in TFLOP/s, {rates} (measured)."
    return ""


def native(rows: Rows) -> str:
    found = summed(rows)
    failed = found["failed"] + found["error"]
    return f"Tests of the kernels, natively: {found['passed']} passed, {failed} failed, {found['skipped']} skipped."


def waits(rows: Rows) -> str:
    def count(phase: str) -> str:
        mine = [row for row in rows if row["phase"] == phase and row["plan"] != "stock"]
        return f"{sum(bool(row['allowed']) for row in mine)} of {len(mine)}"

    return (
        f"Of plans on the embedded models, {count('decode')} never wait for the device in a decode step, and {count('prefill')} at "
        f"most once in a prefill (lines of this library, by `torch.cuda.set_sync_debug_mode`)."
    )


def graphs(rows: Rows) -> str:
    kernels, steps = [r for r in rows if "op" in r], [r for r in rows if "plan" in r]
    both = [f"{sum(bool(r['captured'] and r['same_bits']) for r in part)} of {len(part)}" for part in (kernels, steps)]
    return f"As CUDA graphs, bit for bit what a plain run gives: {both[0]} kernels at two sizes, {both[1]} decode steps of plans."


def repeats(rows: Rows) -> str:
    return f"The same inputs gave the same bits in {sum(row['same_bits'] for row in rows)} of {len(rows)} cases."


def blocks(rows: Rows) -> str:
    last = {row["table"]: row for row in rows}
    body = [[f"`{name}`", f"{1 / row['part_of_time']:.2f}x", str(row["tried"])] for name, row in last.items()]
    return f"Block sizes found for this family of GPUs:\n\n{table(['kernel', 'over the defaults', 'tried'], body)}"


def kernels(rows: Rows) -> str:
    body = [
        [
            f"`{r['op']}`", str(r["n"]), str(r["d"]), str(r["k"] or ""), r["dtype"], *(_ms(r[key]) for key in (
                "naive_ms", "blocked_ms", "ms", "device_ms")), f"{100 * r['share']:.0f}%", f"{r['gb_per_s']:.0f}",
            f"{r['tflop_per_s']:.1f}",
        ]
        for r in rows
    ]  # fmt: skip
    headings = [
        "kernel",
        "N",
        "D",
        "k",
        "type",
        "naive ms",
        "blocked ms",
        "ms",
        "on the device",
        "roofline",
        "GB/s",
        "TFLOP/s",
    ]
    return (
        "Kernels, medians; on the device: replayed as a CUDA graph, without launches; roofline: what copy bandwidth or matmul rate "
        f"would allow over that.\n\n{table(headings, body)}"
    )


def selection(rows: Rows) -> str:
    first, same = rows[0], {True: "yes", False: "no"}
    body = [
        [
            f"`{r['stage']}`",
            *map(_ms, (r["ms"], r["naive_ms"], r["ms_each_in_streams"])),
            same[r["same_bits_in_streams"]],
        ]
        for r in rows
    ]
    sizes = f"{first['tokens']:,} tokens of {first['features']:,} features to {first['kept']}, float32"
    headings = ["selection", "ms", "naive twins", f"each of {first['streams']} streams", "same bits"]
    return f"Selections, {sizes}, without their signals:\n\n{table(headings, body)}"


def models(rows: Rows) -> str:
    def spread(row: dict[str, Any], part: str) -> str:
        return digits(row["milliseconds"][part]["median"])

    body = [
        [
            f"{r['model'].partition('/')[2] or r['model']}", str(r["batch"]), r["attention_of_run"], r["label"], spread(r, "ttft"),
            f"{r['speedup']:.2f}x", f"{1 / r['flops_ratio']:.2f}x", spread(r, "vision"), spread(r, "decode"),
            f"{r['kv_bytes'] / 2**20:.0f}", "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.0f}",
        ]
        for r in rows
    ]  # fmt: skip
    headings = [
        "model", "batch", "attention", "plan", "TTFT ms", "speed-up", "FLOPs ratio", "vision ms", "decode ms", "KV MiB", "peak MiB",
    ]  # fmt: skip
    return f"Released shapes with random bf16 weights, interleaved rounds:\n\n{table(headings, body)}"


def mass(rows: Rows) -> str:
    found = {(r["shape"], r["batch"], r["way"]): r["device_ms"] for r in rows if r["what"] == "attention"}
    ways = ("plain", "additive mask", "extra channel")
    cases = dict.fromkeys((shape, batch) for shape, batch, _ in found)
    body = [[shape, str(batch), *(_ms(found.get((shape, batch, way))) for way in ways)] for shape, batch in cases]
    parts = [f"Attention of merged tokens, milliseconds on the device:\n\n{table(['shape', 'batch', *ways], body)}"]
    whole = [
        MassCost(**{k: v for k, v in r.items() if k in NAMES})
        for r in rows
        if r["what"] == "model" and "prefill_ms" in r
    ]
    if whole:
        lines = table(MassCost.HEADINGS, [cost.cells() for cost in whole])
        parts.append(f"A mid-size model with `{next(r['plan'] for r in rows if 'plan' in r)}`:\n\n{lines}")
    return "\n\n".join(parts)


def tome(rows: Rows) -> str:
    body = [
        [
            str(r["pixels"]), str(r["batch"]), str(r["r"]), r["way"], _ms(r["ms"]), f"{r['images_per_s']:.0f}",
            f"{r['over_stock']:.2f}x",
        ]
        for r in rows
    ]  # fmt: skip
    headings = ["pixels", "batch", "r", "ViT-L/14", "ms", "images/s", "over stock"]
    return f"ToMe, beside the official way in plain torch:\n\n{table(headings, body)}"


SHOWN: dict[str, Callable[[Rows], str]] = {
    "device": device, "native": native, "waits": waits, "graphs": graphs, "repeats": repeats, "models": models,
    "selection": selection, "kernels": kernels, "blocks": blocks, "mass": mass, "tome": tome,
}  # fmt: skip
