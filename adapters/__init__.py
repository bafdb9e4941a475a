# SPDX-License-Identifier: Apache-2.0
"""One adapter per model family."""

from __future__ import annotations

from typing import Any

from ..runtime.adapter import Adapter
from .llava import LlavaAdapter

ADAPTERS: tuple[type[Adapter], ...] = (LlavaAdapter,)


def adapter_for(model: Any) -> Adapter:
    """The adapter of `model`; raises NotImplementedError with the supported families if there is none."""
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter(model)
    raise NotImplementedError(
        f"{type(model).__name__} is not supported; supported: {', '.join(a.family for a in ADAPTERS)}"
    )


__all__ = ["ADAPTERS", "Adapter", "LlavaAdapter", "adapter_for"]
