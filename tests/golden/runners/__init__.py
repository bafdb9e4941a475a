# SPDX-License-Identifier: Apache-2.0
"""Importing this package registers all runners."""

from . import attention, crops, first, pooling, text

__all__ = ["attention", "crops", "first", "pooling", "text"]
