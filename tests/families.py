# SPDX-License-Identifier: Apache-2.0
"""Tiny random models of every family and hand-made inputs: a few layers, no processor, no hub."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import transformers
from mmcompress.adapters.layouts import AnyRes
from torch import Tensor

from .tiny import IMAGE, PAD, scatter

VIDEO, START, END = 151, 152, 153
TEXT: dict[str, Any] = {
    "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 4096, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
PINPOINTS = {
    "llava_next": [[28, 56], [56, 28], [56, 56]],
    "llava_next_video": [[28, 56], [56, 28], [56, 56]],
    "llava_onevision": [[28, 28], [28, 56], [56, 28], [56, 56], [84, 84], [112, 112]],
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
FAMILIES = ("llava", *PINPOINTS, *QWEN, "internvl", "internvl_qwen3")
VIDEO_FAMILIES = ("llava_next_video", "llava_onevision", *QWEN)
SIDE = 4
"""Patches per side of a view in the LLaVA families, LLM tokens per side of a tile in InternVL."""

Part: TypeAlias = "int | tuple[Any, ...]"
"""Of a prompt: so many text tokens; ("image", height, width) in pixels (Qwen: patches; InternVL: rows and columns of
tiles); ("video", frames, height, width) (frames are temporal patches in Qwen)."""


def config(family: str, **changes: Any) -> Any:
    """A config of `family`; `changes` are made to the text config."""
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    clip = transformers.CLIPVisionConfig(**VISION).to_dict()
    llama = transformers.LlamaConfig(**TEXT | changes).to_dict()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    qwen: dict[str, Any] = {
        "depth": 4, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    if family == "llava":
        return transformers.LlavaConfig(
            vision_config=clip, text_config=llama, image_token_index=IMAGE, vision_feature_layer=-2
        )
    if family in ("llava_next", "llava_next_video"):
        cls = transformers.LlavaNextConfig if family == "llava_next" else transformers.LlavaNextVideoConfig
        more = {} if family == "llava_next" else {"video_token_index": VIDEO}
        return cls(
            vision_config=clip,
            text_config=llama,
            image_token_index=IMAGE,
            image_grid_pinpoints=PINPOINTS[family],
            **more,
        )
    if family == "llava_onevision":
        return transformers.LlavaOnevisionConfig(
            vision_config=transformers.SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
            text_config=transformers.Qwen2Config(**TEXT | changes).to_dict(), image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=PINPOINTS[family],
        )  # fmt: skip
    if family == "qwen2_vl":
        vision = {**qwen, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
        return transformers.Qwen2VLConfig(
            text_config={**TEXT, "rope_parameters": rope} | changes, vision_config=vision, **ids
        )
    if family == "qwen2_5_vl":
        vision = {
            **qwen, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "window_size": 16,
            "fullatt_block_indexes": [1, 3], "tokens_per_second": 2,
        }  # fmt: skip
        return transformers.Qwen2_5_VLConfig(
            text_config={**TEXT, "rope_parameters": rope} | changes, vision_config=vision, **ids
        )
    if family == "qwen3_vl":
        vision = {
            **qwen, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        }  # fmt: skip
        text = {**TEXT, "head_dim": 16, "rope_parameters": {**rope, "mrope_interleaved": True}} | changes
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    if family in ("internvl", "internvl_qwen3"):
        normed = family == "internvl_qwen3"
        vision = transformers.InternVLVisionConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, image_size=[32, 32],
            patch_size=[4, 4], use_qk_norm=normed, norm_type="rms_norm" if normed else "layer_norm",
        )  # fmt: skip
        text = (
            transformers.Qwen3Config(**TEXT | changes, head_dim=16)
            if normed
            else transformers.Qwen2Config(**TEXT | changes)
        )
        return transformers.InternVLConfig(
            vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_id=IMAGE, image_seq_length=SIDE**2
        )
    raise KeyError(family)


def build(
    family: str, seed: int = 0, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes: Any
) -> Any:
    """A random model whose tokens really differ, so that a wrong row or position shows in the logits."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForImageTextToText.from_config(config(family, **changes))
    model.set_attn_implementation(attention)
    model = model.to(dtype).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for name, parameter in model.named_parameters():
        words = "lm_head" in name or "embed_tokens" in name
        seeing = any(part in name for part in ("vision", "visual", "projector"))
        if parameter.dim() >= 2 or "newline" in name:
            wide = 0.5 if words else 0.3 if seeing else 0.25
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * wide
    scatter(model, generator)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, START, END]
    return model


