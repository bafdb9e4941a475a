# SPDX-License-Identifier: Apache-2.0
"""Embedded data: tiny trained checkpoints in the ordinary Hugging Face form."""

from __future__ import annotations

from pathlib import Path

MODELS = ("llava-shapes", "llava-next-shapes", "qwen3-vl-shapes", "internvl-shapes")
"""Vision-language models, one of each family."""
CLIP = "clip-shapes"
"""The CLIP pair whose image tower is that of `llava-shapes`, for `open_clip.create_model_and_transforms("local-dir:...")`."""


def weights_path(method: str, model: str) -> Path:
    """Folder of what `method` learned for the embedded model `model`: its option `weights`."""
    path = model_path(model) / method
    if not path.is_dir():
        there = sorted(p.parent.name for p in model_path(model).glob("*/config.json"))
        raise ValueError(
            f"no weights for {method!r} with {model}: there are those for {', '.join(there) or 'no method'}"
        )
    return path


def model_path(name: str = "llava-shapes") -> Path:
    """Folder of an embedded checkpoint, for `from_pretrained` (or open_clip)."""
    if name not in (*MODELS, CLIP):
        raise ValueError(f"no embedded model {name!r}: there is {', '.join((*MODELS, CLIP))}")
    return Path(__file__).parent / name
