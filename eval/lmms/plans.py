# SPDX-License-Identifier: Apache-2.0
"""Plans and other settings as model_args of lmms-eval: text between commas."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from ...plan import as_pipeline
from ...stage import Pipeline
from ..evaluator import STOCK


def read_plan(plan: Any, plan_sha: str | None = None) -> Pipeline | None:
    """The pipeline of the argument `plan`; None for the stock model ("stock", "none", nothing).

    lmms-eval cuts model_args at commas outside of quotes and braces. So a plan with commas is written in quotes,
    plan="fastv(layer=2, keep=0.5)", or with semicolons for commas, plan=fastv(layer=2;keep=0.5), or as the JSON of
    Pipeline.to_dict(). The response cache knows a plan file by its name alone, so with a file its digest must be given, and a
    file that was changed since is refused.
    """
    text = unquoted(plan) if isinstance(plan, str) else plan
    if text is None or text in ("", STOCK, "none"):
        return None
    if not isinstance(text, str):
        return as_pipeline(text)
    if text.startswith("{"):
        return as_pipeline(json.loads(text))
    if text.endswith(".json"):
        pipeline = as_pipeline(text)
        if plan_sha != plan_digest(pipeline):
            known = (
                "is known to the response cache of lmms-eval by its name alone"
                if plan_sha is None
                else f"is not {plan_sha}"
            )
            raise ValueError(
                f"plan file {text} {known}: if you mean {pipeline}, add plan_sha={plan_digest(pipeline)} to the model_args"
            )
        return pipeline
    if text.count("(") != text.count(")"):
        raise ValueError(
            f"the plan {text!r} was cut at a comma: in model_args write it in quotes, "
            'plan="fastv(layer=2, keep=0.5)", or with semicolons, plan=fastv(layer=2;keep=0.5)'
        )
    return as_pipeline(text.replace(";", ","))


def plan_digest(pipeline: Pipeline) -> str:
    """What names the content of a plan file. Not digits alone: lmms-eval would read a number."""
    return f"sha256:{hashlib.sha256(repr(pipeline).encode()).hexdigest()[:12]}"


def model_arguments(settings: Mapping[str, Any]) -> str:
    """`settings` as model_args of lmms-eval; those that are None are left out."""
    return ",".join(f"{name}={_quoted(value)}" for name, value in settings.items() if value is not None)


def _quoted(value: Any) -> str:
    text = str(value)
    if '"' in text or "\\" in text:
        raise ValueError(
            f"{text!r} cannot be written in the model_args of lmms-eval: it has a quotation mark or a backslash"
        )
    return f'"{text}"' if set(text) & set(",[]{}'= ") else text


def unquoted(text: str) -> str:
    text = text.strip()
    inside = len(text) > 1 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1].replace(f"\\{text[0]}", text[0]).strip() if inside else text
