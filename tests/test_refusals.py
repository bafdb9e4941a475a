# SPDX-License-Identifier: Apache-2.0
"""What `compress` is given and cannot work on is told what it is, and what to do instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import mmcompress as mm

from . import tiny
from .architectures import CLASSES, OLDEST, config


class Denoiser(nn.Module):
    """As diffusers makes it: a module with a dictionary for a config."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30.0"}


class StableDiffusionPipeline:
    """As diffusers makes it: no module, but modules and a scheduler."""

    config_name = "model_index.json"

    def __init__(self) -> None:
        self.unet, self.vae, self.scheduler = Denoiser(), nn.Linear(2, 2), object()


def on_meta(cls: str, config: Any) -> Any:
    with torch.device("meta"):
        return getattr(transformers, cls)(config)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Denoiser, "Denoiser is not supported: it is a diffusion model, which draws pictures and reads none"),
        (
            lambda: on_meta("LlamaForCausalLM", transformers.LlamaConfig(num_hidden_layers=1)),
            "it takes no pictures and no audio, so it has no tokens of them: load one that does by AutoModelForImageTextToText",
        ),
        (
            lambda: on_meta("Florence2ForConditionalGeneration", transformers.Florence2Config()),
            "it is an encoder-decoder: .*; smaller pictures make the encoder cheaper",
        ),
        (
            lambda: on_meta("MllamaForConditionalGeneration", transformers.MllamaConfig()),
            "looks at pictures by cross-attention: .*; smaller pictures, or fewer tiles, make that cheaper",
        ),
    ],
)
def test_a_model_is_told_what_it_is_and_what_to_do_instead(model: Any, said: str) -> None:
    with pytest.raises(NotImplementedError, match=said + ".*`mmcompress models` lists all"):
        mm.compress(model(), "divprune")


@pytest.mark.skipif(OLDEST, reason="tiny configs are those of the newest transformers")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("chameleon", "its base model is itself the decoder"),
        ("blip-2", r"its own generate\(\) runs its language_model by itself.*; its 16 tokens per picture are few"),
        (
            "kosmos-2",
            r"features apart from the tokens \(image_embeds, image_embeds_position_mask\) and puts them together itself",
        ),
    ],
)
def test_a_model_without_a_place_in_front_of_its_decoder_is_told_why(name: str, said: str) -> None:
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[name])._from_config(config(name))
    with pytest.raises(NotImplementedError, match=said):
        mm.compress(model, "divprune")


def test_a_language_model_of_two_parts_is_an_encoder_decoder() -> None:
    """BLIP-2 on T5."""
    text = transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16)
    model = on_meta("Blip2ForConditionalGeneration", transformers.Blip2Config(text_config=text.to_dict()))
    with pytest.raises(NotImplementedError, match="it is an encoder-decoder: pictures enter its encoder"):
        mm.compress(model, "divprune")


def test_what_is_no_module_is_told_what_to_give() -> None:
    with pytest.raises(TypeError, match="a diffusion pipeline draws pictures and reads none"):
        mm.compress(StableDiffusionPipeline(), "divprune")
    with pytest.raises(TypeError, match=r"give the model in it, compress\(simplenamespace.model, \.\.\.\)"):
        mm.compress(SimpleNamespace(model=tiny.build(), tokenizer=None), "divprune")
    with pytest.raises(TypeError, match=r"got .{,120}: give the loaded model, as from_pretrained returns it$"):
        mm.compress("x" * 1000, "divprune")
