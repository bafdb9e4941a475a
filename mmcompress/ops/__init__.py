# SPDX-License-Identifier: Apache-2.0
"""Plain-torch algorithms that several methods share."""

from .attention import attention_received, attention_rows, proportional_bias
from .bipartite import bipartite_match, merge_mean
from .ties import argmax_first

__all__ = [
    "argmax_first",
    "attention_received",
    "attention_rows",
    "bipartite_match",
    "merge_mean",
    "proportional_bias",
]
