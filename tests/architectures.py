# SPDX-License-Identifier: Apache-2.0
"""Every image-text and multimodal architecture of the installed transformers, tiny and random.

Configs are the defaults, shrunk by rules over nested configs, with overrides where a family needs one. Pictures follow
the signature of the method that encodes them, and placeholders the number of features that come back.
`python -m tests.architectures [NAMES]` prints what every stage does on each.
"""

from __future__ import annotations

import copy
import inspect
import json
import re
from typing import Any

import pytest
import torch
import transformers
from mmcompress.adapters import adapter_for
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig
from transformers.models.auto import modeling_auto

from mmcompress.architectures import FILE, REASONS, facts
from mmcompress.architectures import table as read_table

from .sounds import AUDIO, sounds
from .sounds import OVERRIDES as HEARD

SOUNDING = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})  # not in all supported versions
IMAGE_TEXT = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
CLASSES = {**SOUNDING, **IMAGE_TEXT}
OLDEST = transformers.__version__.startswith("5.17")
NAMES = tuple(CLASSES)
VOCABULARY, PAD, EOS, BOS, IMAGE, VIDEO = 160, 0, 1, 2, 150, 151
LAYERS, SIDE = 4, 32

RULES: list[tuple[str, int, int]] = [  # field, in a language model, in a vision encoder
    (r"(num_)?(hidden_layers|layers|(en|de)coder_layers|global_layers)|num_decoder_layers|n_layers|depth", 4, 4),
    (r"(decoder_)?hidden_size|d_model|embed_dim|word_embed_proj_dim", 64, 32),
    (r"(swa_)?num_key_value_heads|num_key_value_heads", 2, 2),
    (r"(\w+_)?(heads|num_heads|n_heads)", 4, 2),
    (r"(\w+_)?(intermediate_size|ffn_dim|d_ff|mlp_dim|intermediate_size_mlp)", 96, 48),
    (r"(\w+_)?head_dim|d_kv", 16, 16),
    (r"qk_nope_head_dim|qk_rope_head_dim", 8, 8),
    (r"q_lora_rank|kv_lora_rank|laurel_rank|hc_lowrank|loop_gate_rank", 16, 16),
    (r"(n_routed|num|num_local|moe_num)_experts", 4, 4),
    (r"num_experts_per_tok|moe_k|moe_topk", 2, 2),
    (r"n_group|topk_group|n_groups", 1, 1),
    (r"image_size|max_img_size|resolution", SIDE, SIDE),
    (r"patch_size", 4, 4),
    (r"\w*vocab_size\w*", VOCABULARY, VOCABULARY),
    (r"(out|output|text|projector|projection|encoder|merged|vision|moe)_\w*(hidden_size|hidden_dim|dim)", 64, 64),
    (r"(adapter_out|image_token_embed)_dim", 64, 64),
    (r"projection_dim", 64, 32),
    (r"base_channels|latent_channels|output_channels|num_filters|num_pos_feats", 32, 32),
    (r"mm_tokens_per_image|num_image_tokens|num_query_tokens|latent_query_num|\w*n(um)?_latents", 16, 16),
    (r"num_position_embeddings|num_patches|max_num_patches|image_seq_length", 64, 64),
    (r"position_embedding_size|pos_emb_(height|width)|posemb_grid_size", 16, 16),
    (r"sliding_window|sliding_window_size|attention_chunk_size", 24, 24),
    (r"index_topk|index_topk_blocks", 8, 8),
    (r"index_n_heads", 16, 16),  # with few, many scores are 0, and ties fall as they like
    (r"index_block_size|index_kpool", 4, 4),
]  # fmt: skip
INDICES = {"fullatt_block_indexes": [1, 3], "deepstack_visual_indexes": [0, 1, 2]}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
PARTIAL = {**MROPE, "mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}
VQ = {f"IMGIMG{''.join('ABCDEFGHIJ'[int(d)] for d in str(n))}Z": 4 + n for n in range(64)}
SAM = {"window_size": 4, "global_attn_indexes": [1, 3], "downsample_channels": [32, 64], "image_size": 64}
SQUARE = {"vision_config.image_size": [SIDE, SIDE], "vision_config.patch_size": [4, 4]}

OVERRIDES: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config.codebook_size": 64, "vision_config.embed_dim": 8, "vision_config.channel_multiplier": [1, 1],
        "vision_config.num_res_blocks": 1, "vision_config.attn_resolutions": [], "vision_config.spatial_scale_factor": 2,
        "image_token_offset": 4, "audio_token_offset": 68, "audio_config.codebook_dim": 32,
        "audio_config.codebook_size": 64,
    },
    "aria": {"projector_patch_to_query_dict": {64: 16}},
    "chameleon": {
        "vocabulary_map": {**VQ, "<image>": IMAGE}, "vq_config.num_embeddings": 64, "vq_config.channel_multiplier": [1, 1],
    },
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": MROPE}},
    "cosmos3_edge": {"text_config.rope_parameters": MROPE},
    "deepseek_ocr2": {
        "text_config.num_experts_per_tok": 2, "text_config.n_group": 1, "text_config.topk_group": 1,
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "vision_config.sam_config": SAM, "vision_config.encoder_config.hidden_size": 64,
    },
    "deepseek_vl_hybrid": {"high_res_vision_config": SAM},
    "diffusion_gemma": {
        "text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 32,
    },
    "dots3_note": {
        **{f"text_config.swa_{name}": 4 for name in ("num_attention_heads", "num_key_value_heads")},
        **{f"text_config.swa_{name}": 16 for name in ("q_lora_rank", "kv_lora_rank", "head_dim", "v_head_dim")},
        "text_config.swa_qk_nope_head_dim": 8, "vision_config.adapter_in_dim": 32, "audio_config.adapter_input_size": 32,
    },
    "emu3": {
        "vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 3} | {f"<|visual token {n:06}|>": 4 + n for n in range(64)},
        "vq_config.codebook_size": 64, "vq_config.channel_multiplier": [1, 1],
    },
    "ernie4_5_vl_moe": {
        "text_config.rope_parameters": {"mrope_section": [3, 3, 2]}, "text_config.moe_intermediate_size": [32, 24],
    },
    "fast_vlm": {
        "vision_config.architecture": "fastvit_t8", "vision_config.hidden_size": 128,
        "vision_config.model_args": {"inference_mode": True, "embed_dims": [8, 16, 32, 64], "layers": [1, 1, 1, 1]},
    },
    "florence2": {
        **{f"vision_config.{name}": [2] * 4 for name in ("num_heads", "num_groups", "depths")},
        "vision_config.embed_dim": [16] * 4, "vision_config.projection_dim": 64, "text_config.d_model": 64,
    },
    "gemma3n": {
        "text_config.num_kv_shared_layers": 0, "audio_config.vocab_offset": 153, "audio_soft_tokens_per_image": 16,
        "vision_soft_tokens_per_image": 16, "vision_config.hidden_size": 2048,
        "vision_config.model_args": {"channel_multiplier": 0.05, "msfa_output_resolution": 4},
    },
    "granite4_vision": {
        "downsample_rate": "4/8", "deepstack_layer_map": [[-1, 0], [-2, 1]], "spatial_target_layers": [0, 1, 2, 3],
        "vision_config.hidden_size": 64, "image_grid_pinpoints": [[32, 32]],
    },
    "hunyuan_vl": {"text_config.head_dim": 16, "text_config.rope_parameters": {"mrope_section": [2, 2, 2, 2]}},
    "kimi_k25": {"projection_hidden_size": 32},
    "mistral3": {"text_config.sliding_window": 24},
    "muse_glimmer": {"out_hidden_size": 128, "vision_config.pos_emb_height": 4, "vision_config.pos_emb_width": 4},
    "hy_v4_vl": {"text_config.rope_parameters": {"mrope_section": [1, 1, 2]}},
    "internvl": SQUARE,
    "janus": {"vq_config.channel_multiplier": [1, 1], "vision_config.projection_dim": 64},
    "lfm2_vl": {"text_config.layer_types": ["conv", "conv", "full_attention", "conv"]},
    "llama4": {
        "vision_config.intermediate_size": 128, "vision_config.projector_input_dim": 64,
        "vision_config.projector_output_dim": 64, "vision_config.vision_output_dim": 64,
    },
    "molmo2": {
        "adapter_config.vision_feature_layer": [3, 2], "vision_config.image_size": [SIDE, SIDE], "image_patch_id": IMAGE,
    },
    "muse_spark": {
        "out_hidden_size": 128, "audio_config.hidden_sizes": [8] * 4, "audio_config.depths": [1] * 4,
        "vision_config.pos_emb_height": 4, "vision_config.pos_emb_width": 4,
    },
    "nemotron_h_omni": {
        "vision_config.video_temporal_patch_size": 2, "image_token_id": IMAGE, "video_token_id": VIDEO,
        "vision_hidden_size": 32, "vision_config.patch_dim": 48, "vision_config.video_patch_dim": 96,
    },
    "ovis2": {"vision_config.hidden_stride": 2},
    "perception_lm": {
        "projector_pooling_ratio": 2,
        "vision_config.architecture": "vit_pe_core_tiny_patch16_384",
        "vision_config.model_args": {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": [32, 32], "patch_size": 4},
    },
    "qianfan_ocr": SQUARE,
    "qwen2_vl": {"text_config.rope_parameters": MROPE, "vision_config.hidden_size": 64},
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2, "text_config.indexer_kv_heads": 1, "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 8, "text_config.indexer_compress_ratio": 4,
    },
    "unlimited_ocr": {"vision_config.sam_config": {**SAM, "downsample_channels": [32, 32]}},
    "vipllava": {"vision_feature_layers": [-2, -3, -4, -1, 1]},
    **{name: {"image_token_id": IMAGE, "video_token_id": VIDEO, "insert_layer_id": 2, "vision_config.insert_layer_id": 2}
       for name in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    **{name: {"image_grid_pinpoints": [[32, 32]], "vision_config.patch_size": 8} for name in
       ("llava_next", "llava_next_video", "llava_onevision")},
    "step3p7": {
        "text_config.sliding_window": 24, "text_config.layer_types": ["full_attention", *["sliding_attention"] * 3],
        "vision_config.image_size": 64,
    },
    "qwen3_omni_moe_thinker": (omni := {
        "text_config.rope_parameters": MROPE, "vision_start_token_id": 140, "vision_end_token_id": 141,
    }),
    "qwen2_5_omni_thinker": {**omni, "vision_config.window_size": 16},
    **{name: {"vision_config.image_size": 64} for name in ("got_ocr2", "pp_chart2table")},
    "qwen2_5_vl": {"text_config.rope_parameters": MROPE, "vision_config.window_size": 16},
    "hyperclovax_vision_v2": {"vision_config.window_size": 16},
    "exaone4_5": {"vision_config.window_size": 16, "vision_config.num_key_value_heads": 1},
    **{name: {"text_config.rope_parameters": MROPE} for name in
       ("qwen3_vl", "qwen3_vl_moe", "cosmos3_omni",
        "paddleocr_vl", "glm_ocr", "qwen3_5", "qwen3_5_moe")},
    **HEARD,
    **{name: {"text_config.rope_parameters": PARTIAL} for name in ("glm4v", "glm46v", "glmga", "glm4v_moe")},
}  # fmt: skip
"""Fields by dotted path that the rules do not find, each by what the class asks for or by how it was released."""


