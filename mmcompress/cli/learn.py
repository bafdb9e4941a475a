# SPDX-License-Identifier: Apache-2.0
"""`mmcompress learn`: trains what methods learn."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..assets import MODELS, checkpoint
from .common import Model, OutFolder

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress learn dyvte llava-shapes"
METHODS = ("dyvte", "tokenflex", "p_mod", "gamma_mod")


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("method", choices=METHODS, help="exit routers, flexible projector, or mixtures of depths")
    parser.add_argument("model", type=Model, help=f"folder or hub name of a checkpoint, or one of {', '.join(MODELS)}")
    parser.add_argument(
        "--out", type=OutFolder, help="folder (default: runs/METHOD-MODEL); the weights go into its folder weights"
    )
    parser.add_argument("--steps", type=int, help="steps of training (default: by method)")
    parser.add_argument("--batch", type=int, help="pictures per step (default: by method)")
    parser.add_argument("--rate", type=float, help="learning rate (default: by method)")
    parser.add_argument("--questions", type=int, help="held-out questions at each checkpoint (default 70)")
    parser.add_argument("--save-every", type=int, help="steps between checkpoints (default 100)")
    parser.add_argument("--seed", type=int, help="of weights and pictures (default 0)")
    parser.add_argument("--device", help="where it trains (default: cuda where there is one)")


def run(options: argparse.Namespace, console: Console) -> None:
    """Train, and say how to use what was learned."""
    from ..eval.making.learned import RECIPES, Learning
    from ..eval.synthetic.benchmark import load

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
