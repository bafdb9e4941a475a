# SPDX-License-Identifier: Apache-2.0
"""Pictures of what was kept."""

from .kept import Panel, encoded_view, kept_figure, kept_overlay

__all__ = ["Panel", "encoded_view", "kept_figure", "kept_overlay"]
