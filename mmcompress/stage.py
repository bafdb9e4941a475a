# SPDX-License-Identifier: Apache-2.0
"""Stage and its kinds, the places where a method can act; Pipeline, stages in a row."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, Field, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from .budget import check_keep, resolve

if TYPE_CHECKING:  # plans are read without torch
    from torch import Tensor

    from .selection import Selection
    from .visuals import AttentionRows, Visuals

Need: TypeAlias = str | tuple[str | None, ...]
"""A signal by name, or several of which the first that the model can give is taken (the order that the paper or its
ports document); None at the end: without it is fine too."""


MODALITIES = ("image", "video", "audio")
USUAL = ("image", "video")
"""What a stage acts on unless the plan says otherwise."""


class _On:
    """The field `on` of a stage, checked and in one form however it is set: a name, or several in the order of MODALITIES."""

    def __get__(self, stage: Any, owner: Any = None) -> str | tuple[str, ...]:
        return USUAL if stage is None else stage.__dict__["on"]

    def __set__(self, stage: Any, value: Any) -> None:
        named = {value} if isinstance(value, str) else set(value) if isinstance(value, (tuple, list, set)) else set()
        if not named or not named <= set(MODALITIES):
            raise ValueError(
                f"on={value!r}: give what a stage acts on, one of {', '.join(map(repr, MODALITIES))}, or several as a tuple"
            )
        several = tuple(modality for modality in MODALITIES if modality in named)
        stage.__dict__["on"] = several if len(several) > 1 else several[0]


@dataclass(frozen=True)
class Stage:
    """One thing done at one place. Subclasses are frozen dataclasses; their fields are the options of the method.

    `needs` names the signals that `select` reads. `on` is what every stage has: the modalities that it acts on. `merging`:
    whether its selections say which tokens went into which (`assign`). `mass`: whether what it merges weighs in the language
    model as much as the tokens that it stands for, where the plan does not say. `calibrates`: whether attention in the prompt is
    changed as RESTORE does it (see `runtime.calibration`).
    """

    name: ClassVar[str] = ""
    kind: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    needs: ClassVar[tuple[Need, ...]] = ()
    merging: ClassVar[bool] = False
    mass: ClassVar[bool] = False
    calibrates: ClassVar[bool] = False
    _: KW_ONLY
    on: str | tuple[str, ...] = _On()  # type: ignore[assignment]

    def __rshift__(self, other: Stage | Pipeline) -> Pipeline:
        return Pipeline((self,)) >> other

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in self.fields()
            if f.name == "keep" or getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(shown)})"

    @classmethod
    def fields(cls) -> list[Field[Any]]:
        """The options, those of the method before `on`."""
        return sorted(dataclasses.fields(cls), key=lambda f: f.name == "on")

    @property
    def modalities(self) -> tuple[str, ...]:
        """What it acts on."""
        return (self.on,) if isinstance(self.on, str) else self.on

    def expand(self) -> tuple[Stage, ...]:
        """The stages that this one stands for: itself, or those of a `Recipe`."""
        return (self,)

    def fit(self, config: Any) -> Stage:
        """This stage for a language model with that `config`: options that depend on it are filled in."""
        return self

    def load(self, model: Any) -> Stage:
        """This stage for `model`: weights that it was trained with are read, and checked to belong to that model."""
        return self

    def options(self) -> dict[str, Any]:
        """The options by name, as plain values; `on` where it is not the usual one."""
        return {f.name: getattr(self, f.name) for f in self.fields() if f.name != "on" or self.on != USUAL}


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
    """Acts between projector and LLM, on each visual (image, video or audio) by itself.

    `positions` is what the reference does with position ids; a plan can override it.
    """

    kind: ClassVar[str] = "input"
    positions: ClassVar[str] = "reindex"


def layer_at(where: int | float, depth: int) -> int:
    """A layer of `depth`, at least 1: an int is its number, a float the part of the depth that comes before it."""
    return where if isinstance(where, int) else max(1, round(where * depth))


def check_layer(where: int | float, name: str = "layer") -> None:
    """Raise unless `where` can be the place of a cut."""
    whole = isinstance(where, int) and not isinstance(where, bool) and where >= 1
    if not whole and not (isinstance(where, float) and 0.0 < where < 1.0):
        raise ValueError(
            f"{name}={where!r}: the cut comes before an LLM layer and reads the attention of the layer before: give its number "
            f"as an int, at least 1, or its place as a part of the depth, a float between 0 and 1"
        )


def check_clip(stage: Any) -> None:
    """Raise unless the options `clip` and `tokenizer` of a stage name something to load; a path becomes plain text."""
    for name in ("clip", "tokenizer"):
        value = getattr(stage, name)
        if value is not None and (not isinstance(value, (str, os.PathLike)) or not os.fspath(value)):
            raise ValueError(f"{name}={value!r}: give a name on the hub or a folder, as text or path, or None for none")
        object.__setattr__(stage, name, None if value is None else os.fspath(value))
    if stage.tokenizer is not None and stage.clip is None:
        raise ValueError(f"tokenizer={stage.tokenizer!r} reads the question for a CLIP: give that by clip=")


class LayerStage(Selecting):
    """Acts before LLM layer `layer` (a number, or a part of the depth) on all tokens of a sample together that are of its
    modalities.

    A stage may cut several times: `cuts` and `budgets` say where and how much, and `visuals.cut` in `select` which cut it is.
    Attention signals are those of the layer before the cut; with "@next" those of the layer behind it.
    `positions` is what the reference does with position ids behind a cut; a plan can override it. `lays`: whether `select` reads
    where tokens lie, by `visuals.layout` (of all visuals of the sample) and `visuals.slots`.
    """

    kind: ClassVar[str] = "layer"
    positions: ClassVar[str] = "keep"
    lays: ClassVar[bool] = False
    layer: int | float

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer(self.layer)

    def cuts(self, depth: int) -> tuple[int, ...]:
        """Before which of `depth` LLM layers it cuts, ascending."""
        return (layer_at(self.layer, depth),)

    def budgets(self, tokens: int, depth: int) -> tuple[int, ...]:
        """How many are left after each cut of the `tokens` that come to the first one."""
        return (self.budget(tokens),)


class ExitStage(Stage):
    """Before LLM layers, drops all visual tokens of a sample or none, by what the layers so far have made of it.

    How many tokens a layer gets is known only then: every decision waits for the device, until all samples of the batch are
    out. `visuals` in `leave` holds what `needs` names, with `k` 0.
    """

    kind: ClassVar[str] = "exit"

    def layers(self, depth: int) -> range:
        """Before which of `depth` layers tokens may leave."""
        raise NotImplementedError

    def leave(self, visuals: Visuals, layer: int) -> Tensor:
        """Whether the visual tokens of each sample leave before `layer`, [U] bool."""
        raise NotImplementedError


class PixelStage(Selecting):
    """Acts on the pixels before the vision encoder: it gets every picture in a lower resolution."""

    kind: ClassVar[str] = "pixel"
    positions: ClassVar[str] = "reindex"

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of tokens that a picture of `rows` by `columns` tokens is shrunk to."""
        raise NotImplementedError