def image(family: str, other: bool = False) -> Part:
    """An image of a common shape, or another one."""
    if family == "llava":
        return ("image", 28, 28)
    if family in PINPOINTS:
        return ("image", 50, 50) if other else ("image", 20, 50)
    if family in QWEN:
        return ("image", 8, 8) if other else ("image", 8, 12)
    return ("image", 1, 1) if other else ("image", 1, 2)


def video(family: str) -> Part:
    return ("video", 2, 8, 12) if family in QWEN else ("video", 3, 28, 28)


def anyres(family: str, height: int, width: int) -> AnyRes:
    most = 9 if family == "llava_onevision" else None
    pinpoints = tuple((h, w) for h, w in PINPOINTS[family])
    return AnyRes((height, width), pinpoints, VISION["image_size"], VISION["patch_size"], most_tiles=most)


def prompts(
    model: Any, family: str, samples: list[list[Part]], seed: int = 0, side: str = "left", mask: bool = True
) -> dict[str, Tensor]:
    """Inputs for forward and generate."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows: list[list[int]] = []
    images: list[Tensor] = []
    videos: list[Tensor] = []
    sizes: list[list[int]] = []
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for sample in samples:
        ids: list[int] = []
        for part in sample:
            if isinstance(part, int):
                ids += torch.randint(5, 140, (part,), generator=generator).tolist()
            elif family in QWEN:
                kind, *grid = part
                frames, height, width = grid if kind == "video" else (1, *grid)
                (images if kind == "image" else videos).append(noise(frames * height * width, 3 * 2 * 16))
                grids[kind].append([frames, height, width])
                token, tokens = (IMAGE if kind == "image" else VIDEO), height * width // 4
                runs = frames if family == "qwen3_vl" else 1  # a time stamp before every frame of a video
                for run in range(runs):
                    stamp = [20 + run] if kind == "video" and runs > 1 else []
                    ids += [*stamp, START, *[token] * (tokens * frames // runs), END]
            elif part[0] == "video":
                pooled = SIDE // 2
                videos.append(noise(1, part[1], 3, 28, 28))
                ids += [VIDEO] * (part[1] * pooled**2 + (family == "llava_onevision"))
            elif family == "llava":
                images.append(noise(1, 3, 28, 28))
                ids += [IMAGE] * SIDE**2
            elif family in PINPOINTS:
                cut = anyres(family, part[1], part[2])
                images.append(noise(1 + cut.tiles[0] * cut.tiles[1], 3, 28, 28))
                sizes.append([part[1], part[2]])
                ids += [IMAGE] * cut.layout().tokens
            else:
                tiles = part[1] * part[2] + (part[1] * part[2] > 1)
                images.append(noise(tiles, 3, 32, 32))
                ids += [START, *[IMAGE] * (tiles * SIDE**2), END]
        rows.append(ids)
    longest = max(map(len, rows))

    def padded(row: list[int], value: int) -> list[int]:
        fill = [value] * (longest - len(row))
        return fill + row if side == "left" else row + fill

    inputs = {"input_ids": torch.tensor([padded(row, PAD) for row in rows])}
    if mask:
        inputs["attention_mask"] = torch.tensor([padded([1] * len(row), 0) for row in rows])
    if family in QWEN:
        ids_ = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids_ == IMAGE).long() + 2 * (ids_ == VIDEO).long()
        for kind, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if grids[kind]:
                inputs[name] = torch.cat(images if kind == "image" else videos).to(model.dtype)
                inputs[f"{kind}_grid_thw"] = torch.tensor(grids[kind])
        if grids["video"] and family == "qwen2_5_vl":
            inputs["second_per_grid_ts"] = torch.ones(len(videos))
        return inputs
    if family in PINPOINTS and images:
        most = max(map(len, images))
        images = [torch.cat([i, i.new_zeros(most - len(i), *i.shape[1:])])[None] for i in images]
        inputs["image_sizes"] = torch.tensor(sizes)
    if images:
        inputs["pixel_values"] = torch.cat(images).to(model.dtype)
    if videos:
        inputs["pixel_values_videos"] = torch.cat(videos).to(model.dtype)
    return inputs
