# SPDX-License-Identifier: Apache-2.0
"""The commands that measure: `mmcompress bench`, `eval`, `compare`, `sweep` and `tune`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[[str, Any, str], argparse.ArgumentParser]
"""Adds a subcommand: its name, what it runs with options and console, and its description."""
Load = Callable[[argparse.Namespace], "tuple[Any, Any, str]"]
"""Model, processor and device of the options."""
OpenImage = Callable[[Path], Any]
"""A picture, or an error that a user understands."""
