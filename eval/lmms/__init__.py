# SPDX-License-Identifier: Apache-2.0
"""lmms-eval with plans: a model for that harness (`--model mmcompress`), and its tasks from our own command.

lmms-eval finds the model through the entry point `lmms_eval.models`. Nothing here needs it to be imported. Checked with 0.7.3.
"""

from __future__ import annotations

from typing import Any

from .base import MODEL
from .model import CompressedModel
from .plans import model_arguments, plan_digest, read_plan
from .run import run_lmms

__all__ = ["MODEL", "CompressedModel", "manifests", "model_arguments", "plan_digest", "read_plan", "run_lmms"]


def manifests() -> list[Any]:
    """What the entry point gives to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id=MODEL, chat_class_path=f"{CompressedModel.__module__}.{CompressedModel.__name__}")]
