# SPDX-License-Identifier: Apache-2.0
"""Plans as users write them, and the registry of methods."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable, Collection, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from . import presets
from .budget import percent, warn_of_one
from .stage import Pipeline, Stage

GROUP = "mmcompress.methods"
"""The entry-point group of third parties' methods."""
_registry: dict[str, type[Stage]] = {}
S = TypeVar("S", bound=type[Stage])
T = TypeVar("T")
Make = Callable[[str, dict[str, Any]], Stage]
"""A stage by method name and options."""


def register(name: str) -> Callable[[S], S]:
    """Class decorator: make a stage known under `name`. Third parties list their module in the entry-point group
    `mmcompress.methods`; it is imported when a name is not known yet, or when all methods are listed."""

    if name in presets.NAMES:
        raise ValueError(f"{name!r} is the name of a preset: a method needs another one")

    def add(cls: S) -> S:
        if name in _registry and _registry[name] is not cls:
            raise ValueError(f"method {name!r} is registered already, by {_registry[name].__module__}")
        cls.name = name
        _registry[name] = cls
        return cls

    return add


def methods() -> dict[str, type[Stage]]:
    """All registered methods by name."""
    from importlib.metadata import entry_points

    import_module(f"{__package__}.methods")  # ours, found as those of others are: by the name of their module
    for entry in entry_points(group=GROUP):
        entry.load()
    return dict(sorted(_registry.items()))


def registered() -> set[str]:
    """Names of the methods that were imported so far."""
    return set(_registry)


