# SPDX-License-Identifier: Apache-2.0
"""`mmcompress explain-train`: trains the compressor of explain_compress."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..assets import MODELS, checkpoint
from .common import Model, OutFolder, check_least

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress explain-train llava-shapes --samples 2000 --out runs/relevance"
MODES = ("exact", "summed", "fast")
"""As `mmcompress.runtime.relevance.MODES`."""


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("model", type=Model, help=f"folder or hub name of a checkpoint, or one of {', '.join(MODELS)}")
    parser.add_argument(
        "--data", type=Path, help="folder or file of questions, as `mmcompress eval` reads it (default: synthetic)"
    )
    parser.add_argument(
        "--images", type=Path, help="folder of the pictures, if they do not lie where the data has them"
    )
    parser.add_argument("--split", help="of Parquet shards and tables")
    parser.add_argument(
        "--task", default="shapes", help="by whose rules answers are judged (default shapes, the synthetic one)"
    )
    parser.add_argument(
        "--out",
        type=OutFolder,
        help="folder (default: runs/explain_compress-MODEL); the weights go into its folder weights",
    )
    parser.add_argument("--samples", type=int, default=10_000, help="questions to ask (default 10000)")
    parser.add_argument("--batch", type=int, default=16, help="questions at a time (default 16)")
    parser.add_argument("--max-new-tokens", type=int, default=None, help="of an answer (default: as the task has it)")
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="exact",
        help="of the relevance that makes the labels (default exact, as published; summed counts every hop once; fast: one "
        "backward pass, approximate)",
    )
    parser.add_argument("--epochs", type=int, default=100, help="most passes over the labels")
    parser.add_argument(
        "--patience", type=int, default=12, help="epochs without improvement before it stops (default 12)"
    )
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--kernel", type=int, default=3, help="width of the net's convolutions, odd")
    parser.add_argument(
        "--scaling", choices=("zscore", "count"), default="zscore", help="of the attention that the net reads"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the net and of the questions that are held out")
    parser.add_argument(
        "--score", type=int, default=350, help="held-out questions for accuracy, 0 for none (default 350)"
    )
    parser.add_argument(
        "--compare", nargs="*", default=["random", "proxy", "oracle"], help="methods to measure beside it"
    )
    parser.add_argument("--device", help="where it trains (default: cuda where there is one)")


def run(options: argparse.Namespace, console: Console) -> None:
    """Train, and say how to use what was learned."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from ..eval.explain_train import Recipe, train
    from ..explain.compressor import KEEPS, Fitting
    from ..plan import as_pipeline

    for name in set(options.compare) - {"learned", "proxy", "oracle"}:
        as_pipeline(f"{name}(keep={KEEPS[0]})")
    check_least(options, epochs=1, patience=1, score=0)
    recipe = Recipe(
        options.task, samples=options.samples, batch=options.batch, new_tokens=options.max_new_tokens, mode=options.mode
    )
    if recipe.task == "shapes" and recipe.new_tokens is None:
        recipe = replace(recipe, new_tokens=8)
    fitting = Fitting(
        options.epochs, rate=options.rate, patience=options.patience, kernel=options.kernel, scaling=options.scaling,
        seed=options.seed,
    )  # fmt: skip
    path = checkpoint(options.model)
    try:
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        processor = AutoProcessor.from_pretrained(path)
    except (OSError, KeyError) as error:
        raise ValueError(f"cannot load {path!r} as an image-text model: {str(error).splitlines()[0]}") from error
    model = model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    out = options.out or Path("runs") / f"explain_compress-{Path(path).name}"
    weights = train(
        model, processor, out, recipe, fitting, options.data, options.images, options.split, options.score,
        options.compare, console,
    )  # fmt: skip
    console.print(
        f"mmcompress.compress(model, 'explain_compress', weights={str(weights)!r})", markup=False, highlight=False
    )
