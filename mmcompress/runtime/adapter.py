# SPDX-License-Identifier: Apache-2.0
"""Adapter: where things are in one model family. Facts only; no algorithm, no forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.vision_utils import get_vision_window_index

from ..stage import MODALITIES, Stage
from ..visuals import Layout

CLS_FEATURES = ("cls_feature", "cls_features")
"""Signals of the CLS token's own feature: of the view that shows a visual whole, and of each of its views."""
OF_CLS = frozenset({"cls_attention", "cls_logits", "cls_joint_attention"})
OF_PATCHES = frozenset(
    {
        "received_attention",
        "given_attention",
        "received_logits",
        "given_logits",
        "hub_attention",
        "keys",
        "joint_keys",
    }
)
PER_TOKEN = OF_CLS | OF_PATCHES
"""Signals of one attention block: what CLS says of the patches, and what they say of each other."""

Record = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Block:
    """The parts of one vision encoder block.

    first      the module that is given the block's input as it is (its first norm).
    norm, mlp  the norm before the MLP, and the MLP.
    q, k       the modules whose outputs are all queries and all keys, [..., heads * d] or [..., heads, d], before any
               rotation; or `qkv`, one module that gives queries, keys and values behind each other.
    key_heads  how many heads the keys have, where that is another number. width: of a head, for norms of each head.
    heard      attention is not made of q and k, but of what the module hands to its attention function (rotation and all).
    """

    module: nn.Module
    first: nn.Module
    attention: Any
    norm: nn.Module
    mlp: nn.Module
    heads: int
    scale: float
    q: nn.Module | None = None
    k: nn.Module | None = None
    qkv: nn.Module | None = None
    key_heads: int | None = None
    width: int | None = None
    heard: bool = False

    def tap(self, record: Record) -> list[RemovableHandle]:
        """Hooks that call `record("q", ...)` and `record("k", ...)` with queries and keys [..., T, heads, d]."""
        if self.qkv is not None:
            return [self.qkv.register_forward_hook(functools.partial(self._fused, record))]
        assert self.q is not None and self.k is not None
        return [
            m.register_forward_hook(functools.partial(self._plain, record, n))
            for n, m in (("q", self.q), ("k", self.k))
        ]

    def _plain(self, record: Record, name: str, module: Any, args: tuple, output: Tensor) -> None:
        heads = self.heads if name == "q" else self.key_heads or self.heads
        apart = output.shape[-2:] == (heads, self.width)  # of a norm of each head
        self._give(record, name, output if apart else output.unflatten(-1, (heads, -1)))

    def _fused(self, record: Record, module: Any, args: tuple, output: Tensor) -> None:
        few = self.key_heads or self.heads
        parts = output.unflatten(-1, (self.heads + 2 * few, -1))
        record("q", parts[..., : self.heads, :])
        self._give(record, "k", parts[..., self.heads : self.heads + few, :])

    def _give(self, record: Record, name: str, heads: Tensor) -> None:
        """Every head of the keys for all the queries that share it."""
        shared = self.heads // heads.shape[-2]
        record(name, heads if shared == 1 else heads.repeat_interleave(shared, -2))


def unwrapped(model: Any) -> Any:
    """The model inside wrappers of PEFT, torch.compile, data parallelism and the like."""
    while True:
        inner = getattr(model, "get_base_model", None)
        inside = inner() if callable(inner) else getattr(model, "_orig_mod", getattr(model, "module", model))
        if inside is model or not isinstance(inside, nn.Module):
            return model
        model = inside


def body_of(model: Any) -> Any:
    """The part of a model that encodes pictures and holds the language model: what is below its head, or the model itself."""
    return unwrapped(getattr(model, "base_model", model))


def config_of(model: Any) -> Any:
    """The config of the part of a model that sees: of a retriever that of the model inside. None where there is none."""
    return getattr(body_of(model), "config", None)


def decoder_of(base: Any) -> Any:
    """The decoder that a base model gives its embeddings to: with its layers, without its head; None if there is none."""
    part = getattr(base, "language_model", None) or getattr(base, "text_model", None)
    while part is not None and not hasattr(part, "layers"):
        part = getattr(part, "model", None)
    return part


def encoding(base: Any, modality: str) -> Any:
    """What encodes a modality in a base model: its method for that, or for audio without one the audio tower; None if nothing."""
    return (
        getattr(base, f"get_{modality}_features", None)
        or (modality == "audio" and getattr(base, "audio_tower", None))
        or None
    )


def placeholder(config: Any, modality: str) -> int | None:
    """The token id that stands for one token of a modality in `input_ids`, None if there is none."""
    names = (f"{modality}_token_id", f"{modality}_token_index")
    return next((token for name in names if (token := getattr(config, name, None)) is not None), None)


