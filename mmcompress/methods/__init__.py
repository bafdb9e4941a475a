# SPDX-License-Identifier: Apache-2.0
"""One file per method; importing this package registers all of them."""

from .cdpruner import CDPruner
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .fastv import FastV
from .holov import HoloV
from .mmtok import MMTok
from .random import Random
from .tome import ToMe
from .uniform import Uniform
from .visionzip import VisionZip
from .vispruner import VisPruner

__all__ = [
    "CDPruner",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "HoloV",
    "MMTok",
    "Random",
    "ToMe",
    "Uniform",
    "VisPruner",
    "VisionZip",
]
