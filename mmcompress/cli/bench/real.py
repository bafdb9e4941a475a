# SPDX-License-Identifier: Apache-2.0
"""`mmcompress bench real`: what plans cost on released models at their real size."""

from __future__ import annotations

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from ...assets import released
from ...records import read, update
from ..common import check_least
from .model import tables

if TYPE_CHECKING:
    from rich.console import Console

KIND = "`mmcompress bench real`"
ONLY = ("layers", "batch")
"""Options of bench that mean nothing elsewhere."""


def add_options(bench: argparse.ArgumentParser) -> None:
    """The options of `mmcompress bench` that belong to released models."""
    group = bench.add_argument_group(
        "bench real [NAME ...]",
        "released models with random weights (default: five of them); also --attention, --dtype (default bfloat16), --device, "
        "--new-tokens (default 8), --warmup (default 1)",
    )
    group.add_argument("--layers", type=int, help="of the language model (default: all, or as many as fit in memory)")
    group.add_argument("--batch", type=int, help="prompts in a batch (default 1)")


def run(options: argparse.Namespace, console: Console) -> None:
    """Build, count and time one model after the other; the record has what was finished."""
    import torch
    from rich.progress import Progress

    from ...eval.cost import released as real

    names = [name for name in options.what if name != "real"] or list(real.NAMES)
    if unknown := [name for name in names if name not in released()]:
        raise ValueError(f"bench real {unknown[0]}: choose among {', '.join(released())}")
    if given := [name for name in ("image", "question") if getattr(options, name) is not None]:
        raise ValueError(f"--{given[0]} belongs to `mmcompress bench MODEL`")
    dtype = options.dtype or ["bfloat16"]
    if len(dtype) > 1 or dtype[0] not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {' '.join(dtype)}: with released models one of float32, bfloat16, float16")
    check_least(options, repeats=1, warmup=0, new_tokens=2, layers=1, batch=1)
    if options.out:
        read(options.out, KIND, _fits)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    warmup = 1 if options.warmup is None else options.warmup
    for name in names:
        console.print(f"{name} ...", highlight=False, markup=False)
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("building and counting", total=warmup + options.repeats)
            found = real.measure(
                name, options.plan or real.PLANS, batch=options.batch or 1, attention=options.attention or "sdpa",
                dtype=getattr(torch, dtype[0]), device=device, layers=options.layers, repeats=options.repeats, warmup=warmup,
                new_tokens=options.new_tokens or 8, show=partial(_round, progress, bar),
            )  # fmt: skip
        about = found.about
        console.print(tables(found.rows, about)[0])
        cut = "" if about["layers"] == about["layers_released"] else f" of {about['layers_released']}"
        console.print(
            f"random weights, {about['parameters'] / 1e9:.2f} B parameters, {about['layers']}{cut} layers; its config: "
            + about["source"],
            markup=False,
            highlight=False,
        )
        if options.out:
            update(options.out, KIND, partial(_with, found.to_dict()), _fits)
    if options.out:
        console.print(f"record: {options.out}", markup=False, highlight=False)


def _round(progress: Any, bar: Any, done: int) -> None:
    progress.update(bar, completed=done, description="rounds")


def _fits(value: Any) -> bool:
    return isinstance(value, dict) and value.get("mmcompress") == "real" and isinstance(value.get("runs"), list)


def _with(measured: dict[str, Any], record: dict[str, Any] | None) -> dict[str, Any]:
    """The record with a run more, in the place of one of the same conditions."""
    others = [run for run in (record or {}).get("runs", []) if _conditions(run) != _conditions(measured)]
    return {"mmcompress": "real", "format": 1, "runs": [*others, measured]}


def _conditions(run: dict[str, Any]) -> list[Any]:
    return [*(run[key] for key in ("model", "dtype", "attention", "batch", "layers")), run["machine"]["device"]]
