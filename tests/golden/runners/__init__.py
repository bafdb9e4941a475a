# SPDX-License-Identifier: Apache-2.0
"""Importing this package registers all runners."""

from . import attention, first, pooling, text

__all__ = ["attention", "first", "pooling", "text"]
