# SPDX-License-Identifier: Apache-2.0
"""One file per method; importing this package registers all of them."""

from .cdpruner import CDPruner
from .cen_prune import CenPrune
from .divprune import DivPrune
from .downsample import Downsample
from .fastervlm import FasterVLM
from .fastv import FastV
from .flash_compression import FlashCompression
from .fopru import FoPru
from .globalcom2 import GlobalCom2
from .hiprune import HiPrune
from .holov import HoloV
from .mmtok import MMTok
from .pool import Pool
from .prumerge import PruMerge
from .random import Random
from .token_correlation import TokenCorrelation
from .tome import ToMe
from .uniform import Uniform
from .visionzip import VisionZip
from .vispruner import VisPruner

__all__ = [
    "CDPruner",
    "CenPrune",
    "DivPrune",
    "Downsample",
    "FastV",
    "FasterVLM",
    "FlashCompression",
    "FoPru",
    "GlobalCom2",
    "HiPrune",
    "HoloV",
    "MMTok",
    "Pool",
    "PruMerge",
    "Random",
    "ToMe",
    "TokenCorrelation",
    "Uniform",
    "VisPruner",
    "VisionZip",
]
