# SPDX-License-Identifier: Apache-2.0
"""What is known of the methods without importing one, for everything that has to answer before torch is there.

`methods/catalog.json` says of each method its class, kind, paper, first sentence and options; `python -m mmcompress.methods` writes
it, and a test says when it is out of date.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from . import plan as plans
from . import presets
from .budget import check_keep
from .stage import (
    AttentionStage,
    EncoderStage,
    ExitStage,
    InputStage,
    LayerStage,
    PixelStage,
    Recipe,
    Selecting,
    Stage,
    check_layer,
)

FILE = Path(__file__).parent / "methods" / "catalog.json"
KINDS = {cls.kind: cls for cls in (PixelStage, EncoderStage, InputStage, LayerStage, ExitStage, AttentionStage, Recipe)}


@functools.cache
def catalog() -> dict[str, dict[str, Any]]:
    """Our own methods by name: what `entry` says of them."""
    found: dict[str, dict[str, Any]] = json.loads(FILE.read_text())
    return found


def entry(cls: type[Stage]) -> dict[str, Any]:
    """What the catalog says of a method; parts: kinds of the stages that a recipe stands for."""
    found = {
        "class": cls.__name__,
        "kind": cls.kind,
        "paper": cls.paper,
        "idea": " ".join((cls.__doc__ or "").split()).partition(". ")[0].removesuffix(".") + ".",
        "options": {field.name: field.default for field in cls.fields() if field.name != "on"},
        "merging": cls().merging,
    }
    return {**found, "parts": [part.kind for part in cls().expand()]} if issubclass(cls, Recipe) else found


def listed() -> dict[str, dict[str, Any]]:
    """All methods, those of third parties too (which are imported for that, if there are any)."""
    if not _others():
        return catalog()
    return dict(sorted({**{name: entry(cls) for name, cls in plans.methods().items()}, **catalog()}.items()))


def check_plan(text: str) -> None:
    """Raise ValueError or TypeError for a plan that cannot be right, in the words of `as_pipeline`: syntax, names of methods and
    options, ratios and counts, order of stages. What only a method itself knows is left to it."""
    if text.strip() not in presets.NAMES:
        plans.read_plan(text, sketch)


def sketch(name: str, options: dict[str, Any]) -> Stage:
    """A stand-in for the stage of a method, that has its kind and its options and can do nothing."""
    if name not in catalog() and (name in plans.registered() or _others()):
        return plans.make(name, options)
    about = plans.known(name, catalog())
    return _stand_in(name, about, plans.read_options(name, options, [*about["options"], "on"]))


def _others() -> bool:
    """Whether there are methods that the catalog does not know."""
    from importlib.metadata import entry_points

    return bool(plans.registered() - catalog().keys()) or bool(entry_points(group=plans.GROUP))


def _stand_in(name: str, about: dict[str, Any], options: dict[str, Any]) -> Stage:
    kind, given = KINDS[about["kind"]], {key for key in options if options[key] is not None}

    def check(self: Any) -> None:
        if "keep" in given and isinstance(self, (Selecting, Recipe)):
            check_keep(self.keep)  # type: ignore[union-attr]
        if "layer" in given:
            check_layer(self.layer)

    body: dict[str, Any] = {"name": name, "merging": about["merging"], "__post_init__": check}
    if "parts" in about:
        parts = tuple(_stand_in(name, {"kind": part, "options": {}, "merging": True}, {}) for part in about["parts"])
        body["expand"] = lambda self: parts
    fields = [(key, Any, dataclasses.field(default=value)) for key, value in _frozen(about["options"]).items()]
    made = dataclasses.make_dataclass(name, fields, bases=(kind,), namespace=body, frozen=True, repr=False)
    stage: Stage = made(**options)
    return stage


def _frozen(values: dict[str, Any]) -> dict[str, Any]:
    """JSON's lists as what they were."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
