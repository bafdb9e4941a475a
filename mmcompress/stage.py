# SPDX-License-Identifier: Apache-2.0
"""Stage and its kinds, the places where a method can act; Pipeline, stages in a row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from torch import Tensor

from .budget import check_keep, resolve
from .selection import Selection
from .visuals import Visuals

Need: TypeAlias = str | tuple[str | None, ...]
"""A signal by name, or several of which the first that the model can give is taken (the order that the paper or its
ports document); None at the end: without it is fine too."""


@dataclass(frozen=True)
class Stage:
    """One thing done at one place. Subclasses are frozen dataclasses; their fields are the options of the method.

    `needs` names the signals that `select` reads.
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[Need, ...]] = ()

    def __rshift__(self, other: Stage | Pipeline) -> Pipeline:
        return Pipeline((self,)) >> other

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.name == "keep" or getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(shown)})"

    def options(self) -> dict[str, Any]:
        """The options by name, as plain values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


class Selecting(Stage):
    """A stage that chooses among the tokens of a visual with an exact budget known before the forward pass."""

    keep: float | int

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def budget(self, tokens: int) -> int:
        """How many of the `tokens` that enter this stage leave it."""
        return resolve(self.keep, tokens)

    def select(self, visuals: Visuals) -> Selection:
        """The decision for a batch of visuals. Must be a pure function of its argument and of the options."""
        raise NotImplementedError


class InputStage(Selecting):
    """Acts between projector and LLM, on each visual (image or video) by itself.

    `positions` is what the reference does with position ids; a plan can override it.
    """

    kind: ClassVar[str] = "input"
    positions: ClassVar[str] = "reindex"


class LayerStage(Selecting):
    """Acts before LLM layer `layer` on all visual tokens of a sample together; positions are kept.

    Attention signals are those of layer `layer - 1`.
    """

    kind: ClassVar[str] = "layer"
    layer: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, bool) or not isinstance(self.layer, int) or self.layer < 1:
            raise ValueError(
                f"layer={self.layer!r}: the cut comes before an LLM layer and reads the attention of the layer before: at least 1"
            )


class EncoderStage(Stage):
    """Acts inside the vision encoder: merges tokens between attention and MLP of its blocks."""

    kind: ClassVar[str] = "encoder"
    positions: ClassVar[str] = "reindex"
    proportional: bool | None

    def schedule(self, tokens: int, blocks: int, protected: int) -> list[int]:
        """How many of `tokens` patch tokens are merged away in each of the `blocks` blocks."""
        raise NotImplementedError

    def match(self, keys: Tensor, r: int, protected: int) -> tuple[Tensor, int]:
        """Which tokens become one: (target [n, T] index of the new token of each token, number of new tokens).

        keys [n, T, d]: keys of this block, mean over heads; the first `protected` tokens must stay first and alone.
        """
        raise NotImplementedError

    def budget(self, tokens: int, blocks: int, protected: int) -> int:
        """How many of `tokens` patch tokens are left after the last block."""
        return tokens - sum(self.schedule(tokens, blocks, protected))


POSITIONS = ("keep", "reindex")
_ORDER: dict[type[Stage], int] = {EncoderStage: 0, InputStage: 1, LayerStage: 2}


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
        """Plain values for JSON; `as_pipeline` reads them back."""
        stages = [{"method": stage.name, **stage.options()} for stage in self.stages]
        return {"stages": stages, "positions": self.positions}
