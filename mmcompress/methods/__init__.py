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
from .dycoke import DyCoke
from .dycoke_decode import DyCokeDecode
from .dyvte import DyVTE
from .eadp import EADP
from .evs import EVS
from .explain_compress import ExplainCompress
from .fastervlm import FasterVLM
from .fastv import FastV
from .fastvid import FastVID
from .flash_compression import FlashCompression
from .flashvid import FlashVID, FlashVIDMerge
from .fopru import FoPru
from .framefusion import FrameFusion, FrameFusionLayers, FrameFusionMerge
from .globalcom2 import GlobalCom2
from .hiprune import HiPrune
from .holitom import HoliTom, HoliTomInner, HoliTomMerge
from .holov import HoloV
from .idpruner import IDPruner
from .keyframes import Keyframes
from .language_overrules import LanguageOverrules
from .llava_scissor import LLaVAScissor
from .mmtok import MMTok
from .per_frame import PerFrame
from .pool import Pool
from .prumerge import PruMerge
from .prunesid import PruneSID
from .prunevid import PruneVid, PruneVidMerge
from .prunevid_prune import PruneVidPrune
from .pyramiddrop import PyramidDrop
from .random import Random
from .recoverable_compression import RecoverableCompression
from .restore import Restore
from .scope import SCOPE
from .seats import Seats
from .seats_layers import SeatsLayers
from .sink_correction import SinkCorrection
from .sparsevlm import SparseVLM
from .timechat_dtd import TimeChatDTD
from .token_correlation import TokenCorrelation
from .tokenflex import TokenFlex
from .tome import ToMe
from .transprune import TransPrune
from .uniform import Uniform
from .var_attention_sink import VARAttentionSink
from .vcast import VCAST
from .vflowopt import VFlowOpt
from .vflowopt_cuts import VFlowOptCuts
from .vflowopt_prune import VFlowOptPrune
from .vidcom2 import VidCom2
from .visionzip import VisionZip
from .vispruner import VisPruner
from .vmtc import VMTC
from .voronoi import Voronoi

__all__ = [
    "AIM",
    "CMAI",
    "DART",
    "EADP",
    "EVS",
    "SCOPE",
    "VCAST",
    "VMTC",
    "AIMMerge",
    "AIMPrune",
    "Absorb",
    "AnchorPrune",
    "CDPruner",
    "CenPrune",
    "DivPrune",
    "Downsample",
    "DyCoke",
    "DyCokeDecode",
    "DyVTE",
    "ExplainCompress",
    "FastV",
    "FastVID",
    "FasterVLM",
    "FlashCompression",
    "FlashVID",
    "FlashVIDMerge",
    "FoPru",
    "FrameFusion",
    "FrameFusionLayers",
    "FrameFusionMerge",
    "GlobalCom2",
    "HiPrune",
    "HoliTom",
    "HoliTomInner",
    "HoliTomMerge",
    "HoloV",
    "IDPruner",
    "Keyframes",
    "LLaVAScissor",
    "LanguageOverrules",
    "MMTok",
    "PerFrame",
    "Pool",
    "PruMerge",
    "PruneSID",
    "PruneVid",
    "PruneVidMerge",
    "PruneVidPrune",
    "PyramidDrop",
    "Random",
    "RecoverableCompression",
    "Restore",
    "Seats",
    "SeatsLayers",
    "SinkCorrection",
    "SparseVLM",
    "TimeChatDTD",
    "ToMe",
    "TokenCorrelation",
    "TokenFlex",
    "TransPrune",
    "Uniform",
    "VARAttentionSink",
    "VFlowOpt",
    "VFlowOptCuts",
    "VFlowOptPrune",
    "VidCom2",
    "VisPruner",
    "VisionZip",
    "Voronoi",
]
