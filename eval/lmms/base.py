# SPDX-License-Identifier: Apache-2.0
"""What the parts of the bridge share: the interface of lmms-eval, where it is installed, and loading."""

from __future__ import annotations

from typing import Any

import torch

from ...assets import checkpoint

_missing: ImportError | None = None
try:
    from lmms_eval.api.model import lmms as Interface
except ImportError as error:
    Interface, _missing = object, error

MODEL = "mmcompress"
"""The name of the model in lmms-eval."""


def load(
    pretrained: str,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    device: Any = None,
    device_map: str | None = None,
) -> tuple[Any, Any]:
    """Model and processor."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    place = checkpoint(pretrained)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen: Any = torch.float32 if dtype == "auto" and device.type == "cpu" else dtype
    more = {"attn_implementation": attn_implementation, "revision": revision, "device_map": device_map}
    kept = {name: value for name, value in more.items() if value is not None}
    model = AutoModelForImageTextToText.from_pretrained(place, dtype=chosen, **kept).eval()
    processor = AutoProcessor.from_pretrained(place, **({"revision": revision} if revision else {}))
    return (model if device_map else model.to(device)), processor


def positive(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1 or number != float(value):
        raise ValueError(f"{name}={value!r}: a whole number from 1 on")
    return number


def require() -> None:
    if _missing is not None:
        raise ImportError(f"the bridge needs lmms-eval: pip install 'mmcompress[lmms]' ({_missing})") from _missing
