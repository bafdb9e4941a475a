# SPDX-License-Identifier: Apache-2.0
"""Other vision-language models of transformers that follow the common interface: stages that need only features."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import GenerationMixin

from ..runtime.adapter import Adapter, Encoded, Run, body_of, config_of, decoder_of, encoding, placeholder
from ..runtime.deepstack import NAMES as DEEPSTACK
from ..runtime.structural import StructuralTokens, ruled
from ..stage import MODALITIES, USUAL
from ..visuals import Layout


class CommonAdapter(Adapter):
    """A model with `get_image_features` (of videos, of audio), one placeholder id per token, and a language model. Nothing is
    known of its encoders: no signals, no encoder stages, and a layout that is just a row of tokens."""

    family: ClassVar[str] = (
        "other models with get_image_features and config.image_token_id, or those of audio (input and layer stages only)"
    )

    @classmethod
    def matches(cls, model: Any) -> bool:
        return refusal(model) is None

    @property
    def reindexes(self) -> bool:  # type: ignore[override]
        return not hasattr(self.base, "get_rope_index")  # which makes positions of several axes

    @property
    def blocks(self) -> list[Any]:
        raise NotImplementedError(f"{self.lacks}: stages inside the vision encoder are not possible")

    @property
    def signals(self) -> frozenset[str]:
        return frozenset()

    @property
    def lacks(self) -> str:
        tower = getattr(getattr(self.config, "vision_config", None), "model_type", "")
        of = type(self.model).__name__ + (f" ({tower})" if tower else "")
        return f"the vision encoder of {of} is not known to mmcompress"

    def features(self, output: Any, arguments: dict[str, Any]) -> Sequence[Tensor]:
        features, states = output.pooler_output, output.last_hidden_state
        if features is None:  # none, or all of them enter layers
            features = states if states is not None else output.deepstack_features[0][1]
        pixels = arguments.get("pixel_values")
        if pixels is None or pixels.dim() != 5 or len(features) != len(pixels) or states is None or states.dim() != 3:
            return features
        lengths = [f.numel() // f.shape[-1] for f in features]  # [samples, pictures, C, H, W]: one tensor per sample
        each = sum(lengths) // len(states)
        if each * len(states) != sum(lengths) or any(length % each for length in lengths):
            return features
        return torch.cat([f.flatten(0, -2) for f in features]).split(each)

    def encoded(self, modality: str, arguments: dict[str, Any], lengths: Sequence[int]) -> Encoded:
        return Encoded(modality, [Layout.raster(1, 1, length) for length in lengths])

    def assemble(self, encoded: Encoded, runs: list[Run]) -> None:
        """Where features come token by token, a run of placeholders is a picture."""
        if len(encoded.layouts) == sum(run.length for run in runs) > len(runs):
            encoded.layouts = [Layout.raster(1, 1, run.length) for run in runs]

    @functools.cached_property
    def structural_tokens(self) -> StructuralTokens:
        return StructuralTokens(self.base, self.language_model)

    def mark(self, encoded: Encoded, features: Sequence[Tensor]) -> None:
        layouts = encoded.layouts
        if not self.structural_tokens or any(layout != Layout.raster(1, 1, layout.tokens) for layout in layouts):
            return  # none are made of parameters, or it is known how the tokens lie
        which = self.structural_tokens.among(torch.cat([f.flatten(0, -2) for f in features]))
        for i, part in enumerate(which.split([layout.tokens for layout in layouts])):
            if part.any():
                layouts[i] = ruled(part, encoded.modality == "image")

    def arrange(self, encoded: Encoded, arguments: dict[str, Any], rows: Tensor, nearest: bool = False) -> list[Tensor]:
        raise AssertionError("no signals, nothing to arrange")


def refusal(model: Any) -> str | None:
    """Why no visual tokens of `model` can be dropped at the input of a language model; None if they can."""
    config, base = getattr(model, "config", None), body_of(model)
    if not hasattr(model, "base_model_prefix"):
        drawn = hasattr(config, "get") and config.get("_diffusers_version")
        return (
            "it is a diffusion model, which draws pictures and reads none"
            if drawn
            else "it is no model of transformers"
        )
    for name, child in model.named_children():
        if hasattr(child, "base_model_prefix") and body_of(child) is not child and refusal(child) is None:
            return f"it wraps the model that sees: compress(model.{name}, ...)"
    taken = [m for m in MODALITIES if m in getattr(model, "input_modalities", MODALITIES) or encoding(base, m)]
    encoded = [modality for modality in taken if encoding(base, modality) is not None]
    if not taken:
        return (
            "it takes no pictures and no audio, so it has no tokens of them: load one that does by AutoModelForImageTextToText or "
            "AutoModelForMultimodalLM"
        )
    what, kind = ("pictures", "visual") if {*USUAL}.intersection(encoded or taken) else ("sounds", "audio")
    behind = getattr(getattr(base, "language_model", None), "config", None)
    two = any(getattr(one, "is_encoder_decoder", False) for one in (config, behind))
    if two or (hasattr(base, "encoder") and hasattr(base, "decoder")):
        return (
            f"it is an encoder-decoder: {what} enter its encoder, and no {kind} tokens stand in the prompt of its decoder; "
            f"smaller {what} make the encoder cheaper"
        )
    crossing = re.compile(r"^(?!.*(qformer|projector|vision)).*cross_?att")
    if any(crossing.match(name) for name, _ in base.named_modules()):
        return (
            "its language model looks at pictures by cross-attention: no visual tokens stand in its prompt; smaller pictures, or "
            "fewer tiles, make that cheaper"
        )
    standing = [modality for modality in MODALITIES if placeholder(config_of(model), modality) is not None]
    if not encoded and (standing or what == "pictures"):
        return f"it encodes {what} inside its forward pass: its base model has no get_{taken[0]}_features"
    if not standing and what == "sounds":
        return f"no token of its prompts stands for a part of {what}: config has no audio_token_id"
    decoder = decoder_of(base)
    if decoder is None and hasattr(base, "layers"):
        return (
            "its base model is itself the decoder and puts features among its embeddings inside its forward pass: there is no "
            "place between them where tokens could be dropped"
        )
    if decoder is None and (alone := _runs_alone(model, base)):
        return (
            f"its own generate() runs {alone} by itself, with features among the embeddings already: nothing is called in "
            f"between where tokens could be dropped; its {getattr(config, 'num_query_tokens', 'few')} tokens per picture are few"
        )
    if decoder is None:
        return (
            "its base model has no decoder apart (language_model or text_model with layers) that is given embeddings, in "
            f"front of which {kind} tokens could be dropped"
        )
    takes = inspect.signature(decoder.forward).parameters
    if apart := [name for name in takes if re.match("(?!inputs|deepstack).*embeds", name)]:
        return (
            f"its language model is given features apart from the tokens ({', '.join(apart)}) and puts them together itself: "
            f"there is no place between them where tokens could be dropped"
        )
    if not standing:
        return "no token of its prompts stands for a visual token: config has no image_token_id"
    other = [name for name in takes if "deepstack" in name]
    if set(other) - DEEPSTACK:
        return f"its features enter layers of the language model in a form that is not supported ({', '.join(other)})"
    return None


def _runs_alone(model: Any, base: Any) -> str | None:
    """The part of a base model that the model's own `generate` generates with, so that no call of the base model is made."""
    own = getattr(type(model), "generate", None)
    if own is None or own is GenerationMixin.generate:
        return None
    called = inspect.unwrap(own).__code__.co_names
    return next((f"its {name}" for name in called if hasattr(getattr(base, name, None), "generate")), None)
