# SPDX-License-Identifier: Apache-2.0
"""`mmcompress serve`: a server of vLLM that compresses images."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..assets import checkpoint
from .common import Model, Plan

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLE = "mmcompress serve Qwen/Qwen3-VL-4B-Instruct --plan 'divprune(keep=25%)' --port 8000"


def add(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.set_defaults(rest=[])
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """What a server is told."""
    parser.add_argument("model", type=Model, help="folder or hub name of a checkpoint")
    parser.add_argument("--plan", type=Plan, default="divprune(keep=0.25)", help="what the server does to every image")
    parser.add_argument(
        "--positions", choices=("keep", "reindex"), help="position ids of kept tokens (default: the method's)"
    )
    parser.add_argument(
        "--structural",
        choices=("keep", "drop"),
        help="newlines and other tokens that are no patches (default: keep)",
    )
    parser.add_argument("--text", action="store_true", help="stages may read the question; caches help less then")


def asked(options: argparse.Namespace) -> str:
    """The JSON that vLLM is to be given."""
    from ..adapters.vllm import vllm
    from ..adapters.vllm.twin import overrides

    names = ("positions", "structural", "text")
    settings = vllm(options.plan, **{name: getattr(options, name) for name in names})
    return json.dumps(overrides(checkpoint(options.model), settings))


def run(options: argparse.Namespace, console: Console) -> None:
    """Become the server."""
    if find_spec("vllm") is None:
        raise ImportError("vLLM is not here: pip install 'mmcompress[vllm]', or see docs/serving.md for a CPU")
    given = [word for word in options.rest if word.partition("=")[0] in ("--hf-overrides", "--hf_overrides")]
    if given:
        raise ValueError(
            f"{given[0]} is what serve makes of --plan: merge yours with `mmcompress vllm-overrides` and run vllm serve"
        )
    # this module serves in all builds; the command `vllm` asks for a distribution that builds for CPUs do not have
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint(options.model)]
    os.execv(sys.executable, [*server, "--hf-overrides", asked(options), *options.rest])
