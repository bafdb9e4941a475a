# SPDX-License-Identifier: Apache-2.0
"""Modules with other attributes: to run their own forward pass another way, for one call, while they stay as they are."""

from __future__ import annotations

from typing import Any


class As:
    """The config of a module with another attention implementation."""

    def __init__(self, config: Any, implementation: str) -> None:
        self._config, self._attn_implementation = config, implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


def twin(module: Any, **changes: Any) -> Any:
    """The module with other attributes; parameters, buffers and children are shared, hooks do not run."""
    made = object.__new__(type(module))
    made.__dict__.update(module.__dict__)
    made.__dict__.update(changes)
    return made
