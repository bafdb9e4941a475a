# SPDX-License-Identifier: Apache-2.0
"""Embedded data: tiny trained checkpoints in the ordinary Hugging Face form."""

from __future__ import annotations

from pathlib import Path

MODELS = ("llava-shapes",)


def model_path(name: str = "llava-shapes") -> Path:
    """Folder of an embedded checkpoint, for `from_pretrained`."""
    if name not in MODELS:
        raise ValueError(f"no embedded model {name!r}: there is {', '.join(MODELS)}")
    return Path(__file__).parent / name
