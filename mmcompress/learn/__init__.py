# SPDX-License-Identifier: Apache-2.0
"""What has to be trained: mixtures of depths, exit routers, flexible projectors."""

from .arank import attention_rank, attention_ranks
from .convert import Conversion, conversion, convert, unconvert
from .dyvte import ExitSample, exit_loss, exit_sample
from .gamma_mod import GammaMoD
from .p_mod import PMoD
from .tokenflex import draw_share, flexible_loss, fresh_projector

__all__ = [
    "Conversion",
    "ExitSample",
    "GammaMoD",
    "PMoD",
    "attention_rank",
    "attention_ranks",
    "conversion",
    "convert",
    "draw_share",
    "exit_loss",
    "exit_sample",
    "flexible_loss",
    "fresh_projector",
    "unconvert",
]
