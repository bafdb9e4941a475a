# SPDX-License-Identifier: Apache-2.0
"""Serving with vLLM: images are compressed inside of it, where an override of the model's config asks for that.

Nothing here imports vLLM. What does is `processing` (its frontend), and `models`, `memo`, `signals` (its workers).
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

from ...plan import as_pipeline
from ...stage import Pipeline, Stage
from .plugin import ARCHITECTURES, PREFIX

FIELD = "mmcompress"
"""Entry of the model's config that holds the settings."""


@dataclass(frozen=True)
class Settings:
    """What a server does: `plan`, a plan string; `text`: whether stages may read the question (see `vllm`)."""

    plan: str
    text: bool = False

    @property
    def pipeline(self) -> Pipeline:
        return as_pipeline(self.plan)

    @staticmethod
    def of(config: Any) -> Settings | None:
        """Those in a model's config; None if there are none. Raises ValueError for what is no settings."""
        found = getattr(config, FIELD, None)
        if found is None:
            return None
        known = {field.name for field in dataclasses.fields(Settings)}
        if not isinstance(found, dict) or "plan" not in found or not set(found) <= known:
            raise ValueError(
                f'"{FIELD}": {found!r} in the config: give {{"plan": "divprune(keep=0.25)", "text": false}}; `mmcompress '
                f"vllm-overrides MODEL --plan PLAN` prints it"
            )
        return Settings(**found)

    def __call__(self, config: Any) -> Any:
        """The config of a model with these settings: vLLM calls it in each process, also on configs that name no architecture."""
        if any(getattr(config, "architectures", None) or ()):
            config.update(self.overrides(config.architectures))
        return config

    def overrides(self, architectures: list[str]) -> dict[str, Any]:
        """What has to change in a config that names these architectures. Raises NotImplementedError for those not supported."""
        plain = [name.removeprefix(PREFIX) for name in architectures]
        if not set(plain) <= set(ARCHITECTURES):
            raise NotImplementedError(
                f"{', '.join(plain)}: images are compressed inside vLLM for {', '.join(ARCHITECTURES)}; other models "
                f"run compressed in transformers, by mmcompress.compress(model, plan)"
            )
        return {"architectures": [PREFIX + name for name in plain], FIELD: dataclasses.asdict(self)}


def vllm(
    plan: str | os.PathLike[str] | Stage | Pipeline,
    *,
    positions: str | None = None,
    structural: str | None = None,
    text: bool = False,
    **options: Any,
) -> Settings:
    """Compress images inside vLLM: `LLM(MODEL, hf_overrides=mmcompress.vllm("divprune", keep=0.25))`.

    plan, positions, structural, options  as for `compress`. Stages that act on images between projector and language model can
          serve; others are refused when the server starts, with what to do instead. Videos are served as they are.
    text  lets stages read the question. Then what is kept of an image depends on it: the same image with another question shares
          nothing in vLLM's caches, and each turn of a chat encodes all images anew.

    `mmcompress serve MODEL --plan PLAN` and `mmcompress vllm-overrides` do the same for the command line. Raises ValueError or
    TypeError for a bad plan, NotImplementedError for one with stages that cannot serve.
    """
    pipeline = as_pipeline(plan, positions=positions, structural=structural, **options)
    check_stages(pipeline)
    return Settings(repr(pipeline), bool(text))


def check_stages(plan: Pipeline) -> None:
    """Raise NotImplementedError for a plan that serves with no model."""
    for stage in plan.parts:
        if stage.kind != "input":
            raise NotImplementedError(
                f"{stage!r} acts {PLACES[stage.kind]}, where vLLM lets no plugin change the number of tokens: serve with a stage "
                f"between projector and language model, such as divprune(keep=0.25), or run this plan in transformers"
            )
        if "image" not in stage.modalities:
            raise NotImplementedError(f"{stage!r} acts on {stage.on}: images alone are compressed inside vLLM")
    if plan.weighs:
        raise NotImplementedError(
            f"{plan!r}: merged tokens weigh what they stand for by a bias on attention, which vLLM does not take: serve with "
            f"plan({' >> '.join(map(repr, plan.stages))}, mass=False), where each weighs as one"
        )


PLACES = {
    "pixel": "before the vision encoder",
    "encoder": "inside the vision encoder",
    "layer": "inside the language model",
    "exit": "inside the language model",
    "attention": "in the attention of the language model",
    "recipe": "at several places",
}
"""Where kinds of stages act."""
