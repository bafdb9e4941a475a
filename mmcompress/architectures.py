# SPDX-License-Identifier: Apache-2.0
"""What every image-text architecture of transformers takes, as the crossed test of this project found it on tiny random models.

The table is `assets/architectures.json`, written by `python -m tests.architectures --write` and compared in every run of the tests.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from . import assets
from .runtime.adapter import OF_CLS, OF_PATCHES, Adapter

FILE = Path(assets.__file__).with_name("architectures.json")
GROUPS = {"CLS": OF_CLS, "patches": OF_PATCHES, "features": frozenset({"encoder_features"})}
"""Signals of a vision encoder, in a word: attention of a CLS token, attention among patches, and features."""

REASONS = {
    "tower": ("is not known to mmcompress", "nothing is known of its vision encoder"),
    "padding": (
        "which would be merged with patches",
        "the rows of its vision encoder are filled up with padding: stages behind it only",
    ),
    "states": (
        "whose state cannot forget tokens",
        "its language model has layers whose state cannot forget tokens: stages before it only",
    ),
    "indexers": (
        "has indexers, which choose",
        "indexers choose the tokens that a query sees: stages before the language model only",
    ),
    "windows": (
        "how far back they look is of a form that is not known",
        "its layers look back only so far, in a form that is not known",
    ),
    "streams": (
        "has several residual streams",
        "its language model has several residual streams, which are not cut: stages before it only",
    ),
    "attention": (
        "which was compared with the module's own",
        "its attention is of a form that was compared and not matched: stages before the language model only",
    ),
    "cross-attention": (
        "looks at pictures by cross-attention",
        "its language model looks at pictures by cross-attention: no visual tokens stand in its prompt",
    ),
    "encoder-decoder": (
        "is an encoder-decoder",
        "it is an encoder-decoder: no visual tokens stand in the prompt of its decoder",
    ),
    "no pictures": ("takes no pictures", "it takes no pictures"),
    "no videos": ("no videos", "it takes no videos"),
    "no decoder": ("no decoder apart", "its base model has no decoder apart that is given embeddings"),
    "no placeholder": (
        "no token of its prompts stands for a visual token",
        "no token of its prompts stands for a visual token",
    ),
    "no features": (
        "encodes pictures inside its forward pass",
        "it encodes pictures inside its forward pass, not by a method of its own",
    ),
    "deepstack": (
        "enter layers of the language model in a form that is not supported",
        "its features enter layers of the language model in a form that is not supported",
    ),
}
"""Why an architecture takes no stages of a kind, in a word: a part of what `compress` says, and a sentence for tables."""


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """By model type: for each kind of stage "ok" or a word of REASONS; `signals`, words of GROUPS; `positions`, the policies."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def facts(adapter: Any) -> dict[str, Any]:
    """What an adapter says of its model, as it stands in the table: `signals` and `positions`."""
    if not isinstance(adapter, Adapter):
        return {"signals": [], "positions": []}
    return {
        "signals": [word for word, names in GROUPS.items() if names & adapter.signals],
        "positions": ["keep", "reindex"] if adapter.reindexes else ["keep"],
    }