class FrameStage(PixelStage):
    """Acts on videos before the vision encoder: it gets some of their frames only. Pictures stay as they are.

    `scorer` names what scores frames by the question, None where they are chosen without it; `tokenizer` that of the model.
    """

    scorer: str | None
    tokenizer: str | None

    def count(self, frames: int) -> int:
        """How many of `frames` frames are encoded, at least 1."""
        raise NotImplementedError

    def choose(self, scores: Sequence[float] | None, frames: int) -> list[int]:
        """Which ones, `count` of them, ascending; scores: of each, None without a scorer."""
        raise NotImplementedError

    def budget(self, tokens: int) -> int:
        return tokens  # of frames that are encoded all tokens stay; how many frames those are, `count` says


Rewrite: TypeAlias = "Callable[[Tensor, slice], tuple[Tensor, Tensor]]"
"""What an attention stage does to rows of a layer: softmax attention [B, heads, q, K] float32 of the rows `part` becomes
(new attention, which rows have changed [B, q] bool). It may be asked for a few rows at a time."""


class AttentionStage(Stage):
    """Rewrites attention in LLM layers and drops nothing; stands behind the input stages, anywhere among layer stages.

    The attention kernel of the model runs as always. The rows behind the last visual are computed once more, rewritten, and
    put in its place where something has changed; all other rows stay as they are, bit for bit.
    """

    kind: ClassVar[str] = "attention"

    def layers(self, depth: int) -> range:
        """The layers that it looks at or rewrites, of `depth`."""
        raise NotImplementedError

    def rewriting(self, rows: AttentionRows) -> Rewrite | None:
        """Look at one layer in one call; what to do with its rows, None for nothing."""
        raise NotImplementedError