class Encoder:
    """What the runtime asks about a vision encoder.

    A row of the encoder is one picture, tile or frame: either a row of a batch [n, T, C], perhaps with padding (`padded`), or a
    segment of one packed sequence [T, C] (`packed`). Tokens that are fused later (`unit` of them make one LLM token) are merged
    as a whole.
    """

    family: ClassVar[str] = ""
    unit: ClassVar[int] = 1
    packed: ClassVar[bool] = False
    padded: ClassVar[bool] = False
    bias_argument: ClassVar[str | None] = "attention_mask"
    """Argument of the attention module that takes a bias [n, 1, 1, T] on its logits; None: there is none."""

    def bias(self, bias: Tensor, block: Block) -> Tensor:
        """The bias [n, 1, 1, T] in the shape that the attention module takes."""
        return bias

    def __init__(self, model: Any) -> None:
        self.model = model

    @classmethod
    def matches(cls, model: Any) -> bool:
        """Whether this class knows where things are in `model`."""
        raise NotImplementedError

    def again(self) -> Any:
        """The same for the modules that the model has now."""
        if not self.matches(self.model):
            raise NotImplementedError(f"the model is none of {self.family} any more")
        return type(self)(self.model)

    @property
    def tower(self) -> Any:
        raise NotImplementedError

    @property
    def blocks(self) -> list[Block]:
        raise NotImplementedError

    @property
    def prefix(self) -> int:
        """How many tokens of a row come before the patches (1 with a CLS token)."""
        raise NotImplementedError

    @property
    def feature_blocks(self) -> list[int]:
        """Indices of the blocks whose outputs are used."""
        return [len(self.blocks) - 1]

    @property
    def attention(self) -> str | None:
        """Attention implementation of the tower by its transformers name."""
        return getattr(self.tower.config, "_attn_implementation", None)

    def segments(self, arguments: dict[str, Any]) -> list[int]:
        """Length of every row of a packed tower in patches, from the keyword arguments of the tower's call and of its first
        block's."""
        raise NotImplementedError

    def order(self, patches: int, arguments: dict[str, Any]) -> Tensor | None:
        """The patches of a row (packed or padded: of all rows, [T] or [n * T]) in an order in which every `unit` of them make one
        LLM token, from the keyword arguments of the tower's or the encoder method's call; None: they stand so. What makes no
        token is left out."""
        return None

    def check_stage(self, stage: Stage) -> None:
        """Raise NotImplementedError where a stage in front of the encoder or inside of it cannot act."""

    @property
    def windowed(self) -> bool:
        """Whether some blocks of a packed tower attend within parts of a row, which stand one after the other."""
        return False

    def unit_in(self, arguments: dict[str, Any]) -> int:
        """How many patches make one LLM token in one call."""
        return self.unit


class Run(NamedTuple):
    """Neighbouring placeholders in a prompt: number of the row, place of the first, how many."""

    row: int
    start: int
    length: int


@dataclass
class Encoded:
    """What one call of an encoder method gave.

    layouts   of its visuals.
    signals   by name, one tensor per visual: [N, ...] (`cls_feature`: [De], `cls_features`: [views, De]).
    clusters  which tokens an encoder stage merged: equal numbers for each visual, [N]; None without one.
    chosen    which tokens of each visual come of frames that were encoded, [k] ascending; None where all were.
    left      how many tokens of each visual are left after either.
    pixels    small pictures of the tiles, where an adapter needs them to find out how they lie.
    merged    how many tokens each block of the encoder merged away; None without an encoder stage.
    seconds   how long the encoder took, nan where that is not measured.
    """

    modality: str
    layouts: list[Layout]
    signals: dict[str, list[Tensor]] = field(default_factory=dict)
    clusters: list[Tensor] | None = None
    chosen: list[Tensor] | None = None
    left: list[int] = field(default_factory=list)
    pixels: Tensor | None = None
    merged: list[int] | None = None
    seconds: float = float("nan")


