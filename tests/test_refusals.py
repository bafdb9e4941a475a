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


def test_what_is_no_module_is_told_what_to_give() -> None:
    with pytest.raises(TypeError, match="a diffusion pipeline draws pictures and reads none"):
        mm.compress(StableDiffusionPipeline(), "divprune")
    with pytest.raises(TypeError, match=r"give the model in it, compress\(simplenamespace.model, \.\.\.\)"):
        mm.compress(SimpleNamespace(model=tiny.build(), tokenizer=None), "divprune")
    with pytest.raises(TypeError, match=r"got .{,120}: give the loaded model, as from_pretrained returns it$"):
        mm.compress("x" * 1000, "divprune")
