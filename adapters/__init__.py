# SPDX-License-Identifier: Apache-2.0
"""One adapter per model family."""

from __future__ import annotations

from typing import Any

from ..runtime.adapter import Adapter, Encoder
from ..runtime.refusal import refusal
from .common import CommonAdapter
from .gemma import GemmaAdapter, GemmaPatchesAdapter
from .grid_forms import ClassTokenAdapter, ErnieAdapter, KimiAdapter, SizedAdapter
from .grids import GridAdapter
from .internvl import InternVLAdapter
from .llava import LlavaAdapter, LlavaNextAdapter, LlavaOnevisionAdapter
from .minicpm import MiniCPMAdapter
from .molmo import Molmo2Adapter
from .naflex import NaFlexAdapter
from .ovis import Ovis2Adapter
from .perception import PerceptionAdapter
from .pixtral import PixtralAdapter
from .square import SquareAdapter
from .video_llava import VideoLlavaAdapter
from .vit import ENCODERS

ADAPTERS: tuple[type[Adapter], ...] = (
    LlavaAdapter,
    LlavaNextAdapter,
    LlavaOnevisionAdapter,
    KimiAdapter,
    ErnieAdapter,
    SizedAdapter,
    ClassTokenAdapter,
    GridAdapter,
    InternVLAdapter,
    PixtralAdapter,
    NaFlexAdapter,
    GemmaAdapter,
    GemmaPatchesAdapter,
    MiniCPMAdapter,
    Ovis2Adapter,
    VideoLlavaAdapter,
    Molmo2Adapter,
    PerceptionAdapter,
    SquareAdapter,
    CommonAdapter,
)
"""In the order in which they are tried."""


def adapter_for(model: Any) -> Adapter | Encoder:
    """The adapter of `model` (an `Encoder` for a vision model without language model); raises NotImplementedError that says
    why there is none."""
    for adapter in ADAPTERS:
        if adapter.matches(model):
            return adapter(model)
    for encoder in ENCODERS:
        if encoder.matches(model):
            return encoder(model)
    known = "; ".join(a.family for a in (*ADAPTERS, *ENCODERS))
    raise NotImplementedError(
        f"{type(model).__name__} is not supported: {refusal(model)}. Supported: {known}; `mmcompress models` lists all"
    )


__all__ = ["ADAPTERS", "Adapter", "Encoder", "adapter_for"]
