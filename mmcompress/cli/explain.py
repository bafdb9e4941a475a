# SPDX-License-Identifier: Apache-2.0
"""`mmcompress explain`: what the model looked at and what was kept, as a page and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import common
from .common import OutFolder, Plan, add_load_options, add_model, check_least

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = (
    "mmcompress explain llava-shapes --image a.png --question 'what color is the star ?' --plan 'voronoi(keep=25%)'"
)
FRAMES = Path()
"""What --video without a file stands for."""
MOST = 16
"""Frames of a video where nothing says how many."""
REPEATS = 3
"""Rounds of the clock."""
NAMES = ("token-activation-map", "attention-rollout", "last-layer-attention", "gradient-relevance", "grad-cam")
"""What `--method` takes."""


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    add_model(parser)
    parser.add_argument("--image", type=Path, action="append", default=[], help="picture; may be given several times")
    parser.add_argument(
        "--video", type=Path, nargs="?", const=FRAMES, metavar="FILE",
        help="a video (needs the extra 'video'); without FILE, the pictures are the frames of one, in order",
    )  # fmt: skip
    parser.add_argument("--frames", type=int, metavar="N", help=f"exactly so many of FILE (default: at most {MOST})")
    parser.add_argument("--question", required=True, help="what to ask")
    parser.add_argument(
        "--plan",
        type=Plan,
        help="also with this compression, side by side: e.g. 'divprune(keep=0.25)' (default: stock alone)",
    )
    parser.add_argument(
        "--method", action="append", choices=NAMES,
        help="explanation; several allowed (default token-activation-map, and gradient-relevance where a backward pass is "
        "affordable)",
    )  # fmt: skip
    parser.add_argument("--no-gradients", action="store_true", help="leave gradient-relevance out of the default")
    parser.add_argument(
        "--same-answer",
        action="store_true",
        help="make the compressed model read the stock model's answer: the same words side by side (default: its own answer)",
    )
    parser.add_argument(
        "--word", action="append", default=[], metavar="WORD",
        help="draw maps of this word of answer or question; several allowed (default: the words of the answer)",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument("--out", type=OutFolder, default="explain_output", help="folder for the page and the pictures")
    add_load_options(parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Explain, write, and say where the page is."""
    from ..api import plan_for
    from ..eval.prompts import unknown_words
    from ..explain.beside import WORDS, explained
    from ..plan import as_pipeline
    from ..visualize import faithfulness, headlines, write_all
    from ..visualize.figure import cannot_draw
    from ..visualize.page import need_jinja2

    check_least(options, max_new_tokens=1)
    need_jinja2()
    pictures = visuals_of(options)
    plan = as_pipeline(options.plan) if options.plan else None
    model, processor, _ = common.load(options)
    plan = plan_for(model, options.plan) if plan else None  # a preset is that of the model's family
    methods = options.method or ([WORDS] if options.no_gradients else None)
    unknown = unknown_words(processor, [options.question])
    notes = [unknown] if unknown else []
    how = {"video": options.video is not None, "max_new_tokens": options.max_new_tokens}
    found = explained(
        model, processor, pictures, options.question, plan, methods, options.same_answer, notes.append, **how
    )
    check_words(found, options.word)
    gains = gains_of(model, processor, pictures, options, plan, notes) if plan else {}
    paths = write_all(found, options.out, about=options.model, notes=notes, words=options.word, gains=gains)
    lines = [f"stock model: {found[0].answer}", *(f"{name}: {text}" for name, text in headlines(found, gains) if plan)]
    lines += [f"{method}: {text}" for method, text in faithfulness(found).items()]
    if plan is None:
        notes.append("no --plan: nothing was dropped; with one the page opens with what was kept, merged and dropped")
    lines += [f"note: {note}" for note in notes]
    beside = cannot_draw() or f"and {len(paths) - 1} pictures beside it"
    lines.append(f"page: {paths[0].resolve().as_uri()}  ({beside})")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def check_words(found: Sequence[Any], words: Sequence[str]) -> None:
    """Raises ValueError for a word that no explanation has, with those that there are."""
    for word in words:
        if not any(one.has(word) for one in found):
            try:
                found[-1].find(word)
            except ValueError as error:
                raise ValueError(f"--{error}") from None


def gains_of(
    model: Any, processor: Any, pictures: Any, options: argparse.Namespace, plan: Any, notes: list[str]
) -> dict[str, Any]:
    """What the plan saves of the whole prefill, FLOPs and time here; nothing, and a note, where that would take too long or cannot
    be counted."""
    from ..eval.cost.record import costs
    from ..explain.afford import CPU_PARAMETERS
    from ..explain.prompt import make_prompt
    from ..visualize import Gain

    count = sum(p.numel() for p in model.parameters())
    if model.device.type == "cpu" and count > CPU_PARAMETERS:
        notes.append(
            f"times are not measured: {count / 1e9:.1f} billion parameters on the CPU; mmcompress bench MODEL does"
        )
        return {}
    made = make_prompt(processor, pictures, options.question, options.video is not None)[0]
    try:
        stock, *_, cost = costs(model, made.to(model.device, model.dtype), [repr(plan)], REPEATS, 1, 2)
    except (NotImplementedError, ValueError) as error:
        notes.append(f"time and FLOPs of the whole prefill are not known: {error}")
        return {}
    before, after = (one.times.spread("ttft").median for one in (stock, cost))
    if after > before and cost.flops_ratio < 1:
        notes.append(
            f"no faster here although FLOPs are saved: with {count / 1e6:.1f} M parameters a plan costs more than it saves"
        )
    return {repr(plan): Gain(cost.flops_ratio, (before, after))}


def visuals_of(options: argparse.Namespace) -> Any:
    """Pictures, or the frames of a video."""
    from ..videos import read_video

    path = options.video if options.video != FRAMES else None
    if bool(path) == bool(options.image):
        raise ValueError("give --image, --video FILE, or --video with the frames as --image")
    if options.frames is not None and not path:
        raise ValueError(f"--frames {options.frames} chooses frames of a file: give --video FILE")
    if path:
        most = MOST if options.frames is None else None
        return read_video(path, options.frames, most=most, name=f"--video {path}")
    return [common.open_image(one) for one in options.image]