def token(name: str) -> int:
    """The token id for the field `name` of a config: the same for the same purpose in every config."""
    kind = re.sub(r"_(token_id|token_index|id)$", "", name)
    known = {"pad": PAD, "eos": EOS, "bos": BOS, "image": IMAGE, "image_patch": IMAGE, "video": VIDEO, "audio": AUDIO}
    return known.get(kind, 128 + sum(map(ord, kind)) % 21)


def shrunk(config: PretrainedConfig, text: bool = True, nested: bool = False) -> dict[str, Any]:
    """The keywords that make a tiny config of the kind of `config`: of its layers the first, and one of every kind."""
    given = dict(vars(config))
    found: dict[str, Any] = {"model_type": config.model_type} if nested else {}
    depth = next((n for k in ("num_hidden_layers", "n_layers", "depth") if isinstance(n := given.get(k), int)), 0)
    lists = {k: list(v) for k, v in given.items() if depth and isinstance(v, list | tuple) and len(v) == depth}
    kinds = [tuple(v[i] for v in lists.values() if isinstance(v[0], str)) for i in range(depth)]
    firsts = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]][:LAYERS]
    rest = [i for i in range(depth) if i not in firsts]
    chosen = sorted(firsts + rest[: LAYERS - len(firsts)])
    usual = vars(type(config)()) if nested else given
    for name, value in given.items():
        if (
            not name.startswith("_")
            and isinstance(value, int | float | str | list | tuple)
            and value != usual.get(name)
        ):
            found[name] = value  # what the parent chose
        if isinstance(value, PretrainedConfig):
            sees = (
                re.search(r"vision|vit|vq|sam|image|encoder|qformer|perceiver|audio|adapter", name)
                and name != "encoder"
            )
            found[name] = shrunk(value, text and not sees, nested=True)
        elif name in lists:
            found[name] = [lists[name][i] for i in chosen]
        elif name in INDICES and depth:
            found[name] = INDICES[name]
        elif isinstance(value, bool) or name.startswith("_"):
            continue
        elif isinstance(value, int) and re.fullmatch(r"\w+_(token_id|token_index|id)", name):
            found[name] = token(name)
        elif isinstance(value, int):
            rules = [(t if text else v) for pattern, t, v in RULES if re.fullmatch(pattern, name)]
            if rules and value > rules[-1]:
                found[name] = rules[-1]
    if given.get("qk_rope_head_dim") is not None:  # of which it is made
        found.pop("head_dim", None), found.pop("qk_head_dim", None)
    if given.get("num_key_value_heads") == given.get("num_attention_heads") and "num_attention_heads" in found:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def config(name: str) -> PretrainedConfig:
    """A tiny config of the model type `name`."""
    cls = CONFIG_MAPPING[name]
    given = shrunk(cls())
    for path, value in copy.deepcopy(OVERRIDES.get(name, {})).items():  # configs change what they are given
        *parents, field = path.split(".")
        place = given
        for parent in parents:
            place = place.setdefault(parent, {})
        if isinstance(value, str) and field.endswith("_config"):
            value = shrunk(CONFIG_MAPPING[value](), text=field == "text_config", nested=True)
        if isinstance(value, dict) and isinstance(place.get(field), dict):
            value = {**place[field], **value}
        place[field] = value
    return cls(**given)


