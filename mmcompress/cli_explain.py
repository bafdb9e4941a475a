# SPDX-License-Identifier: Apache-2.0
"""`mmcompress explain`: what the model looked at and what was kept, as a page and pictures."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from .assets import MODELS
from .eval.cli import Command, Load, OpenImage, OutFolder, add_load_options, check_least

NAMES = ("token-activation-map", "attention-rollout", "last-layer-attention", "gradient-relevance", "grad-cam")
"""What `--method` takes, in the order of `mmcompress.explain.EXPLANATIONS`."""
FRAMES = Path()
"""What --video without a file stands for."""
MOST = 16
"""Frames of a video where nothing says how many."""
WORDS, GRADIENTS = "token-activation-map", "gradient-relevance"
"""The map of words; and what stands beside it wherever a backward pass is affordable."""


def add(command: Command, load: Load, open_image: OpenImage) -> None:
    """Put the subcommand among the others; `load` makes model and processor of the options, `open_image` a picture of a path."""
    explain = command(
        "explain",
        lambda options, console: run(options, console, load, open_image),
        "show what a model looked at and which tokens were kept: an HTML page and pictures",
    )
    explain.add_argument("model", help=f"folder or hub name of a supported checkpoint, or one of {', '.join(MODELS)}")
    explain.add_argument("--image", type=Path, action="append", default=[], help="picture; may be given several times")
    explain.add_argument(
        "--video", type=Path, nargs="?", const=FRAMES, metavar="FILE",
        help="a video (needs the extra 'video'); without FILE, the pictures are the frames of one, in order",
    )  # fmt: skip
    explain.add_argument("--frames", type=int, metavar="N", help=f"exactly so many of FILE (default: at most {MOST})")
    explain.add_argument("--question", required=True)
    explain.add_argument("--plan", help="also with this compression, side by side: e.g. 'divprune(keep=0.25)'")
    explain.add_argument(
        "--method", action="append", choices=NAMES,
        help=f"explanation; several allowed (default {WORDS}, and {GRADIENTS} where a backward pass is affordable)",
    )  # fmt: skip
    explain.add_argument("--no-gradients", action="store_true", help=f"leave {GRADIENTS} out of the default")
    explain.add_argument(
        "--same-answer",
        action="store_true",
        help="make the compressed model read the stock model's answer: the same words side by side (default: its own answer)",
    )
    explain.add_argument("--max-new-tokens", type=int, default=64)
    explain.add_argument("--out", type=OutFolder, default="explain_output", help="folder for the page and the pictures")
    add_load_options(explain)


def run(options: argparse.Namespace, console: Console, load: Load, open_image: OpenImage) -> None:
    """Explain, write, and say where the page is."""
    from .eval.prompts import unknown_words
    from .plan import as_pipeline
    from .visualize import faithfulness, write_all
    from .visualize.figure import cannot_draw
    from .visualize.page import need_jinja2

    check_least(options, max_new_tokens=1)
    need_jinja2()
    pictures = visuals_of(options, open_image)
    plan = as_pipeline(options.plan) if options.plan else None
    model, processor, _ = load(options)
    methods = options.method or ([WORDS] if options.no_gradients else None)
    unknown = unknown_words(processor, [options.question])
    notes = [unknown] if unknown else []
    how = {"video": options.video is not None, "max_new_tokens": options.max_new_tokens}
    found = explained(
        model, processor, pictures, options.question, plan, methods, options.same_answer, notes.append, **how
    )
    paths = write_all(found, options.out, about=options.model, notes=notes)
    lines = [f"{plan or 'stock model'}: {answer}" for plan, answer in {one.plan: one.answer for one in found}.items()]
    lines += [f"{method}: {text}" for method, text in faithfulness(found).items()]
    if plan is None:
        notes.append("no --plan: nothing was dropped; with one the page opens with what was kept, merged and dropped")
    lines += [f"note: {note}" for note in notes]
    beside = cannot_draw() or f"and {len(paths) - 1} pictures beside it"
    lines.append(f"page: {paths[0].resolve().as_uri()}  ({beside})")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def visuals_of(options: argparse.Namespace, open_image: OpenImage) -> Any:
    """Pictures, or the frames of a video."""
    from .videos import read_video

    path = options.video if options.video != FRAMES else None
    if bool(path) == bool(options.image):
        raise ValueError("give --image, --video FILE, or --video with the frames as --image")
    if options.frames is not None and not path:
        raise ValueError(f"--frames {options.frames} chooses frames of a file: give --video FILE")
    if path:
        most = MOST if options.frames is None else None
        return read_video(path, options.frames, most=most, name=f"--video {path}")
    return [open_image(one) for one in options.image]


def explained(
    model: Any,
    processor: Any,
    pictures: Any,
    question: str,
    plan: Any = None,
    methods: Any = None,
    same_answer: bool = False,
    say: Callable[[str], object] = str,
    **how: Any,
) -> list[Any]:
    """Explanations of the stock model, then of the compressed one, by each method. Each explains its own
    answer; with `same_answer` the compressed one reads the stock model's, so that the words are the same.

    methods  names of `NAMES`. None: the map of words, and beside it gradient relevance wherever the model allows it and it is
             affordable (`mmcompress.explain.unaffordable`); `say` is told where it is left out, and why.
    """
    from .api import compressed

    def ask(answer: list[int] | None) -> list[Any]:
        return _explained(model, processor, pictures, question, methods, say, answer, **how)

    found = ask(None)
    if plan is None:
        return found
    with compressed(model, plan):
        return [*found, *ask(found[0].answer_ids if same_answer else None)]


def _explained(
    model: Any,
    processor: Any,
    pictures: Any,
    question: str,
    methods: Sequence[str] | None,
    say: Callable[[str], object],
    answer: list[int] | None,
    **how: Any,
) -> list[Any]:
    """Explanations of one answer, the model's own or the one given."""
    from torch import OutOfMemoryError

    from .explain import EXPLANATIONS, unaffordable

    functions = dict(zip(NAMES, EXPLANATIONS.values(), strict=True))
    first, *others = methods or [WORDS]
    found = [functions[first](model, processor, pictures, question, answer=answer, **how)]
    how["answer"] = found[0].answer_ids
    found += [functions[name](model, processor, pictures, question, **how) for name in others]
    if methods is None:
        why = unaffordable(model, found[0].layers[0] + len(how["answer"]))
        try:
            found += [] if why else [functions[GRADIENTS](model, processor, pictures, question, **how)]
        except (NotImplementedError, OutOfMemoryError) as error:
            why = str(error).splitlines()[0]
        if why:
            say(f"{found[0].plan or 'stock model'} without gradient relevance: {why}")
    return found
