# SPDX-License-Identifier: Apache-2.0
"""mmcompress: fewer visual tokens for existing vision-language models, in one call on a stock model.

Public names are imported when they are used for the first time, and torch with them: `import mmcompress` alone costs milliseconds.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import _checkout  # noqa: F401 - where the other folders are
from .catalog import catalog

if TYPE_CHECKING:
    from .adapters.vllm import vllm
    from .api import compress, compressed, find_sink_dims, report, trace, uncompress
    from .dominance import Dominance, modality_dominance
    from .explain import (
        Explanation,
        attention_rollout,
        grad_cam,
        gradient_relevance,
        last_attention,
        token_activation_map,
    )
    from .learn import attention_ranks
    from .learn.convert import conversion, convert, unconvert
    from .methods import *  # noqa: F403 - every method class
    from .plan import as_pipeline, methods, register
    from .selection import Selection
    from .stage import (
        AttentionStage,
        EncoderStage,
        ExitStage,
        FrameStage,
        InputStage,
        LayerStage,
        Pipeline,
        PixelStage,
        Recipe,
        Stage,
    )
    from .trace import EncoderReport, Report, Trace
    from .visualize import show
    from .visuals import AttentionRows, Layout, View, Visuals

__version__ = "0.1.0"

__all__ = [
    "AttentionRows",
    "AttentionStage",
    "Dominance",
    "EncoderReport",
    "EncoderStage",
    "ExitStage",
    "Explanation",
    "FrameStage",
    "InputStage",
    "LayerStage",
    "Layout",
    "Pipeline",
    "PixelStage",
    "Recipe",
    "Report",
    "Selection",
    "Stage",
    "Trace",
    "View",
    "Visuals",
    "as_pipeline",
    "attention_ranks",
    "attention_rollout",
    "compress",
    "compressed",
    "conversion",
    "convert",
    "find_sink_dims",
    "grad_cam",
    "gradient_relevance",
    "last_attention",
    "methods",
    "modality_dominance",
    "register",
    "report",
    "show",
    "token_activation_map",
    "trace",
    "uncompress",
    "unconvert",
    "vllm",
]
__all__ += [about["class"] for about in catalog().values()]
_MODULES = {
    "adapters.vllm": ("vllm",),
    "api": ("compress", "compressed", "find_sink_dims", "report", "trace", "uncompress"),
    "dominance": ("Dominance", "modality_dominance"),
    "explain": (
        "Explanation",
        "attention_rollout",
        "grad_cam",
        "gradient_relevance",
        "last_attention",
        "token_activation_map",
    ),
    "learn": ("attention_ranks",),
    "learn.convert": ("conversion", "convert", "unconvert"),
    "plan": ("as_pipeline", "methods", "register"),
    "selection": ("Selection",),
    "stage": (
        "AttentionStage",
        "EncoderStage",
        "ExitStage",
        "FrameStage",
        "InputStage",
        "LayerStage",
        "Pipeline",
        "PixelStage",
        "Recipe",
        "Stage",
    ),
    "trace": ("EncoderReport", "Report", "Trace"),
    "visualize": ("show",),
    "visuals": ("AttentionRows", "Layout", "View", "Visuals"),
}
"""Where public names are; those of method classes are in `methods`."""
_PUBLIC = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in __all__:
        found = globals()[name] = getattr(import_module(f".{_PUBLIC.get(name, 'methods')}", __name__), name)
        return found
    try:  # a submodule that nothing has imported yet
        return import_module(f".{name}", __name__)
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        """A submodule never takes the place of a public name: `trace` and `methods` stay functions."""
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