class EncoderStage(Stage):
    """Acts inside the vision encoder: merges tokens between attention and MLP of its blocks."""

    kind: ClassVar[str] = "encoder"
    merging: ClassVar[bool] = True
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


class Recipe(Stage):
    """A method that is several stages in a row under one name."""

    kind: ClassVar[str] = "recipe"

    def expand(self) -> tuple[Stage, ...]:
        raise NotImplementedError


POSITIONS = ("keep", "reindex")
WAYS = ("mask", "channel")
"""How masses can be added to logits."""
_ORDER: dict[type[Stage], int] = {
    PixelStage: 0,
    EncoderStage: 0,
    InputStage: 1,
    LayerStage: 2,
    ExitStage: 2,
    AttentionStage: 2,
}


@dataclass(frozen=True, repr=False)
class Pipeline:
    """Stages in a row. Every `keep` refers to the tokens that enter its stage.

    positions: "keep" leaves the kept tokens their position ids in the full prompt, "reindex" numbers what is left
    without gaps; None takes the default of the family and of each method: of the first stage before the LLM, and of each stage
    in it.
    mass: True lets a merged token weigh in the attention of the language model as much as the tokens that it stands for, by the
    logarithm of their number on its key's logit, in all layers, prefill and decode; None takes the default of the methods. True
    leaves it to the engine how that is added: "mask" adds it in the mask of attention, "channel" by more channels of queries and
    keys (what flash attention takes).
    structural: "keep" leaves newlines and other structural tokens of a visual that loses tokens, "drop" removes them, as the
    official LLaVA-NeXT codes of most methods do.
    preset: what is said of the preset that the plan comes from, if it does.
    """

    stages: tuple[Stage, ...]
    positions: str | None = None
    structural: str = "keep"
    mass: bool | str | None = None
    preset: str = dataclasses.field(default="", compare=False)

    def __post_init__(self) -> None:
        if self.positions not in (None, *POSITIONS):
            raise ValueError(f"positions={self.positions!r}: choose 'keep', 'reindex' or None (the method's default)")
        if self.structural not in ("keep", "drop"):
            raise ValueError(f"structural={self.structural!r}: choose 'keep' or 'drop'")
        if self.mass not in (None, True, False, *WAYS):
            raise ValueError(
                f"mass={self.mass!r}: choose True, False, 'mask', 'channel' or None (the methods' default)"
            )
        if not self.stages:
            raise ValueError("a plan needs at least one stage")
        if self.mass and not any(part.merging for part in self.parts):
            raise ValueError(
                f"{self!r}: no stage of this plan merges tokens, so none can weigh more than itself: leave mass out, or complete "
                f"the method, absorb(host='divprune', keep=0.25)"
            )
        ranks = [next(rank for kind, rank in _ORDER.items() if isinstance(part, kind)) for part in self.parts]
        if ranks != sorted(ranks):
            raise ValueError(f"{self!r}: stages must follow the way of a token: pixel or encoder >> input >> layer")
        for early in (*self.pixel_stages, *self.encoder_stages):
            if "audio" in early.modalities:
                raise ValueError(f"{early!r} acts in front of or inside the vision encoder, where no audio comes by")
        if len({stage.on for stage in self.attention_stages}) > 1:
            raise ValueError(f"{self!r}: all stages of a plan that rewrite attention act on the same modalities")
        if len(self.encoder_stages) + len(self.pixel_stages) > 1:
            raise ValueError(f"{self!r}: a plan can have one pixel stage or one encoder stage")
        if len({type(s) for s in self.attention_stages}) < len(self.attention_stages):
            raise ValueError(f"{self!r}: a plan can have each method that rewrites attention once")
        if len(self.exit_stages) > 1:
            raise ValueError(f"{self!r}: a plan can have one stage at which visual tokens leave for good")

    @functools.cached_property
    def parts(self) -> tuple[Stage, ...]:
        """The stages that act, those of recipes in their place, which act on what the recipe acts on."""
        return tuple(
            part if part is stage or stage.on == USUAL else dataclasses.replace(part, on=stage.on)
            for stage in self.stages
            for part in stage.expand()
        )

    @functools.cached_property
    def modalities(self) -> frozenset[str]:
        """What any of its stages acts on."""
        return frozenset(modality for part in self.parts for modality in part.modalities)

    @functools.cached_property
    def pixel_stages(self) -> tuple[PixelStage, ...]:
        return tuple(s for s in self.parts if isinstance(s, PixelStage))

    @functools.cached_property
    def encoder_stages(self) -> tuple[EncoderStage, ...]:
        return tuple(s for s in self.parts if isinstance(s, EncoderStage))

    @functools.cached_property
    def input_stages(self) -> tuple[InputStage, ...]:
        return tuple(s for s in self.parts if isinstance(s, InputStage))

    @functools.cached_property
    def layer_stages(self) -> tuple[LayerStage, ...]:
        return tuple(s for s in self.parts if isinstance(s, LayerStage))

    @functools.cached_property
    def attention_stages(self) -> tuple[AttentionStage, ...]:
        return tuple(s for s in self.parts if isinstance(s, AttentionStage))

    @functools.cached_property
    def exit_stages(self) -> tuple[ExitStage, ...]:
        return tuple(s for s in self.parts if isinstance(s, ExitStage))

    def fit(self, config: Any) -> Pipeline:
        """This plan for a language model with that `config`."""
        return dataclasses.replace(self, stages=tuple(stage.fit(config) for stage in self.stages))

    def load(self, model: Any) -> Pipeline:
        """This plan for `model`, with the weights that its stages were trained with."""
        return dataclasses.replace(self, stages=tuple(stage.load(model) for stage in self.stages))

    @functools.cached_property
    def weighs(self) -> bool:
        """Whether merged tokens weigh what they stand for."""
        return any(stage.mass for stage in self.parts) if self.mass is None else bool(self.mass)

    @functools.cached_property
    def calibrates(self) -> bool:
        """Whether attention in the prompt is changed as RESTORE does it."""
        return any(stage.calibrates for stage in self.parts)

    def position_policy(self) -> str:
        """The policy in force before the LLM: the plan's own, else that of its first stage there."""
        early: tuple[PixelStage | EncoderStage | InputStage, ...]
        early = (*self.pixel_stages, *self.encoder_stages, *self.input_stages)
        return self.positions or (early[0].positions if early else "keep")

    def cuts(self, depth: int) -> dict[int, tuple[LayerStage, int]]:
        """Every cut in an LLM of `depth` layers: the layer it comes before, its stage, and its number among those of the stage.

        Raises ValueError for a layer that is not there, and for stages whose cuts are not in ascending order.
        """
        found: dict[int, tuple[LayerStage, int]] = {}
        for stage in self.layer_stages:
            for number, layer in enumerate(stage.cuts(depth)):
                if not 1 <= layer < depth:
                    raise ValueError(
                        f"{stage!r}: the language model has {depth} layers, cut before one of 1 to {depth - 1}, not {layer}"
                    )
                if layer <= max(found, default=0):
                    raise ValueError(
                        f"{self!r}: layer stages must come in ascending order, one cut before a layer; in a language model of "
                        f"{depth} layers {stage!r} cuts before layer {layer}, and there is a cut before layer {max(found)}"
                    )
                found[layer] = (stage, number)
        return found

    def __rshift__(self, other: Stage | Pipeline) -> Pipeline:
        after = other if isinstance(other, Pipeline) else Pipeline((other,))
        if self.positions and after.positions and self.positions != after.positions:
            raise ValueError(f"positions={self.positions!r} and positions={after.positions!r} in one plan")
        if None not in (self.mass, after.mass) and self.mass != after.mass:
            raise ValueError(f"mass={self.mass!r} and mass={after.mass!r} in one plan")
        structural = "drop" if "drop" in (self.structural, after.structural) else "keep"
        mass = after.mass if self.mass is None else self.mass
        return Pipeline(self.stages + after.stages, self.positions or after.positions, structural, mass)

    def __repr__(self) -> str:
        row = " >> ".join(map(repr, self.stages))
        options = [f"positions={self.positions!r}"] if self.positions else []
        options += [f"structural={self.structural!r}"] if self.structural != "keep" else []
        options += [f"mass={self.mass!r}"] if self.mass is not None else []
        return f"plan({', '.join([row, *options])})" if options else row

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `as_pipeline` reads them back."""
        stages = [{"method": stage.name, **stage.options()} for stage in self.stages]
        found = {"stages": stages, "positions": self.positions, "structural": self.structural}
        return found if self.mass is None else {**found, "mass": self.mass}
