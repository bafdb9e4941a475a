# SPDX-License-Identifier: Apache-2.0
"""Plans: stages in a row, their strings, and the registry of methods."""

from __future__ import annotations

import ast
import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, TypeVar

from .stage import EncoderStage, InputStage, LayerStage, Stage

POSITIONS = ("keep", "reindex")
_ORDER: dict[type[Stage], int] = {EncoderStage: 0, InputStage: 1, LayerStage: 2}
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
    fields = [f.name for f in dataclasses.fields(cls)]
    for option in options:
        if option not in fields:
            raise ValueError(
                f"{name} has no option {option!r}: {_suggest(option, fields)}its options are: {', '.join(fields)}"
            )
    return cls(**options)


@dataclass(frozen=True, repr=False)
class Pipeline:
    """Stages in a row. Every `keep` refers to the tokens that enter its stage.

    positions: "keep" leaves the kept tokens their position ids in the full prompt, "reindex" numbers what is left
    without gaps; None takes the default of the first stage before the LLM (see its paper) and of the family.
    """

    stages: tuple[Stage, ...]
    positions: str | None = None

    def __post_init__(self) -> None:
        if self.positions not in (None, *POSITIONS):
            raise ValueError(f"positions={self.positions!r}: choose 'keep', 'reindex' or None (the method's default)")
        if not self.stages:
            raise ValueError("a plan needs at least one stage")
        ranks = [next(rank for kind, rank in _ORDER.items() if isinstance(stage, kind)) for stage in self.stages]
        if ranks != sorted(ranks):
            raise ValueError(f"{self!r}: stages must follow the way of a token: encoder >> input >> layer")
        if len(self.encoder_stages) > 1:
            raise ValueError(f"{self!r}: a plan can have one encoder stage")
        layers = [stage.layer for stage in self.layer_stages]
        if layers != sorted(set(layers)):
            raise ValueError(f"{self!r}: layer stages must come in ascending order, one per layer")

    @staticmethod
    def of(plan: str | Stage | Pipeline, positions: str | None = None, **options: Any) -> Pipeline:
        """A pipeline from what users write: a method name with options, a plan string, a stage, or a pipeline."""
        if isinstance(plan, str):
            made = make(plan.strip(), options) if plan.strip().isidentifier() else _parse(plan)
            if options and not plan.strip().isidentifier():
                raise TypeError(f"options {sorted(options)} go inside the plan string: {plan!r}")
        elif isinstance(plan, (Stage, Pipeline)):
            made = plan
            if options:
                raise TypeError(f"options {sorted(options)} go into the stage: {plan!r}")
        else:
            raise TypeError(f"plan={plan!r}: give a method name, a plan string, a stage or a pipeline")
        pipeline = made if isinstance(made, Pipeline) else Pipeline((made,))
        return dataclasses.replace(pipeline, positions=positions) if positions is not None else pipeline

    @property
    def encoder_stages(self) -> tuple[EncoderStage, ...]:
        return tuple(s for s in self.stages if isinstance(s, EncoderStage))

    @property
    def input_stages(self) -> tuple[InputStage, ...]:
        return tuple(s for s in self.stages if isinstance(s, InputStage))

    @property
    def layer_stages(self) -> tuple[LayerStage, ...]:
        return tuple(s for s in self.stages if isinstance(s, LayerStage))

    def position_policy(self) -> str:
        """The policy in force: the plan's own, else that of its first stage before the LLM."""
        early: tuple[EncoderStage | InputStage, ...] = (*self.encoder_stages, *self.input_stages)
        return self.positions or (early[0].positions if early else "keep")

    def __rshift__(self, other: Stage | Pipeline) -> Pipeline:
        after = other if isinstance(other, Pipeline) else Pipeline((other,))
        if self.positions and after.positions and self.positions != after.positions:
            raise ValueError(f"positions={self.positions!r} and positions={after.positions!r} in one plan")
        return Pipeline(self.stages + after.stages, self.positions or after.positions)

    def __repr__(self) -> str:
        row = " >> ".join(map(repr, self.stages))
        return f"plan({row}, positions={self.positions!r})" if self.positions else row

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `Pipeline.from_dict` reads them back."""
        stages = [{"method": stage.name, **stage.options()} for stage in self.stages]
        return {"stages": stages, "positions": self.positions}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Pipeline:
        stages = []
        for entry in values["stages"]:
            options = {name: tuple(v) if isinstance(v, list) else v for name, v in entry.items() if name != "method"}
            stages.append(make(entry["method"], options))
        return Pipeline(tuple(stages), values.get("positions"))


def _parse(text: str) -> Pipeline:
    """Read `a(x=1) >> b(y=2)` or `plan(a(x=1) >> b(y=2), positions="keep")`; nothing is evaluated but literals."""
    try:
        return _read(ast.parse(text.strip(), mode="eval").body, text)
    except SyntaxError as error:
        raise ValueError(
            f"cannot read the plan {text!r}: write it like 'visionzip(keep=0.25) >> fastv(layer=2, keep=0.5)'"
        ) from error


def _read(node: ast.expr, text: str) -> Pipeline:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.RShift):
        return _read(node.left, text) >> _read(node.right, text)
    if isinstance(node, ast.Name):
        return Pipeline((make(node.id, {}),))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "plan" and len(node.args) == 1:
            return dataclasses.replace(_read(node.args[0], text), **_literals(node, text))
        if node.args:
            raise ValueError(f"{node.func.id}: write options by name, like keep=0.25, in the plan {text!r}")
        return Pipeline((make(node.func.id, _literals(node, text)),))
    raise ValueError(f"cannot read {ast.unparse(node)!r} in the plan {text!r}: expected method(option=value) >> ...")


def _literals(node: ast.Call, text: str) -> dict[str, Any]:
    try:
        return {str(word.arg): ast.literal_eval(word.value) for word in node.keywords}
    except ValueError as error:
        raise ValueError(f"options must be plain values in the plan {text!r}") from error
