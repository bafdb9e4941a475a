# SPDX-License-Identifier: Apache-2.0
"""Importing this package registers all runners."""

from . import (
    adaptive,
    attention,
    crops,
    explain_compress,
    first,
    flow,
    greedy,
    inhibition,
    learned,
    merging,
    pooling,
    pyramid,
    recover,
    seats,
    tam,
    tam_maps,
    text,
    vqa_metrics,
)

__all__ = [
    "adaptive",
    "attention",
    "crops",
    "explain_compress",
    "first",
    "flow",
    "greedy",
    "inhibition",
    "learned",
    "merging",
    "pooling",
    "pyramid",
    "recover",
    "seats",
    "tam",
    "tam_maps",
    "text",
    "vqa_metrics",
]