def _suggest(word: str, known: Collection[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def known(name: str, methods: Mapping[str, T]) -> T:
    """What stands for a method name among `methods`; raises ValueError with a suggestion if nothing does."""
    if name in presets.NAMES:
        raise ValueError(
            f"{name!r} is a preset, a whole plan: it stands alone and takes no options; as a plan it is {presets.preset(name).plan}"
        )
    if name not in methods:
        close = _suggest(name, methods) or _suggest(name, presets.NAMES)
        raise ValueError(
            f"unknown method {name!r}: {close}there are the presets {', '.join(presets.NAMES)} and the methods "
            f"{', '.join(methods)}"
        )
    return methods[name]


def known_method(name: str) -> type[Stage]:
    """The class of a method; raises ValueError with a suggestion for an unknown name."""
    return _registry.get(name) or known(name, methods())


def read_options(name: str, options: dict[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """The options of a method with `25%` as a ratio; raises ValueError with a suggestion for one that is none of `fields`."""
    for option in options:
        if option not in fields:
            raise ValueError(
                f"{name} has no option {option!r}: {_suggest(option, fields)}its options are: {', '.join(fields)}"
            )
    parts = {option: percent(value) for option, value in options.items() if isinstance(value, str)}
    return options | {option: part for option, part in parts.items() if part is not None}


def make(name: str, options: dict[str, Any]) -> Stage:
    """A stage by method name and options; raises ValueError with a suggestion for an unknown name or option."""
    cls = known_method(name)
    return cls(**read_options(name, options, [f.name for f in cls.fields()]))


def as_pipeline(
    plan: str | os.PathLike[str] | Stage | Pipeline | dict[str, Any],
    positions: str | None = None,
    structural: str | None = None,
    mass: bool | str | None = None,
    family: str | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline from what users write: a preset (fast, balanced, quality), a method name with its options, a plan string, the
    path of a plan file (it ends in .json), a stage, a pipeline, or the plain values of `Pipeline.to_dict`. family: the model type
    that a preset is for; None for any. Raises ValueError or TypeError that says what is wrong and what is allowed."""
    made: Stage | Pipeline
    if isinstance(plan, str) and plan.strip() in presets.NAMES and not options:
        chosen = presets.preset(plan.strip(), family)
        made = dataclasses.replace(_parse(chosen.plan, make), preset=str(chosen))
    elif isinstance(plan, str) and plan.strip().isidentifier():
        made = make(plan.strip(), options)
    elif options:
        raise TypeError(f"options {sorted(options)} go into the stage or inside the plan string: {plan!r}")
    elif isinstance(plan, (str, os.PathLike)):
        made = read_plan(plan)
    elif isinstance(plan, dict):
        made = _from_dict(plan)
    elif isinstance(plan, (Stage, Pipeline)):
        made = plan
    else:
        raise TypeError(f"plan={plan!r}: give a method name, a plan string, a plan file, a stage or a pipeline")
    pipeline = made if isinstance(made, Pipeline) else Pipeline((made,))
    for stage in pipeline.stages:
        warn_of_one(getattr(stage, "keep", None))
    if positions is not None:
        pipeline = dataclasses.replace(pipeline, positions=positions)
    if mass is not None:
        pipeline = dataclasses.replace(pipeline, mass=mass)
    return pipeline if structural is None else dataclasses.replace(pipeline, structural=structural)


def read_plan(plan: str | os.PathLike[str], make: Make = make) -> Pipeline:
    """A pipeline from a plan string or the path of a plan file, its stages made by `make`."""
    if not isinstance(plan, str) or plan.strip().endswith(".json"):
        return _load(Path(plan.strip() if isinstance(plan, str) else plan), make)
    return _parse(plan, make)


def _load(path: Path, make: Make) -> Pipeline:
    if not path.is_file():
        raise ValueError(f"no plan file {str(path)!r} here: a plan that ends in .json is the path of one")
    try:
        values = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): a plan file holds the values of Pipeline.to_dict()") from error
    try:
        return _from_dict(values, make)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _from_dict(values: Any, make: Make = make) -> Pipeline:
    entries = values.get("stages") if isinstance(values, dict) else None
    if not isinstance(entries, list) or not all(isinstance(e, dict) and "method" in e for e in entries):
        raise ValueError('a plan as plain values is {"stages": [{"method": name, option: value, ...}, ...]}')
    stages = []
    for entry in entries:
        options = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items() if name != "method"}
        stages.append(make(entry["method"], options))
    return Pipeline(tuple(stages), values.get("positions"), values.get("structural", "keep"), values.get("mass"))


_PERCENT = re.compile(r"""('[^']*'|"[^"]*")|((?:\d+\.?\d*|\.\d+)\s*%)""")
"""Texts in quotes, and outside them numbers with a percent sign."""


def _parse(text: str, make: Make) -> Pipeline:
    """Read `a(x=1) >> b(y=25%)` or `plan(a(x=1) >> b(y=2), positions="keep")`; nothing is evaluated but literals."""
    quoted = _PERCENT.sub(lambda found: found[1] or repr(found[2]), text.strip())
    try:
        return _read(ast.parse(quoted, mode="eval").body, text, make)
    except SyntaxError as error:
        raise ValueError(
            f"cannot read the plan {text!r}: write it like 'divprune(keep=0.5) >> fastv(layer=2, keep=50%)'"
        ) from error


def _read(node: ast.expr, text: str, make: Make) -> Pipeline:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _read(node.left, text, make) >> _read(node.right, text, make)
    if isinstance(node, ast.Name):
        return Pipeline((make(node.id, {}),))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "plan" and len(node.args) == 1:
            options = _literals(node, text)
            if unknown := set(options) - {"positions", "structural", "mass"}:
                raise ValueError(
                    f"plan(...) has the options positions, structural and mass, not {', '.join(sorted(unknown))}, in the plan "
                    f"{text!r}"
                )
            return dataclasses.replace(_read(node.args[0], text, make), **options)
        if node.args:
            raise ValueError(f"{node.func.id}: write options by name, like keep=0.25, in the plan {text!r}")
        return Pipeline((make(node.func.id, _literals(node, text)),))
    raise ValueError(f"cannot read {ast.unparse(node)!r} in the plan {text!r}: expected method(option=value) >> ...")


def _literals(node: ast.Call, text: str) -> dict[str, Any]:
    try:
        return {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    except ValueError as error:
        raise ValueError(f"options must be plain values in the plan {text!r}") from error