class Adapter(Encoder):
    """What the runtime asks about a model. One subclass per architecture, in `mmcompress.adapters`."""

    reindexes: ClassVar[bool] = True
    """Whether position ids are a plain count, so that they can be numbered anew (M-RoPE families: no)."""
    delimited: ClassVar[bool] = False
    """Whether every run of placeholders stands between a start and an end token, which are no text."""
    opened: ClassVar[bool] = True
    """Whether there is a start token where `delimited`; without one, what is between two runs is one token, and ends a row."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.base: Any = body_of(model)
        self.config: Any = getattr(self.base, "config", model.config)
        self.language_model: Any = decoder_of(self.base)
        if self.language_model is None:
            raise NotImplementedError(
                f"{type(model).__name__} on {type(self.base.language_model).__name__} is not supported: this language model has no "
                f"list of decoder layers by the name `layers`, where tokens could be followed"
            )

    @functools.cached_property
    def placeholders(self) -> dict[str, int]:
        """Token id that stands for one token of a modality in `input_ids`, by modality."""
        found = {modality: placeholder(self.config, modality) for modality in MODALITIES}
        there = {*self.encoders.values(), *self.listened}
        return {m: token for m, token in found.items() if token is not None and m in there}

    @functools.cached_property
    def encoders(self) -> dict[str, str]:
        """Methods of the base model that encode pixels or sound, with the modality that each one encodes."""
        there = {f"get_{modality}_features": modality for modality in MODALITIES}
        return {
            name: modality for name, modality in there.items() if hasattr(self.base, name) and self._stands(modality)
        }

    @property
    def listened(self) -> dict[str, Any]:
        """Modules whose call means that a modality is encoded, where the base model has no method for it."""
        module = encoding(self.base, "audio")
        return {"audio": module} if isinstance(module, nn.Module) and self._stands("audio") else {}

    def _stands(self, modality: str) -> bool:
        # frames of videos may stand on the placeholders of pictures
        return modality != "audio" or placeholder(self.config, "audio") is not None

    @property
    def modalities(self) -> list[str]:
        """What this model takes beside text."""
        return [modality for modality in MODALITIES if modality in {*self.encoders.values(), *self.listened}]

    @property
    def tower(self) -> Any:
        return self.base.vision_tower

    @property
    def feature_blocks(self) -> list[int]:
        chosen, count = self.config.vision_feature_layer, len(self.blocks)
        states = [chosen] if isinstance(chosen, int) else list(chosen)
        # hidden_states[0] are the embeddings, hidden_states[i] is the output of block i - 1
        return [(state if state >= 0 else count + 1 + state) - 1 for state in states]

    def eye(self, modality: str) -> Adapter:
        """Who knows the encoder of a modality: this one, where all have the same; the same object each time."""
        return self

    @property
    def projector(self) -> nn.Module:
        """The module that receives the encoder features of the patches."""
        return self.base.multi_modal_projector

    @property
    def signals(self) -> frozenset[str]:
        """Names of the vision signals that this model can give."""
        raise NotImplementedError

    @property
    def lacks(self) -> str:
        """What methods cannot do with this model, for error messages."""
        return ""

    def check_encoder_call(self, arguments: dict[str, Any]) -> None:
        """Raise if a call of an encoder method asks for something that would make layout or signals wrong."""
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            given, configured = arguments.get(name), getattr(self.config, name, None)
            if isinstance(given, list | tuple) and isinstance(configured, list | tuple):
                given, configured = list(given), list(configured)
            if given is not None and given != configured:
                raise NotImplementedError(
                    f"{name}={given!r} was passed to a compressed model whose config says {configured!r}: change "
                    f"model.config.{name} before compress()"
                )

    def features(self, output: Any, arguments: dict[str, Any]) -> Sequence[Tensor]:
        """The features of each visual in what an encoder method gave for its arguments."""
        return output.pooler_output if hasattr(output, "pooler_output") else output[1]

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        """The visuals of one encoder call: its arguments, and how many tokens the features of each visual have."""
        raise NotImplementedError

    def mark(self, encoded: Encoded, features: Sequence[Tensor]) -> None:
        """Put into the layouts of an encoder call what only the features of its visuals tell."""

    def assemble(self, encoded: Encoded, runs: list[Run]) -> None:
        """Where an encoder call gives tiles and only the prompt says which of them make a picture: put them together.
        `runs` are all runs of placeholders, in order."""

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        """Send one value per token of the encoder's rows ([n, T, C]; packed or padded: [T, C]) the way that features take to the
        LLM: [N, C] for each visual, structural tokens left out. `nearest`: values are numbers of things and cannot be mixed."""
        raise NotImplementedError

    @property
    def structural(self) -> int:
        """How many tokens of every view reach the projector before the patches (CLS, where the model keeps it)."""
        return 0

    def views(self, encoded: Encoded, arguments: dict[str, Any]) -> list[int]:
        """How many rows of the encoder each visual has."""
        return [1] * len(encoded.layouts)

    def tap_features(self, record: Callable[[Tensor], None]) -> RemovableHandle:
        """A hook that calls `record` with the encoder features of the patches."""
        return self.projector.register_forward_pre_hook(functools.partial(_first_argument, record), with_kwargs=True)

    def feature_rows(self, features: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Encoder features as one row per LLM token, [n, N, De] (packed or padded: [N, De])."""
        if not (self.packed or self.padded):
            return features
        patches = features.reshape(-1, features.shape[-1])
        order = self.order(len(patches), arguments)
        # patch after patch; the projector takes a unit at a time
        return (
            (patches if order is None else patches[order.to(patches.device, non_blocking=True)])
            .unflatten(0, (-1, self.unit))
            .flatten(1)
        )

    def project(self, rows: Tensor) -> Tensor:
        """Encoder features [U, m, De] as LLM tokens [U, m, D]."""
        return self.projector(rows)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def in_windows(grids: tuple[tuple[int, ...], ...], side: int, window: int, patch: int) -> Tensor:
    """Where each unit of `grids` (frames, rows, columns) stands window after window, on the CPU. The same pictures come again."""
    sizes: dict[str, Any] = {"spatial_merge_size": side, "window_size": window, "patch_size": patch}
    return get_vision_window_index(torch.tensor(grids), **sizes)[0].argsort()


def _first_argument(record: Callable[[Tensor], None], module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
    record(args[0] if args else next(iter(kwargs.values())))
