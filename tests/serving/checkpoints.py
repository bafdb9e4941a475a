# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints that vLLM loads: one with random weights of each family, and those that are embedded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as T
from mmcompress.assets import model_path
from safetensors.torch import load_file, save_file

HEAD = 32
"""vLLM's attention on the CPU takes no narrower heads."""
TEXT = {
    "vocab_size": 80, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": HEAD, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 1,
}  # fmt: skip
SIGLIP = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 96,
    "patch_size": 8, "vision_use_head": False, "model_type": "siglip_vision_model",
}  # fmt: skip
OWN = {
    "llava": "llava-shapes",
    "llava-next": "llava-next-shapes",
    "llava-onevision": "llava-shapes",
    "qwen2-vl": "qwen3-vl-shapes",
    "qwen2.5-vl": "qwen3-vl-shapes",
    "qwen3-vl": "qwen3-vl-shapes",
    "qwen3-vl-moe": "qwen3-vl-shapes",
    "internvl": "internvl-shapes",
}
"""Families, and the embedded model whose tokenizer (and, where it is of the family, config and processor) is taken."""
IMAGE = dict.fromkeys(OWN, "<image>") | {
    name: "<|vision_start|><|image_pad|><|vision_end|>" for name in OWN if name.startswith("qwen")
}
IMAGE["internvl"] = "<IMG_CONTEXT>"
"""What stands for an image in a prompt."""


def checkpoint(name: str, folder: Path) -> str:
    """A checkpoint in `folder`: of a family with random weights, or an embedded one as vLLM reads it."""
    path = folder / name
    if not (path / "done").exists():
        shutil.rmtree(path, ignore_errors=True)
        if name in OWN:
            model, processor = _made(name)
            processor.save_pretrained(path)
            _scattered(model).save_pretrained(path)
        else:
            shutil.copytree(model_path(name), path)
        _renamed(path)
        (path / "done").touch()
    return str(path)


def _made(name: str) -> tuple[Any, Any]:
    """Model and processor of a family."""
    origin = model_path(OWN[name])
    if f"{name}-shapes" == OWN[name]:
        config = T.AutoConfig.from_pretrained(origin)
        config.dtype = "float32"
        return T.AutoModelForImageTextToText.from_config(config), T.AutoProcessor.from_pretrained(origin)
    if name == "llava-onevision":
        return _onevision(T.AutoTokenizer.from_pretrained(origin))
    processor = T.AutoProcessor.from_pretrained(origin)
    tokens = {
        f"{what}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{mark}|>")
        for what, mark in (
            ("image", "image_pad"), ("video", "video_pad"), ("vision_start", "vision_start"), ("vision_end", "vision_end")
        )
    }  # fmt: skip
    if name == "qwen3-vl-moe":
        kept = T.AutoConfig.from_pretrained(origin)
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
        text = TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "rope_parameters": rope}
        text |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}  # as released ones say
        config = T.Qwen3VLMoeConfig(
            vision_config=kept.vision_config.to_dict() | {"model_type": "qwen3_vl_moe_vision"},
            text_config=text,
            **tokens,
        )
        return T.Qwen3VLMoeForConditionalGeneration(config), processor
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {k: v for k, v in TEXT.items() if k != "head_dim"} | {"rope_parameters": rope}
    sizes = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2}
    images = T.Qwen2VLImageProcessor(min_pixels=32 * 32, max_pixels=192 * 192, patch_size=8)
    videos = T.Qwen2VLVideoProcessor(min_pixels=32 * 32, max_pixels=96 * 96, patch_size=8)
    if name == "qwen2-vl":
        vision = sizes | {"depth": 4, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2, "num_heads": 2}
        config = T.Qwen2VLConfig(vision_config=vision, text_config=text, **tokens)
        kind: Any = T.Qwen2VLProcessor
        model: Any = T.Qwen2VLForConditionalGeneration(config)
    else:
        vision = sizes | {
            "depth": 4, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128, "window_size": 64,
            "fullatt_block_indexes": [1, 3], "hidden_act": "silu", "tokens_per_second": 2,
        }  # fmt: skip
        config = T.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **tokens)
        kind, model = T.Qwen2_5_VLProcessor, T.Qwen2_5_VLForConditionalGeneration(config)
    return model, kind(images, processor.tokenizer, videos, chat_template=processor.chat_template)


def _onevision(tokenizer: Any) -> tuple[Any, Any]:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    pinpoints = [[96, 96], [96, 192], [192, 96], [192, 192]]
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    config = T.LlavaOnevisionConfig(
        vision_config=SIGLIP, text_config=text | {"model_type": "qwen2"}, image_grid_pinpoints=pinpoints,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
    )  # fmt: skip
    size = {"height": 96, "width": 96}
    processor = T.LlavaOnevisionProcessor(
        T.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints), tokenizer,
        T.LlavaOnevisionVideoProcessor(size=size), num_image_tokens=144, vision_feature_select_strategy="full",
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    return T.LlavaOnevisionForConditionalGeneration(config), processor


def _scattered(model: Any) -> Any:
    """Random weights: so large in the language model that the most likely token is clear, and smaller in the tower, which else
    makes of the last bit of a number another answer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                fan_in = parameter.shape[1] if parameter.dim() == 3 and "experts" in name else parameter[0].numel()
                scale = 1.0 if "vision" in name or "visual" in name else 3.0
                parameter.copy_(noise * (1.0 if "embed_tokens" in name else scale / fan_in**0.5))
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.1 * noise if "norm" in name or "ln" in name else 0.5 * noise)
    return model.float().eval()


def _renamed(path: Path) -> None:
    """Weights as they are on the hub, which vLLM reads; transformers 5 saves towers by a shorter name, and experts transposed."""
    config = json.loads((path / "config.json").read_text())
    tower = config["vision_config"]["model_type"] in ("clip_vision_model", "siglip_vision_model")
    for file in path.glob("*.safetensors"):
        weights = {}
        for name, x in load_file(file).items():
            if tower and "vision_tower.vision_model." not in name:
                name = name.replace("vision_tower.", "vision_tower.vision_model.")
            weights[name] = x.transpose(1, 2).contiguous() if ".experts." in name else x
        save_file(weights, file, {"format": "pt"})
