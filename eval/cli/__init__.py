# SPDX-License-Identifier: Apache-2.0
"""The commands that measure: `mmcompress bench`, `eval`, `compare`, `sweep` and `tune`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...records import check_output

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


class OutFile(type(Path())):  # type: ignore[misc]
    """The type of an option that names a file to be written; `main` calls `check` before any work."""

    def check(self, option: str) -> None:
        check_output(option, self)


class OutPicture(OutFile):
    """A picture that matplotlib writes, of a kind that it knows."""

    def check(self, option: str) -> None:
        from ...visualize.figure import need_matplotlib

        figure, canvas = need_matplotlib()
        check_output(option, self, kinds=sorted(canvas(figure()).get_supported_filetypes()))


class OutFolder(OutFile):
    """A folder to be written into."""

    def check(self, option: str) -> None:
        check_output(option, self, folder=True)


def check_least(options: argparse.Namespace, **least: int) -> None:
    """Raise ValueError for a number of the options that is below its least value."""
    for name, value in least.items():
        if getattr(options, name) is not None and getattr(options, name) < value:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least {value}")
