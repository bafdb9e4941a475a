# SPDX-License-Identifier: Apache-2.0
"""Sounds for the tiny models of tests/architectures.py, after what the method that encodes them takes."""

from __future__ import annotations

import inspect
from typing import Any

import torch

AUDIO = 152
"""The token that stands for a token of a sound."""
FRAMES, SAMPLES = 64, 2000
CONFORMER = {
    "encoder_config.hidden_dim": 32,
    "encoder_config.num_heads": 2,
    "encoder_config.dim_head": 16,
    "encoder_config.num_layers": 2,
    "encoder_config.context_size": 20,
    "encoder_config.output_dim": 8,
    "projector_config.encoder_hidden_size": 32,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
CODEC = {"num_filters": 4, "downsampling_ratios": [4, 5, 5], "depths": [1, 1, 1, 1], "hidden_size": 16}

OVERRIDES: dict[str, dict[str, Any]] = {
    "fun_asr_nano": {
        "adaptor_config.hidden_size": 64, "adaptor_config.intermediate_size": 16,
        "audio_config.num_timestamp_prediction_layers": 1,
    },
    "gemma4": {"vision_config": "gemma4_vision", "audio_config": "gemma4_audio"},
    "gemma4_unified": {"vision_config": "gemma4_unified_vision", "audio_config": "gemma4_unified_audio"},
    "glmasr": {"audio_config.intermediate_size": 128},
    "granite_speech": CONFORMER,
    "granite_speech_plus": CONFORMER,
    "kyutai_speech_to_text": {
        "codec_config.num_filters": 8, "codec_config.upsample_groups": 32, "codec_config.codebook_dim": 16,
        "codec_config.vector_quantization_hidden_dimension": 16, "codec_config.codebook_size": 64, "pad_token_id": 3,
    },
    "moss_transcribe_diarize": {"audio_config.max_source_positions": FRAMES // 2},
    "nemo_speechlm": {
        "audio_config.diarization_config.head_config.audio_hidden_size": 32,
        "word_timestamp_config.blank_token_id": 4,
    },
    "omniasr": {
        "audio_config.conv_dim": [32] * 7, "audio_config.num_conv_pos_embedding_groups": 2,
        "audio_config.num_conv_pos_embeddings": 16,
    },
    "qwen2_audio": {"audio_config.max_source_positions": FRAMES // 2},
    "qwen3_asr": {
        "audio_config.downsample_hidden_size": 8, "audio_config.output_dim": 64,
    },
    **{
        name: {
            "enable_audio_output": False, "thinker_config.vision_start_token_id": 140,
            "thinker_config.vision_end_token_id": 141, "thinker_config.text_config.rope_parameters": MROPE,
        }
        for name in ("qwen2_5_omni", "qwen3_omni_moe")
    },
    "vibevoice_asr": {
        f"{part}_tokenizer_encoder_config.{name}": value for part in ("acoustic", "semantic") for name, value in CODEC.items()
    } | {"acoustic_tokenizer_chunk_size": 4000},
    "voxtral": {
        "audio_config.max_source_positions": FRAMES // 2, "audio_config.intermediate_size": 128, "audio_token_id": AUDIO,
    },
}  # fmt: skip


def sounds(model: Any, base: Any, numbers: list[int]) -> tuple[dict[str, Any], list[int]]:
    """What the model is given for sounds (a number each, always the same sound), and how many tokens each has. Where a mask says
    how long a sound is, those of odd numbers are shorter."""
    encode, config = getattr(base, "get_audio_features", None), getattr(model.config, "audio_config", None)
    accepted = list(inspect.signature(encode if encode is not None else base.forward).parameters)
    waves = "input_values" in accepted
    name, length = ("input_values", SAMPLES) if waves else ("input_features", FRAMES)
    bins = (
        getattr(config, "num_mel_bins", None)
        or getattr(config, "input_feat_size", None)
        or getattr(config, "audio_embed_dim", 128)
    )
    kind = model.config.model_type
    if kind == "qwen3_asr":  # in chunks of 100
        length = 100
    if waves:
        shape: tuple[int, ...] = (1, length)
    elif kind.startswith("granite"):
        shape = (length, model.config.encoder_config.input_dim)
    elif kind == "fun_asr_nano":
        shape = (length, bins * config.num_stacked_frames)
    else:
        shape = (length, bins) if kind.startswith(("gemma", "nemo")) else (bins, length)
    if "audio_input_ids" in accepted:  # numbers of mel bins, a token per frame
        name, shape = "audio_input_ids", (16, config.n_mel_bins)
        length = 16
    masks = [
        mask
        for mask in ("input_features_mask", "feature_attention_mask", "padding_mask", "audio_input_ids_mask")
        if mask in accepted
    ]

    def given(numbers: list[int]) -> dict[str, Any]:
        made = [torch.randn(shape, generator=torch.Generator().manual_seed(500 + number)) for number in numbers]
        valid = torch.tensor([length - length // 4 * (number % 2) for number in numbers])
        if name == "audio_input_ids":
            made = [(x.abs() * 1000).long() % config.mel_vocab_size for x in made]
        mask = torch.arange(length) < valid[:, None]
        told = {"chunk_sample_lengths": 160 * valid} if "chunk_sample_lengths" in accepted else {}
        return {
            name: torch.stack(made),
            **told,
            **dict.fromkeys(masks, mask if kind.startswith("gemma") else mask.long()),
        }

    if encode is None:  # the lengths of the tower are its own
        lengths = [
            int(base.audio_tower._get_feat_extract_output_lengths(given([n])[masks[0]].sum(-1))[1]) for n in numbers
        ]
        return given(numbers), lengths
    more = {"sample": False} if "sample" in accepted else {}  # draws no noise
    lengths = []
    for number in numbers:
        output = encode(**given([number]), **more)
        features = output.pooler_output if output.pooler_output is not None else output.last_hidden_state
        valid = getattr(output, "attention_mask", None)
        if valid is not None and not isinstance(features, tuple) and features.dim() == 3:
            features = features[valid]
        fixed = getattr(model.config, "audio_soft_tokens_per_image", None)
        lengths.append(fixed or sum(part.numel() // part.shape[-1] for part in features))
    return {**given(numbers), **more}, lengths
