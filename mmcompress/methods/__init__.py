# SPDX-License-Identifier: Apache-2.0
"""One file per method; importing this package registers all of them."""

from .absorb import Absorb
from .aim import AIM, AIMPrune
from .aim_merge import AIMMerge
from .anchorprune import AnchorPrune
from .cdpruner import CDPruner
from .cen_prune import CenPrune
from .cmai import CMAI
from .dart import DART
from .divprune import DivPrune
from .downsample import Downsample
from .dyvte import DyVTE
from .eadp import EADP
from .explain_compress import ExplainCompress
from .fastervlm import FasterVLM
from .fastv import FastV
from .flash_compression import FlashCompression
from .fopru import FoPru
from .globalcom2 import GlobalCom2
from .hiprune import HiPrune
from .holov import HoloV
from .idpruner import IDPruner
from .language_overrules import LanguageOverrules
from .mmtok import MMTok
from .pool import Pool
from .prumerge import PruMerge
from .prunesid import PruneSID
from .pyramiddrop import PyramidDrop
from .random import Random
from .recoverable_compression import RecoverableCompression
from .restore import Restore
from .scope import SCOPE
from .seats import Seats
from .sink_correction import SinkCorrection
from .sparsevlm import SparseVLM
from .token_correlation import TokenCorrelation
from .tokenflex import TokenFlex
from .tome import ToMe
from .transprune import TransPrune
from .uniform import Uniform
from .var_attention_sink import VARAttentionSink
from .vflowopt import VFlowOpt
from .vflowopt_cuts import VFlowOptCuts
from .vflowopt_prune import VFlowOptPrune
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vmtc import VMTC
from .voronoi import Voronoi

__all__ = [
    "AIM",
    "CMAI",
    "DART",
    "EADP",
    "SCOPE",
    "VMTC",
    "AIMMerge",
    "AIMPrune",
    "Absorb",
    "AnchorPrune",
    "CDPruner",
    "CenPrune",
    "DivPrune",
    "Downsample",
    "DyVTE",
    "ExplainCompress",
    "FastV",
    "FasterVLM",
    "FlashCompression",
    "FoPru",
    "GlobalCom2",
    "HiPrune",
    "HoloV",
    "IDPruner",
    "LanguageOverrules",
    "MMTok",
    "Pool",
    "PruMerge",
    "PruneSID",
    "PyramidDrop",
    "Random",
    "RecoverableCompression",
    "Restore",
    "Seats",
    "SinkCorrection",
    "SparseVLM",
    "ToMe",
    "TokenCorrelation",
    "TokenFlex",
    "TransPrune",
    "Uniform",
    "VARAttentionSink",
    "VFlowOpt",
    "VFlowOptCuts",
    "VFlowOptPrune",
    "VisPruner",
    "VisionZip",
    "Voronoi",
]
