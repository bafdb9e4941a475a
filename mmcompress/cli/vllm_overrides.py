# SPDX-License-Identifier: Apache-2.0
"""`mmcompress vllm-overrides`: for those who start vLLM's server themselves."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from . import serve

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = 'vllm serve MODEL --hf-overrides "$(mmcompress vllm-overrides MODEL --plan PLAN)"'


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    serve.add_settings(parser)


def run(options: argparse.Namespace, console: Console) -> None:
    """Print the JSON."""
    print(serve.asked(options))
