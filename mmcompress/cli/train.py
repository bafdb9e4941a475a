# SPDX-License-Identifier: Apache-2.0
"""`mmcompress train`: makes the embedded models."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..assets import CLIP, MODELS, PAGES, VIDEO
from .common import OutFolder

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress train llava-shapes --out runs/again"


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "model", choices=(*MODELS, CLIP, PAGES, VIDEO), help="all but llava-shapes start from one in the package"
    )
    parser.add_argument("--out", type=OutFolder, help="folder of checkpoints (default: runs/MODEL)")
    parser.add_argument("--device", help="where it trains (default: cuda where there is one)")


def run(options: argparse.Namespace, console: Console) -> None:
    """Train, from where it was if it was stopped."""
    from ..eval.making.clip import ClipTrainer
    from ..eval.making.families import FAMILIES
    from ..eval.making.pages.train import GO_ON, PageTrainer
    from ..eval.making.train import Trainer
    from ..eval.making.transfer import RECIPES, Transfer
    from ..eval.making.videos.train import VideoRecipe, VideoTrainer

    out = options.out or Path("runs") / options.model
    if options.model == CLIP:
        ClipTrainer(out, device=options.device).run()
    elif options.model == PAGES:
        PageTrainer(out, GO_ON, options.device).run()
    elif options.model == VIDEO:
        VideoTrainer(out, VideoRecipe(), options.device).run()
    elif options.model in FAMILIES:
        Transfer(out, FAMILIES[options.model](), RECIPES[options.model], options.device).run()
    else:
        Trainer(out, device=options.device).run()