@torch.no_grad()
def build(name: str, seed: int = 0, attention: str | None = None) -> Any:
    """A random model whose tokens really differ, so that a wrong row, position or norm shows in the logits."""
    if name not in CLASSES:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(seed)
    wanted = {} if attention is None else {"attn_implementation": attention}
    return randomised(getattr(transformers, CLASSES[name])._from_config(config(name), **wanted).eval(), seed)


def randomised(model: Any, seed: int = 0) -> Any:
    """The model with other parameters, so that a wrong row, position or norm shows."""
    generator = torch.Generator().manual_seed(seed + 1)
    for part, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2:
            parameter += 0.2 * noise
        elif "embed_tokens" in part or "lm_head" in part:
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(noise * 1.5 / (parameter.numel() / parameter.shape[0]) ** 0.5)
    return model


def base_of(model: Any) -> Any:
    """The module that encodes pictures, or sounds."""
    doors = ("get_image_features", "get_audio_features", "audio_tower")
    inside = (getattr(model, model.base_model_prefix or "-", None), model)
    return next((m for m in inside if any(hasattr(m, door) for door in doors)), None)


def pictures(model: Any, rows: list[list[int]]) -> dict[str, Any]:
    """What the model is given for the pictures in each row of a batch (a number each, always the same picture), all of one
    size: packed patches (8 x 8) or squares."""
    accepted, kind = inspect.signature(base_of(model).get_image_features).parameters, model.config.model_type
    numbers = [number for row in rows for number in row]
    count = len(numbers)
    vision = getattr(model.config, "vision_config", model.config)
    patch = getattr(vision, "patch_size", 4)
    patch = patch if isinstance(patch, int) else patch[0]
    frames = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", 1)

    def noise(*shape: int) -> Tensor:
        return pictures_of(numbers, *shape)

    def same(*values: Any) -> Tensor:
        return torch.tensor(values).expand(count, *torch.tensor(values).shape).clone()

    packed = (64, 3 * frames * patch**2)
    if "image_grid_thw" in accepted:
        shape, grid = packed, same(1, 8, 8)
        if kind in ("paddleocr_vl", "kimi_k25"):
            shape = (64, 3, patch, patch)
        if kind.startswith("inkling2"):  # in merged patches
            shape, grid = (16, 2 * patch, 2 * patch, 3), same(1, 4, 4)
        found = {"pixel_values": noise(*shape).flatten(0, 1), "image_grid_thw": grid}
        return found | ({"image_merge_sizes": same(2)[:, 0]} if "image_merge_sizes" in accepted else {})
    if "spatial_shapes" in accepted:
        return {"pixel_values": noise(*packed), "spatial_shapes": same(8, 8), "pixel_attention_mask": same(*[1] * 64)}
    if "image_grid_hw" in accepted:
        return {"pixel_values": noise(*packed).flatten(0, 1), "image_grid_hw": same(8, 8)}
    if "image_token_pooling" in accepted:
        places = torch.arange(count * 64).view(count, 4, 2, 4, 2).transpose(2, 3).reshape(-1, 4)
        return {"pixel_values": noise(*packed), "image_token_pooling": places, "image_grids": same(4, 4, 0, 0)}
    if "target_sizes" in accepted:
        return {"pixel_values": torch.cat([*noise(3, patch, 64 * patch)], -1)[None], "target_sizes": same(8, 8).int()}
    if "image_position_ids" in accepted:
        side, patch = (4, 3 * patch) if kind == "gemma4_unified" else (12, patch)  # pooled 3 x 3
        places = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1).flatten(0, 1)
        return {"pixel_values": noise(side**2, 3 * patch**2), "image_position_ids": places.expand(count, -1, -1)}
    if kind == "fuyu":
        return {"pixel_values": noise(16, packed[1])}
    if kind == "inkling_mm_model":  # a token each
        return {"pixel_values": noise(16, frames, patch, patch, 3).flatten(0, 1)}
    side = 128 if kind == "fast_vlm" else getattr(vision, "image_size", None) or SIDE
    side = side if isinstance(side, int) else side[0]
    views = (2,) if hasattr(model.config, "image_grid_pinpoints") else (1,) if kind == "perception_lm" else ()
    found = {"pixel_values": noise(*views, 3, side, side)}
    if "image_sizes" in accepted and (kind != "llava" or vision.model_type == "pixtral"):
        found["image_sizes"] = same(side, side)
    if "high_res_pixel_values" in accepted:
        found["high_res_pixel_values"] = noise(3, 64, 64)
    if "pixel_attention_mask" in accepted:
        parts = found["pixel_values"].split([len(row) for row in rows])
        found["pixel_values"] = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        if kind == "granite_docling":
            found["pixel_attention_mask"] = (
                torch.arange(max(map(len, rows))) < torch.tensor([len(row) for row in rows])[:, None]
            )
    return found


