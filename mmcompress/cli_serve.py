# SPDX-License-Identifier: Apache-2.0
"""`mmcompress serve` and `mmcompress vllm-overrides`: servers of vLLM that compress images."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec

from rich.console import Console

from .assets import checkpoint
from .eval.cli import Command


def add(command: Command) -> None:
    """Put both subcommands among the others."""
    serve = command(
        "serve", _serve, "vLLM's server for OpenAI's API, with compressed images; further options are vLLM's"
    )
    serve.set_defaults(rest=[])
    printed = command(
        "vllm-overrides",
        _overrides,
        'what makes vLLM compress images: vllm serve MODEL --hf-overrides "$(mmcompress vllm-overrides MODEL --plan PLAN)"',
    )
    for parser in (serve, printed):
        parser.add_argument("model", help="folder or hub name of a checkpoint")
        parser.add_argument("--plan", default="divprune(keep=0.25)", help="default: divprune(keep=0.25)")
        parser.add_argument("--positions", choices=("keep", "reindex"), help="position ids of kept tokens")
        parser.add_argument(
            "--structural", choices=("keep", "drop"), help="newlines and other tokens that are no patches"
        )
        parser.add_argument("--text", action="store_true", help="stages may read the question; caches help less then")


def _asked(options: argparse.Namespace) -> str:
    from .adapters.vllm import vllm
    from .adapters.vllm.twin import overrides

    names = ("positions", "structural", "text")
    settings = vllm(options.plan, **{name: getattr(options, name) for name in names})
    return json.dumps(overrides(checkpoint(options.model), settings))


def _overrides(options: argparse.Namespace, console: Console) -> None:
    print(_asked(options))


def _serve(options: argparse.Namespace, console: Console) -> None:
    if find_spec("vllm") is None:
        raise ImportError("vLLM is not here: pip install 'mmcompress[vllm]', or see docs/serving.md for a CPU")
    given = [word for word in options.rest if word.partition("=")[0] in ("--hf-overrides", "--hf_overrides")]
    if given:
        raise ValueError(
            f"{given[0]} is what serve makes of --plan: merge yours with `mmcompress vllm-overrides` and run vllm serve"
        )
    # this module serves in all builds; the command `vllm` asks for a distribution that builds for CPUs do not have
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", checkpoint(options.model)]
    os.execv(sys.executable, [*server, "--hf-overrides", _asked(options), *options.rest])
