# SPDX-License-Identifier: Apache-2.0
"""`mmcompress check`: what one checkpoint can do, before its weights are there."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from ..assets import MODELS
from . import common
from .common import Plan, add_load_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXAMPLE = "mmcompress check Qwen/Qwen3-VL-4B-Instruct"
STAGES = ("input", "layer", "encoder", "pixel", "attention", "exit")


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.description = (parser.description or "") + (
        " Exit status 0 if stages before the language model work, 1 if not, 2 if there is no such checkpoint."
    )
    parser.add_argument("model", help=f"folder, config.json or hub name of a checkpoint, or one of {', '.join(MODELS)}")
    parser.add_argument(
        "--plan",
        type=Plan,
        action="append",
        default=[],
        help="ask about this plan instead of every method; several allowed",
    )
    parser.add_argument("--json", action="store_true", help="everything as JSON, for machines")
    parser.add_argument("--load", action="store_true", help="load the weights too, and compare attention with them")
    add_load_options(parser)


def run(options: argparse.Namespace, console: Console) -> int:
    """Check, and say it; the exit status."""
    import transformers

    from ..check import check, examine

    transformers.logging.set_verbosity_error()
    found = check(options.model, options.plan)
    if options.load and not found.refused:
        found = examine(common.load(options)[0], options.plan, found)
    if options.json:
        print(json.dumps(dataclasses.asdict(found) | {"works": found.works}, indent=1))
    else:
        console.print(_shown(found), markup=False, highlight=False)
    return 0 if found.works else 1


def _shown(found: Any) -> Table:
    from rich.table import Table

    shown = Table.grid(padding=(0, 2))
    shown.add_column(no_wrap=True)
    shown.add_column(overflow="fold")

    def row(label: str, *lines: str) -> None:
        for line in lines:
            shown.add_row(label, line)
            label = ""

    row("model", " ".join(part for part in (found.name, found.model_type, found.model) if part))
    if found.parameters:
        row("size", f"{found.parameters / 1e9:.2f} billion parameters")
    if found.refused:
        row("refused", found.refused)
        return shown
    row("adapter", found.family)
    for kind in STAGES:
        if kind in found.stages:
            reason = found.stages[kind]
            row(f"{kind} stages", "work" if reason == "ok" else f"not: {_reason(reason)}")
    row("signals", ", ".join(found.signals) or "none of the vision encoder")
    row("modalities", ", ".join(found.modalities))
    row("positions", ", ".join(found.positions))
    row("layers", ", ".join(f"{number} {kind}" for kind, number in found.layers.items()))
    row("attention", *found.attention)
    row("tokens", *found.tokens)
    works = [name for name, reason in found.methods.items() if reason is None]
    row("methods", f"{len(works)} of {len(found.methods)} work: {', '.join(works)}")
    reasons = defaultdict(list)
    for name, reason in found.methods.items():
        if reason is not None:
            reasons[_reason(reason)].append(name)
    row("", *(f"not {', '.join(names)}: {reason}" for reason, names in reasons.items()))
    row("note", *found.notes)
    return shown


def _reason(reason: str) -> str:
    """What compress says, less the stage and the number of the layer, so that equal reasons are one."""
    return re.sub(r"of layer \d+ ", "", re.sub(r"^\w+\([^)]*\):? ", "", reason))
