# SPDX-License-Identifier: Apache-2.0
"""mmcompress: fewer visual tokens for existing vision-language models, in one call on a stock model."""

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
from .learn import attention_ranks, conversion, convert, unconvert
from .methods import *  # noqa: F403 - every method class
from .methods import __all__ as _methods
from .plan import as_pipeline, methods, register
from .selection import Selection
from .stage import AttentionStage, EncoderStage, ExitStage, InputStage, LayerStage, Pipeline, PixelStage, Recipe, Stage
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
__all__ += _methods
