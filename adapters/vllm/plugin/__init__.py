# SPDX-License-Identifier: Apache-2.0
"""What vLLM loads in each of its processes: a few names. Nothing of mmcompress is imported until a model by one of them is built.

A package of its own, `mmcompress_vllm`, since importing a part of mmcompress imports all of it.
"""

from __future__ import annotations

PREFIX = "MMCompress"
ARCHITECTURES = (
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "InternVLForConditionalGeneration",
)
"""Of checkpoints, as their config.json names them: what was compared with transformers, token for token."""


def register() -> None:
    """The entry point of `vllm.general_plugins`: the architectures again, under names that stand for them compressed."""
    from vllm import ModelRegistry

    known = set(ModelRegistry.get_supported_archs())
    for architecture in ARCHITECTURES:
        if PREFIX + architecture not in known:
            ModelRegistry.register_model(
                PREFIX + architecture, f"mmcompress.adapters.vllm.models:{PREFIX}{architecture}"
            )
