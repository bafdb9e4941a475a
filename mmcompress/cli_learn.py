# SPDX-License-Identifier: Apache-2.0
"""`mmcompress learn`: trains what methods learn."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from .assets import MODELS, checkpoint
from .eval.cli import Command, OutFolder

METHODS = ("dyvte", "tokenflex", "p_mod", "gamma_mod")


def add(command: Command) -> None:
    """Put the subcommand among the others."""
    learn = command(
        "learn", run, "train what a method learns for a checkpoint, on the synthetic benchmark (restartable)"
    )
    learn.add_argument("method", choices=METHODS, help="exit routers, flexible projector, or mixtures of depths")
    learn.add_argument("model", help=f"folder or hub name of a supported checkpoint, or one of {', '.join(MODELS)}")
    learn.add_argument(
        "--out", type=OutFolder, help="default: runs/METHOD-MODEL; the weights go into its folder weights"
    )
    learn.add_argument("--steps", type=int, help="default: by method")
    learn.add_argument("--batch", type=int, help="pictures per step; default: by method")
    learn.add_argument("--rate", type=float, help="learning rate; default: by method")
    learn.add_argument("--questions", type=int, help="held-out questions at each checkpoint (default 70)")
    learn.add_argument("--save-every", type=int, help="steps between checkpoints (default 100)")
    learn.add_argument("--seed", type=int)
    learn.add_argument("--device", default=None, help="default: cuda where there is one")


def run(options: argparse.Namespace, console: Console) -> None:
    """Train, and say how to use what was learned."""
    from .demo import load
    from .eval.synthetic.learned import RECIPES, Learning

    given = {
        name: value
        for name in ("steps", "batch", "rate", "questions", "save_every", "seed")
        if (value := getattr(options, name)) is not None
    }
    for name, least in (("steps", 1), ("batch", 1), ("questions", 7), ("save_every", 1)):
        if given.get(name, least) < least:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]}: at least {least}")
    recipe = replace(RECIPES[options.method], **given)
    path = checkpoint(options.model)
    try:
        model, processor = load(path)
    except (OSError, KeyError) as error:
        raise ValueError(f"cannot load {path!r} as an image-text model: {str(error).splitlines()[0]}") from error
    out = options.out or Path("runs") / f"{options.method}-{Path(path).name}"
    weights = Learning(out, model, processor, options.method, recipe, options.device).run()
    if options.method in ("p_mod", "gamma_mod"):
        use = f"mmcompress.convert(model, {options.method!r}, weights={str(weights)!r})"
    else:
        use = f"mmcompress.compress(model, {options.method!r}, weights={str(weights)!r})"
    console.print(use, markup=False, highlight=False)
