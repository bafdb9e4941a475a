# SPDX-License-Identifier: Apache-2.0
"""What cannot be served, said when a server starts."""

from __future__ import annotations

from typing import Any

from .twin import Twin

OLDEST, LATEST = (0, 30), (0, 33)
"""Releases of vLLM that are supported."""


def check_version(version: str) -> None:
    """Raise NotImplementedError for another release of vLLM."""
    digits = version.split(".")[:2]
    if all(part.isdigit() for part in digits) and not OLDEST <= tuple(map(int, digits)) <= LATEST:
        first, last = (".".join(map(str, release)) for release in (OLDEST, LATEST))
        raise NotImplementedError(
            f"images are compressed inside vLLM {first} to {last}, and this is {version}: install one of those, or run the model "
            f"compressed in transformers"
        )


def check_engine(vllm_config: Any, twin: Twin, grid: bool) -> None:
    """Raise NotImplementedError for options of a server that compression cannot go with. grid: positions have several axes."""
    mm, lora = vllm_config.model_config.multimodal_config, vllm_config.lora_config
    compilation, parallel = vllm_config.compilation_config, vllm_config.parallel_config
    reads = f"{twin.plan!r} reads {', '.join(sorted(twin.signals))} of the vision encoder"
    refused = {
        f"video_pruning_rate={getattr(mm, 'video_pruning_rate', None)} drops tokens of videos in another way: leave it out": bool(
            getattr(mm, "video_pruning_rate", None)
        ),
        "enable_mm_embeds lets requests bring features instead of images: leave it out": getattr(
            mm, "enable_mm_embeds", False
        ),
        "cudagraph_mm_encoder runs the vision encoder past all hooks: leave it out": getattr(
            compilation, "cudagraph_mm_encoder", False
        ),
        "pipeline parallelism leaves its later stages without the places of the tokens that are kept: spread the model by "
        "tensor_parallel_size": grid and parallel.pipeline_parallel_size > 1,
        "enable_tower_connector_lora counts the tokens of the vision encoder by those that are kept: give adapters of the language "
        "model only": getattr(lora, "enable_tower_connector_lora", False),
        f"mm_encoder_tp_mode='data' gives each device other images, and {reads}: use 'weights', or a method that reads features": (
            twin.signals and getattr(mm, "mm_encoder_tp_mode", None) == "data"
        ),
        f"compile_mm_encoder compiles the vision encoder, and {reads}: leave it out, or choose a method that reads features": (
            twin.signals and getattr(compilation, "compile_mm_encoder", False)
        ),
    }
    for reason, found in refused.items():
        if found:
            raise NotImplementedError(reason)