def clips(model: Any, numbers: list[int]) -> dict[str, Any]:
    """What the model is given for videos of two frames (packed: of two temporal patches), each of one picture's size."""
    accepted, kind = inspect.signature(base_of(model).get_video_features).parameters, model.config.model_type
    frames = [2 * n + frame for n in numbers for frame in (0, 1)]
    if kind == "nemotron_h_omni":  # frames are channels
        pixels = pictures_of(frames, 3, SIDE, SIDE).view(len(numbers), 1, 6, SIDE, SIDE)
        return {"pixel_values_videos": pixels}
    if kind == "video_llava":
        return {"pixel_values_videos": pictures_of(frames, 3, SIDE, SIDE).unflatten(0, (len(numbers), 2))}
    image = pictures(model, [frames])
    if "target_sizes_videos" in accepted:
        return {"pixel_values_videos": image["pixel_values"], "target_sizes_videos": image["target_sizes"]}
    found = {"pixel_values_videos": image["pixel_values"]}
    if "video_grid_thw" in accepted:
        found["video_grid_thw"] = image["image_grid_thw"][::2] * torch.tensor([2, 1, 1])
    if "num_frames_per_video" in accepted:
        found |= {
            "video_position_ids": image["image_position_ids"],
            "num_frames_per_video": torch.tensor([2] * len(numbers)),
        }
    if "video_merge_sizes" in accepted:
        found["video_merge_sizes"] = image["image_merge_sizes"][::2]
    if "video_token_pooling" in accepted:
        found |= {
            "video_token_pooling": image["image_token_pooling"],
            "video_grids": torch.tensor([[2, 4, 4]] * len(numbers)),
        }
    return found


