# SPDX-License-Identifier: Apache-2.0
"""Why tokens of a model cannot be dropped at the input of a language model, by how it is built."""

from __future__ import annotations

import inspect
import re
from typing import Any

from transformers import GenerationMixin

from ..stage import MODALITIES, USUAL
from .adapter import body_of, config_of, decoder_of, encoding, placeholder
from .deepstack import NAMES as DEEPSTACK


def refusal(model: Any) -> str | None:
    """Why no visual tokens of `model` can be dropped at the input of a language model; None if they can."""
    config: Any = getattr(model, "config", None)
    base = body_of(model)
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
