# SPDX-License-Identifier: Apache-2.0
"""The commands that measure: `mmcompress bench`, `eval`, `compare`, `sweep` and `tune`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[[str, Any, str], argparse.ArgumentParser]
"""Adds a subcommand: its name, what it runs with options and console, and its description."""
Load = Callable[[argparse.Namespace], "tuple[Any, Any, str]"]
"""Model, processor and device of the options: `model`, and those of `add_load_options`."""
OpenImage = Callable[[Path], Any]
"""A picture, or an error that a user understands."""


def add_load_options(parser: argparse.ArgumentParser) -> None:
    """Where and in which type a checkpoint is loaded."""
    parser.add_argument("--device", default=None, help="default: cuda where there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
