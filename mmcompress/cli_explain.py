# SPDX-License-Identifier: Apache-2.0
"""`mmcompress explain`: what the model looked at and what was kept, as a page and pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from .assets import MODELS
from .eval.cli import Command, Load, OpenImage, OutFolder, add_load_options

NAMES = ("token-activation-map", "attention-rollout", "last-layer-attention", "gradient-relevance", "grad-cam")
"""What `--method` takes, in the order of `mmcompress.explain.EXPLANATIONS`."""


def add(command: Command, load: Load, open_image: OpenImage) -> None:
    """Put the subcommand among the others; `load` makes model and processor of the options, `open_image` a picture of a path."""
    explain = command(
        "explain",
        lambda options, console: run(options, console, load, open_image),
        "show what a model looked at and which tokens were kept: an HTML page and pictures",
    )
    explain.add_argument("model", help=f"folder or hub name of a supported checkpoint, or one of {', '.join(MODELS)}")
    explain.add_argument(
        "--image", type=Path, action="append", required=True, help="picture; may be given several times"
    )
    explain.add_argument("--video", action="store_true", help="the pictures are the frames of one video, in order")
    explain.add_argument("--question", required=True)
    explain.add_argument("--plan", help="also with this compression, side by side: e.g. 'visionzip(keep=0.25)'")
    explain.add_argument(
        "--method", action="append", choices=NAMES, help="explanation (default token-activation-map); several allowed"
    )
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
    from .plan import as_pipeline
    from .visualize import write_all
    from .visualize.figure import need_matplotlib

    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens {options.max_new_tokens}: at least 1")
    need_matplotlib()
    pictures = [open_image(path) for path in options.image]
    plan = as_pipeline(options.plan) if options.plan else None
    model, processor, _ = load(options)
    methods = options.method or NAMES[:1]
    how = {"video": options.video, "max_new_tokens": options.max_new_tokens}
    found = explained(model, processor, pictures, options.question, plan, methods, options.same_answer, **how)
    for one in found:
        console.print(
            f"{one.plan or 'stock model'}, {one.method}: {one.answer}", markup=False, highlight=False, soft_wrap=True
        )
    paths = write_all(found, options.out)
    console.print(
        f"page: {paths[0]}  (and {len(paths) - 1} pictures beside it)", markup=False, highlight=False, soft_wrap=True
    )


def explained(
    model: Any,
    processor: Any,
    pictures: list[Any],
    question: str,
    plan: Any = None,
    methods: Any = NAMES[:1],
    same_answer: bool = False,
    **how: Any,
) -> list[Any]:
    """Explanations of the stock model, then of the compressed one, by each method. Each explains its own
    answer; with `same_answer` the compressed one reads the stock model's, so that the words are the same."""
    from .api import compressed
    from .explain import EXPLANATIONS

    functions = [dict(zip(NAMES, EXPLANATIONS.values(), strict=True))[name] for name in methods]
    first = functions[0](model, processor, pictures, question, **how)
    answer = first.answer_ids
    found = [first, *(f(model, processor, pictures, question, answer=answer, **how) for f in functions[1:])]
    if plan is None:
        return found
    with compressed(model, plan):
        if not same_answer:
            one = functions[0](model, processor, pictures, question, **how)
            answer, functions, found = one.answer_ids, functions[1:], [*found, one]
        return [*found, *(f(model, processor, pictures, question, answer=answer, **how) for f in functions)]