def pictures_of(numbers: list[int], *shape: int) -> Tensor:
    """Noise for each number, always the same."""
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(number)) for number in numbers])


def video_id(model: Any) -> int:
    """The token that features of videos are put at."""
    return IMAGE if model.config.model_type.startswith(("glm", "molmo", "nemotron")) else VIDEO


def lengths_of(base: Any, modality: str, found: dict[str, Any]) -> int:
    """How many tokens the features of what is given have."""
    encode = getattr(base, f"get_{modality}_features")
    accepted = inspect.signature(encode).parameters
    output = encode(**{name: value for name, value in found.items() if name in accepted})
    features = output.pooler_output
    if features is None:
        features = output.last_hidden_state if output.last_hidden_state is not None else output.deepstack_features[0][1]
    return sum(f.numel() // f.shape[-1] for f in features)


@torch.no_grad()
def prompts(model: Any, samples: list[list[int | str]], first: int = 0, runs: int = 2) -> dict[str, Any]:
    """Inputs for `samples`, padded on the left: an int is so many text tokens, a string the picture of that number, the sound
    after an "a", or the video after a "v", whose tokens stand in `runs` runs between marks of text."""
    base, config = base_of(model), model.config
    shown = [[part for part in sample if isinstance(part, str)] for sample in samples]
    rows_of = [[int(part) for part in row if part.isdigit()] for row in shown]
    films, heard = ([int(part[1:]) for row in shown for part in row if part[0] == letter] for letter in "va")
    found: dict[str, Any] = {}
    tokens = 0
    if any(rows_of):
        found = pictures(model, rows_of)
        tokens = lengths_of(base, "image", found) // sum(map(len, rows_of))
    if films:
        found |= (more := clips(model, films))
        frame = lengths_of(base, "video", more) // len(films) // runs
    lengths: list[int] = []
    if heard:
        more, lengths = sounds(model, base, heard)
        found |= more
    rows = []
    for number, sample in enumerate(samples, start=first):
        generator = torch.Generator().manual_seed(1000 + number)
        row: list[int] = []
        for part in sample:
            if isinstance(part, int):
                row += torch.randint(5, 120, (part,), generator=generator).tolist()
            elif part.isdigit():
                row += [IMAGE] * tokens
            elif part[0] == "a":
                start, end = (
                    [x] if (x := getattr(config, f"audio_{at}_token_id", None)) else [] for at in ("start", "end")
                )
                row += [*start, *[AUDIO] * lengths.pop(0), *end]
            else:
                start, end = (getattr(config, f"video_{at}_token_id", 120) for at in ("start", "end"))
                row += [start, *([121, *[video_id(model)] * frame] * runs), end]
        rows.append(row)
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    found |= {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
    }
    taken = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids"):
        if name in taken:
            found[name] = (ids == IMAGE).long() + (2 if name == "mm_token_type_ids" else 1) * (ids == VIDEO).long()
            if name == "mm_token_type_ids":
                found[name] += 3 * (ids == AUDIO).long()
            if films and name == "mm_token_type_ids" and video_id(model) == IMAGE:
                found[name] *= 2
    return {name: value for name, value in found.items() if name in taken}


SHARED = {word: part for word, (part, _) in REASONS.items()}
"""Why an architecture is refused, in a word, and a part of what is said."""
TABLE: dict[str, dict[str, Any]] = read_table()
"""What each kind of stage does on each architecture: "ok", or why it is refused (SHARED); and what its adapter says."""


def table(outcome: Any) -> str:
    """An outcome as it stands in TABLE."""
    if outcome.verdict not in ("refused", "none"):
        return str(outcome)
    return next((word for word, part in SHARED.items() if part in outcome.said), str(outcome))


def told(name: str) -> dict[str, Any]:
    """What the adapter of an architecture says of it, and its task, if transformers does not list it for pictures and text."""
    task = {} if name in IMAGE_TEXT else {"task": "multimodal"}
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[name])._from_config(config(name))
    try:
        return task | facts(adapter_for(model))
    except NotImplementedError:
        return task | facts(None)


def main(names: list[str], write: bool) -> None:
    """Print what every stage does on each architecture, and write it to the table of the tests."""
    from .exactness import PLANS, judge

    transformers.logging.set_verbosity_error()
    found: dict[str, dict[str, Any]] = {}
    for name in names or NAMES:
        found[name] = {}
        for kind in PLANS:
            outcome = judge(name, kind)
            found[name][kind] = table(outcome)
            print(f"{name:<24} {kind:<8} {outcome}"[:300].replace("\n", " "), flush=True)
        found[name] |= told(name)
    for kind in PLANS:
        print(f"{kind:<8} {sum(row[kind] == 'ok' for row in found.values())} of {len(found)} exact")
    if write:
        lines = (f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted({**TABLE, **found}.items()))
        FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    import sys

    main([name for name in sys.argv[1:] if name != "--write"], "--write" in sys.argv)
