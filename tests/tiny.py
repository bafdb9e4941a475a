# SPDX-License-Identifier: Apache-2.0
"""Tiny random LLaVA models and hand-made inputs: 16 visual tokens, 4 + 4 layers, no processor, no hub."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

OLDEST = transformers.__version__.startswith("5.17")
VOCABULARY, PAD, IMAGE = 160, 0, 150
TOKENS = 16
LAYERS = 4
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


def text_config(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": PAD,
        "bos_token_id": 2, "eos_token_id": 1,
    }  # fmt: skip
    return LlamaConfig(**{**sizes, **changes})


def build(
    tower: str = "clip", seed: int = 0, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """A random LLaVA whose tokens really differ, so that a wrong row or position shows in the logits."""
    torch.manual_seed(seed)
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 7,
    }  # fmt: skip
    vision = CLIPVisionConfig(**sizes) if tower == "clip" else SiglipVisionConfig(**sizes, vision_use_head=False)
    default = {"vision_feature_select_strategy": "default" if tower == "clip" else "full", "vision_feature_layer": -2}
    text = config.pop("text", None) or text_config()
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=IMAGE, **{**default, **config}
        )
    )
    model.set_attn_implementation(attention)
    model = model.to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        wide = (
            0.5
            if "lm_head" in name or "embed_tokens" in name
            else 0.3
            if "vision" in name or "projector" in name
            else 0.25
        )
        if parameter.dim() >= 2:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * wide
    scatter(model, generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def scatter(model: Any, generator: torch.Generator) -> None:
    """Makes every bias and every weight of a norm random (else they are 0 and 1): one that is forgotten shows."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.data = 0.2 * noise if name.endswith("bias") else parameter.data * (1 + 0.3 * noise)


def prompts(
    model: Any, samples: list[list[int | str]], seed: int = 0, side: str = "left", mask: bool = True
) -> dict[str, Tensor]:
    """Inputs for `samples`: an int is that many text tokens, "image" is an image."""
    generator = torch.Generator().manual_seed(seed)
    rows, pixels = [], []
    for sample in samples:
        ids: list[int] = []
        for part in sample:
            if part == "image":
                pixels.append(torch.randn(3, 28, 28, generator=generator))
                extra = (
                    1
                    if "full" in model.config.vision_feature_select_strategy
                    and "clip" in model.config.vision_config.model_type
                    else 0
                )
                ids += [IMAGE] * (TOKENS + extra)
            else:
                ids += torch.randint(5, 140, (int(part),), generator=generator).tolist()
        rows.append(ids)
    longest = max(map(len, rows))

    def padded(row: list[int], value: int) -> list[int]:
        fill = [value] * (longest - len(row))
        return fill + row if side == "left" else row + fill

    inputs = {"input_ids": torch.tensor([padded(row, PAD) for row in rows])}
    if mask:
        inputs["attention_mask"] = torch.tensor([padded([1] * len(row), 0) for row in rows])
    if pixels:
        inputs["pixel_values"] = torch.stack(pixels).to(model.dtype)
    return inputs


def handing(attention: Any, **more: Any) -> Any:
    """Lets an attention module hand further keywords to its attention function; returns what undoes it."""
    kind = type(attention)

    class Handing(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **{**kwargs, **more})

    attention.__class__ = Handing
    return lambda: setattr(attention, "__class__", kind)


RAGGED: list[list[int | str]] = [[5, "image", 4], [3, "image", 2, "image", 6]]
"""Two samples, one and two images: padding, several images, unequal numbers of visual tokens."""
ALIKE: list[list[int | str]] = [[4, "image", 3], [2, "image", 6]]
"""One image each (what stock 5.17 can expand for beams)."""


def single(inputs: dict[str, Tensor], row: int, images: list[int]) -> dict[str, Tensor]:
    """One sample of a left-padded batch by itself; `images` is the number of images of each sample."""
    length = int(inputs["attention_mask"][row].sum())
    first = sum(images[:row])
    return {
        "input_ids": inputs["input_ids"][row : row + 1, -length:],
        "attention_mask": inputs["attention_mask"][row : row + 1, -length:],
        "pixel_values": inputs["pixel_values"][first : first + images[row]],
    }
