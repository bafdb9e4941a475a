# SPDX-License-Identifier: Apache-2.0
"""mmcompress: fewer visual tokens for existing vision-language models, in one call on a stock model."""

from .api import compress, compressed, report, trace, uncompress
from .methods import DivPrune, FastV, Random, ToMe, Uniform, VisionZip
from .plan import as_pipeline, methods, register
from .selection import Selection
from .stage import EncoderStage, InputStage, LayerStage, Pipeline, Stage
from .trace import Report, Trace
from .visuals import Layout, Visuals

__version__ = "0.1.0"

__all__ = [
    "DivPrune",
    "EncoderStage",
    "FastV",
    "InputStage",
    "LayerStage",
    "Layout",
    "Pipeline",
    "Random",
    "Report",
    "Selection",
    "Stage",
    "ToMe",
    "Trace",
    "Uniform",
    "VisionZip",
    "Visuals",
    "as_pipeline",
    "compress",
    "compressed",
    "methods",
    "register",
    "report",
    "trace",
    "uncompress",
]
