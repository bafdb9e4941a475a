# SPDX-License-Identifier: Apache-2.0
"""Random models of every family, large enough that arithmetic and not overhead decides the time, with their inputs."""

from __future__ import annotations

from typing import Any

import torch
import transformers as t
from torch import Tensor

IMAGE, VIDEO, START, END = 32000, 32001, 32002, 32003
TEXT: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32064, "max_position_embeddings": 32768,
}  # fmt: skip
CLIP: dict[str, Any] = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "num_attention_heads": 16, "image_size": 336,
    "patch_size": 14,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "depth": 4, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": 1024,
    "intermediate_size": 2816, "out_hidden_size": 1024,
}  # fmt: skip
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
FAMILIES = {
    "llava": "LLaVA-1.5: CLIP-L/14-336 cut to 4 layers, 576 visual tokens",
    "llava_next": "LLaVA-NeXT: the same tower, two tiles and the thumbnail, 1752 visual tokens",
    "qwen2_5_vl": "Qwen2.5-VL: 4 blocks of 1024, two with windows, 756 x 756 pixels, 729 visual tokens",
    "qwen3_vl": "Qwen3-VL: 4 blocks of 1024, DeepStack on three, 756 x 756 pixels, 729 visual tokens",
    "internvl": "InternVL: InternViT-300M/14-448 cut to 4 layers, two tiles and the thumbnail, 768 visual tokens",
}
"""What stands for each family; the language model has LLaMA shapes, 1024 x 12, everywhere."""


def build(family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **text: Any) -> Any:
    """The random model of `family`; `text` changes the sizes of its language model."""
    torch.manual_seed(seed)
    sizes = {**TEXT, **text}
    clip = t.CLIPVisionConfig(**CLIP).to_dict()
    config: Any
    if family == "llava":
        config = t.LlavaConfig(
            vision_config=clip, text_config=t.LlamaConfig(**sizes).to_dict(), image_token_index=IMAGE
        )
    elif family == "llava_next":
        config = t.LlavaNextConfig(
            vision_config=clip, text_config=t.LlamaConfig(**sizes).to_dict(), image_token_index=IMAGE,
            image_grid_pinpoints=[[336, 672], [672, 336], [672, 672]],
        )  # fmt: skip
    elif family == "qwen2_5_vl":
        vision = {**QWEN, "out_hidden_size": sizes["hidden_size"], "window_size": 112, "fullatt_block_indexes": [1, 3]}
        config = t.Qwen2_5_VLConfig(text_config={**sizes, "rope_parameters": ROPE}, vision_config=vision, **IDS)
    elif family == "qwen3_vl":
        vision = {
            **QWEN, "out_hidden_size": sizes["hidden_size"], "num_position_embeddings": 2304, "deepstack_visual_indexes": [0, 1, 2],
        }  # fmt: skip
        rope = {**ROPE, "mrope_interleaved": True}
        text_config = {
            **sizes,
            "head_dim": sizes["hidden_size"] // sizes["num_attention_heads"],
            "rope_parameters": rope,
        }
        config = t.Qwen3VLConfig(text_config=text_config, vision_config=vision, **IDS)
    elif family == "internvl":
        vision = t.InternVLVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=16, image_size=[448, 448],
            patch_size=[14, 14],
        )  # fmt: skip
        config = t.InternVLConfig(
            vision_config=vision.to_dict(), text_config=t.Qwen2Config(**sizes).to_dict(), image_token_id=IMAGE
        )
    else:
        raise ValueError(f"no mid-size model {family!r}: there is {', '.join(FAMILIES)}")
    model: Any = t.AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = None
    return model.to(dtype).eval()


def one_image_prompt(model: Any, text_tokens: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """One image and `text_tokens` text tokens around it, on the model's device."""
    generator = torch.Generator().manual_seed(seed)
    kind = model.config.model_type

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(model.device, model.dtype)

    more: dict[str, Tensor] = {}
    if kind == "llava":
        tokens, more["pixel_values"] = 576, noise(1, 3, 336, 336)
    elif kind == "llava_next":
        tokens = 576 + 24 * (48 + 1)
        more = {"pixel_values": noise(1, 3, 3, 336, 336), "image_sizes": torch.tensor([[336, 672]])}
    elif kind == "internvl":
        tokens, more["pixel_values"] = 768, noise(3, 3, 448, 448)
    else:
        tokens, grid, patch = 729, torch.tensor([[1, 54, 54]]), model.config.vision_config.patch_size
        more = {"pixel_values": noise(54 * 54, 3 * 2 * patch**2), "image_grid_thw": grid}
    ids = _ids(model, model.config.image_token_id, tokens, text_tokens, generator)
    return {**ids, **{n: v.to(model.device) for n, v in more.items()}}


def _ids(model: Any, token: int, tokens: int, text_tokens: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Five text tokens, the placeholders between a start and an end token, the rest of the text."""
    text = torch.randint(5, 30000, (text_tokens,), generator=generator)
    config = model.config
    around = (getattr(config, f"vision_{name}_token_id", None) for name in ("start", "end"))
    start, end = (torch.tensor([own or usual]) for own, usual in zip(around, (START, END), strict=True))
    ids = torch.cat([text[:4], start, torch.full((tokens,), token), end, text[6:]])[None].to(model.device)
    if not hasattr(model.model, "visual"):
        return {"input_ids": ids}
    kinds = (ids == config.image_token_id).long() + 2 * (ids == config.video_token_id).long()
    return {"input_ids": ids, "mm_token_type_ids": kinds}


def large_picture(model: Any, text_tokens: int = 72, seed: int = 0) -> dict[str, Tensor]:
    """A picture of four tiles and the thumbnail for the LLaVA-NeXT, and `text_tokens` text tokens around it: 3,000 in all."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(1, 5, 3, 336, 336, generator=generator).to(model.device, model.dtype)
    ids = _ids(model, IMAGE, 576 + 48 * (48 + 1), text_tokens, generator)
    return {**ids, "pixel_values": pixels, "image_sizes": torch.tensor([[672, 672]], device=model.device)}


def long_video(frames: int = 20, side: int = 64) -> tuple[Any, dict[str, Tensor]]:
    """A small random Qwen2.5-VL and a video of frames * (side / 2)^2 tokens (20,480 by default)."""
    torch.manual_seed(0)
    vision = {**QWEN, "depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 64, "intermediate_size": 128}
    vision |= {"out_hidden_size": 256, "window_size": 64, "fullatt_block_indexes": [1]}
    text = {**TEXT, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"num_key_value_heads": 4, "rope_parameters": ROPE}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **IDS)
    model: Any = t.AutoModelForImageTextToText.from_config(config)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(frames * side * side, 3 * 2 * 16, generator=generator)
    inputs = {
        **_ids(model, VIDEO, frames * (side // 2) ** 2, 40, generator),
        "pixel_values_videos": pixels,
        "video_grid_thw": torch.tensor([[frames, side, side]]),
        "second_per_grid_ts": torch.ones(1),
    }
    return model.eval(), inputs
