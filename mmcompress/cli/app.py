# SPDX-License-Identifier: Apache-2.0
"""`mmcompress app`: a page to play with."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..assets import MODELS
from . import common
from .common import Model, add_load_options

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress app llava-shapes@8x4 --port 7860"


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.description = (parser.description or "") + " Your own picture, a question, a plan; needs the extra 'app'."
    parser.add_argument(
        "model",
        nargs="?",
        type=Model,
        default=Model(MODELS[0]),
        help=f"folder or hub name of a checkpoint, or one of {', '.join(MODELS)} (default: the first)",
    )
    parser.add_argument("--host", default="127.0.0.1", help="who may open it; 0.0.0.0: everyone in the network")
    parser.add_argument("--port", type=int, help="where it listens (default: the first free one from 7860 on)")
    add_load_options(parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Load, and serve until it is stopped."""
    if find_spec("gradio") is None:
        raise ImportError("the playground needs gradio: pip install 'mmcompress[app]'")
    from ..app import launch
    from ..playground import Playground

    model, processor, _ = common.load(options)
    launch(Playground(model, processor, str(options.model)), options.host, options.port)
