# SPDX-License-Identifier: Apache-2.0
"""`mmcompress demo`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..assets import MODELS, split
from .common import OutFolder, quiet

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress demo --model internvl-shapes"


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.description = (
        parser.description or ""
    ) + " Two minutes on two cores; --full: tables of everything, a quarter of an hour."
    parser.add_argument("--out", type=OutFolder, default="demo_output", help="folder of page, pictures and record")
    parser.add_argument("--questions", type=int, help="how many held-out questions (default: 70; --full: 105)")
    parser.add_argument(
        "--model",
        action="append",
        type=_of_shapes,
        help=f"this one of {', '.join(MODELS)} (default: the first; --full: all, and several may be given, with @8x4 behind it a "
        "copy as wide as real ones)",
    )
    parser.add_argument("--full", action="store_true", help="every model, method and ratio, with pictures")
    parser.add_argument(
        "--objects", type=int, help="with --full: most objects in a scene, 2 to 6 (default: 4, the benchmark)"
    )
    parser.add_argument("--keep", nargs="+", help="with --full: ratios as 0.25 or 25%% (default: 50%% 25%% 10%%)")


def _of_shapes(name: str) -> str:
    if split(name)[0] not in MODELS:
        raise argparse.ArgumentTypeError(f"{name}: choose among {', '.join(MODELS)}")
    return name


def run(options: argparse.Namespace, console: Console) -> None:
    """Check the numbers, and show."""
    from ..budget import read_keep

    names = options.model or MODELS
    full = options.full or bool(options.keep or options.objects) or len(options.model or ()) > 1
    count = (105 if full else 70) if options.questions is None else options.questions
    if count < 7:
        raise ValueError(f"--questions {count}: at least 7, one of each type")
    ratios = [read_keep(keep) for keep in options.keep or ("50%", "25%", "10%")]
    if counts := [keep for keep in ratios if isinstance(keep, int)]:
        raise ValueError(
            f"--keep {counts[0]}: a count, and these models have pictures of other numbers of tokens: give a ratio"
        )
    if not full and split(names[0])[1]:
        raise ValueError(f"--model {names[0]}: the demo widens its model by itself; leave @ out, or give --full")
    quiet()
    if full:
        from ..demo_tables import run as run_full

        run_full(options.out, count, ratios, console, options.objects or 4, names)
    else:
        from ..demo import run as run_first

        run_first(options.out, names[0], count, console)
