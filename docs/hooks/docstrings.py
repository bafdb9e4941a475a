# SPDX-License-Identifier: Apache-2.0
"""For mkdocstrings: docstrings of this house as Markdown."""

from __future__ import annotations

from typing import Any

import griffe
from mmcompress.eval.docs.docstrings import as_markdown


class House(griffe.Extension):
    """Lines of the form `name   text` become items of a list."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
