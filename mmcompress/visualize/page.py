# SPDX-License-Identifier: Apache-2.0
"""One self-contained HTML page about explanations: no network, nothing beside it."""

from __future__ import annotations

import base64
import functools
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image

from ..explain import Explanation
from ..pictures import to_rgb
from ..records import write_text
from .colours import DIM, GLOW, HEAT, KEPT_EDGE, SEAM, TINT
from .headline import Gain, headlines
from .payload import payload

_LARGEST = 1024
"""Pixels along the longer side of a picture in the page."""


@dataclass(frozen=True)
class Page:
    """A page: `save` it, or let a notebook show it."""

    html: str
    height: int = 900

    def save(self, path: Path | str) -> Path:
        return write_text(path, self.html)

    def _repr_html_(self) -> str:
        """In a frame of its own, so that two pages in one notebook do not meet."""
        inside = html.escape(self.html, quote=True)
        return (
            f'<iframe srcdoc="{inside}" title="mmcompress" sandbox="allow-scripts" '
            f'style="width:100%;height:{self.height}px;border:0"></iframe>'
        )

    def __repr__(self) -> str:
        return f"<page of {len(self.html) // 1024} KiB: save(path) it, or end a notebook cell with it>"


def page(
    found: Sequence[Explanation],
    title: str = "",
    *,
    about: str = "",
    notes: Sequence[str] = (),
    words: Sequence[str] = (),
    gains: Mapping[str, Gain] | None = None,
) -> Page:
    """A page about explanations of the same prompt: stock and compressed models, by one or several methods. It opens with what was
    kept, merged and dropped; then maps of words, and scores; sliders over words, layers and frames; every token's value, place and
    fate; of videos a strip of all frames and curves over time.

    title  default: the question. about: what the line below begins with, such as the model. notes: what else a reader should know.
    words  the first of these that is there is the word whose map is shown at first; else the answer's first.
    gains  by plan: what it saves of the whole prefill, where that was measured. Else FLOPs of the LLM layers are named.
    Raises ImportError without jinja2.
    """
    if not found:
        raise ValueError("no explanation to show: give at least one")
    content = payload(found, embedded, words)
    style = {"heat": HEAT, "glow": GLOW, "dim": DIM, "tint": TINT, "kept": KEPT_EDGE, "seam": SEAM}
    name = title or found[0].question or "visual tokens"
    models = {run["name"]: run for run in reversed(content["runs"])}.values()  # each once
    return Page(
        environment()
        .get_template("page.html")
        .render(
            title=name,
            about=about,
            notes=notes,
            lines=headlines(found, gains),
            gains=gains or {},
            models=list(models)[::-1],
            data=content | {"style": style},
            **_parts(),
        )
    )


def embedded(picture: Image.Image) -> str:
    """A picture as a data URI, made smaller if need be: PNG, or JPEG where that is smaller by far (photographs)."""
    scale = min(1.0, _LARGEST / max(picture.size))
    small = to_rgb(picture).resize([max(1, round(side * scale)) for side in picture.size])  # type: ignore[arg-type]
    files = {}
    for kind, options in (("png", {}), ("jpeg", {"quality": 88})):
        held = io.BytesIO()
        small.save(held, kind, **options)
        files[kind] = held.getvalue()
    kind = "jpeg" if len(files["jpeg"]) < 0.6 * len(files["png"]) else "png"
    return f"data:image/{kind};base64,{base64.b64encode(files[kind]).decode()}"


def _parts() -> dict[str, str]:
    return {name: _file(f"page.{name}") for name in ("css", "js")}


@functools.cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def need_jinja2() -> Any:
    """Its class Environment, or an error that says how to get it."""
    try:
        from jinja2 import Environment
    except ImportError as error:
        raise ImportError("the HTML page needs jinja2: pip install 'mmcompress[viz]'") from error
    return Environment


@functools.cache
def environment() -> Any:
    """Of the templates in this folder: a page `{% extends "frame.html" %}`, which has themes, phone widths and tables."""
    from jinja2 import FunctionLoader

    return need_jinja2()(loader=FunctionLoader(_file), autoescape=True, trim_blocks=True, lstrip_blocks=True)
