# SPDX-License-Identifier: Apache-2.0
"""Importing this package registers all runners."""

from . import adaptive, attention, crops, first, flow, inhibition, merging, pooling, pyramid, recover, text

__all__ = [
    "adaptive",
    "attention",
    "crops",
    "first",
    "flow",
    "inhibition",
    "merging",
    "pooling",
    "pyramid",
    "recover",
    "text",
]
