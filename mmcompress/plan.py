# SPDX-License-Identifier: Apache-2.0
"""Plans as users write them, and the registry of methods."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from .budget import percent, warn_of_one
from .stage import Pipeline, Stage

_registry: dict[str, type[Stage]] = {}
S = TypeVar("S", bound=type[Stage])


def register(name: str) -> Callable[[S], S]:
    """Class decorator: make a stage known under `name`. Third parties list their module in the entry-point group
    `mmcompress.methods`; it is imported when a name is not known yet, or when all methods are listed."""

    def add(cls: S) -> S:
        if name in _registry and _registry[name] is not cls:
            raise ValueError(f"method {name!r} is registered already, by {_registry[name].__module__}")
        cls.name = name
        _registry[name] = cls
        return cls

    return add


def methods() -> dict[str, type[Stage]]:
    """All registered methods by name."""
    for entry in entry_points(group="mmcompress.methods"):
        entry.load()
    return dict(sorted(_registry.items()))


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}? " if close else ""


def make(name: str, options: dict[str, Any]) -> Stage:
    """A stage by method name and options; raises ValueError with a suggestion for an unknown name or option."""
    cls = _registry.get(name) or methods().get(name)
    if cls is None:
        raise ValueError(f"unknown method {name!r}: {_suggest(name, list(_registry))}there is: {', '.join(methods())}")
    fields = [f.name for f in cls.fields()]
    for option in options:
        if option not in fields:
            raise ValueError(
                f"{name} has no option {option!r}: {_suggest(option, fields)}its options are: {', '.join(fields)}"
            )
    parts = {option: percent(value) for option, value in options.items() if isinstance(value, str)}
    return cls(**options | {option: part for option, part in parts.items() if part is not None})


def as_pipeline(
    plan: str | os.PathLike[str] | Stage | Pipeline | dict[str, Any],
    positions: str | None = None,
    structural: str | None = None,
    mass: bool | str | None = None,
    **options: Any,
) -> Pipeline:
    """A pipeline from what users write: a method name with its options, a plan string, the path of a plan file (it ends in
    .json), a stage, a pipeline, or the plain values of `Pipeline.to_dict`. Raises ValueError or TypeError that says what is
    wrong and what is allowed."""
    made: Stage | Pipeline
    if isinstance(plan, str) and plan.strip().isidentifier():
        made = make(plan.strip(), options)
    elif options:
        raise TypeError(f"options {sorted(options)} go into the stage or inside the plan string: {plan!r}")
    elif isinstance(plan, os.PathLike) or (isinstance(plan, str) and plan.strip().endswith(".json")):
        made = _load(Path(plan.strip() if isinstance(plan, str) else plan))
    elif isinstance(plan, str):
        made = _parse(plan)
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


def _load(path: Path) -> Pipeline:
    if not path.is_file():
        raise ValueError(f"no plan file {str(path)!r} here: a plan that ends in .json is the path of one")
    try:
        values = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): a plan file holds the values of Pipeline.to_dict()") from error
    try:
        return _from_dict(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _from_dict(values: Any) -> Pipeline:
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


def _parse(text: str) -> Pipeline:
    """Read `a(x=1) >> b(y=25%)` or `plan(a(x=1) >> b(y=2), positions="keep")`; nothing is evaluated but literals."""
    quoted = _PERCENT.sub(lambda found: found[1] or repr(found[2]), text.strip())
    try:
        return _read(ast.parse(quoted, mode="eval").body, text)
    except SyntaxError as error:
        raise ValueError(
            f"cannot read the plan {text!r}: write it like 'divprune(keep=0.5) >> fastv(layer=2, keep=50%)'"
        ) from error


def _read(node: ast.expr, text: str) -> Pipeline:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _read(node.left, text) >> _read(node.right, text)
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
            return dataclasses.replace(_read(node.args[0], text), **options)
        if node.args:
            raise ValueError(f"{node.func.id}: write options by name, like keep=0.25, in the plan {text!r}")
        return Pipeline((make(node.func.id, _literals(node, text)),))
    raise ValueError(f"cannot read {ast.unparse(node)!r} in the plan {text!r}: expected method(option=value) >> ...")


def _literals(node: ast.Call, text: str) -> dict[str, Any]:
    try:
        return {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    except ValueError as error:
        raise ValueError(f"options must be plain values in the plan {text!r}") from error
