# SPDX-License-Identifier: Apache-2.0
"""`mmcompress methods`: all methods at a glance, or one of them whole."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress methods voronoi"
PLACES = {
    "pixel": "before the vision encoder, on pixels", "encoder": "inside the vision encoder", "input": "before the LLM",
    "layer": "inside the LLM", "exit": "inside the LLM, all or nothing", "attention": "on attention in the LLM, drops nothing",
    "recipe": "several methods in a row",
}  # fmt: skip
"""Kinds of methods, in words, in the order in which a token meets them."""


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="this method with its options and all that is said of it"
    )


def run(options: argparse.Namespace, console: Console) -> None:
    """Print the list, or what one method says of itself."""
    from ..catalog import listed

    known = listed()
    if options.name is not None:
        _one(options.name, console)
        return
    for kind, place in PLACES.items():
        found = {name: about for name, about in known.items() if about["kind"] == kind}
        if found:
            console.print(f"[bold]{place}[/bold]")
        for name, about in found.items():
            _entry(name, about, console)
    console.print(
        "`mmcompress methods NAME` has options and details; `mmcompress sweep MODEL --plan all` measures them"
    )


def _entry(name: str, about: dict[str, Any], console: Console) -> None:
    """Two lines and more: name with paper, idea."""
    shown = f"  {name:<24}{about['paper'] or 'baseline'}"
    lines = textwrap.wrap(about["idea"], max(20, console.width - 4), break_long_words=False)
    console.print("\n".join([shown, *(f"    {line}" for line in lines)]), markup=False, highlight=False)


def _one(name: str, console: Console) -> None:
    """All of one method."""
    import inspect

    from ..plan import known_method

    cls = known_method(name)
    defaults = ", ".join(f"{field.name}={field.default!r}" for field in cls.fields() if field.name != "on")
    lines = [f"{name}({defaults})", f"acts {PLACES[cls.kind]}; {cls.paper or 'a baseline, no paper'}", ""]
    console.print("\n".join([*lines, inspect.cleandoc(cls.__doc__ or "")]), markup=False, highlight=False)
    console.print(
        f"\nEvery method has on=('image', 'video'): what it acts on.\nuse it: mmcompress.compress(model, '{name}')",
        markup=False,
        highlight=False,
    )
