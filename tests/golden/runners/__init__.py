# SPDX-License-Identifier: Apache-2.0
"""Importing this package registers all runners."""

from . import attention, first, text

__all__ = ["attention", "first", "text"]
