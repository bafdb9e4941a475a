# SPDX-License-Identifier: Apache-2.0
"""What a served model shares with the one of transformers: how tokens lie, how many are kept, and what methods need.

All of it is asked of a twin: the model that transformers makes of the same config, on the meta device, without weights.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText

from ...runtime.adapter import Adapter, Encoded, Run
from ...runtime.needs import TEXT_SIGNALS, VISION_SIGNALS, check_positions, names_of, resolve_needs
from ...runtime.probe import Forms
from ...runtime.prompt import PROMPT_SIGNALS
from ...runtime.signals import kind_of
from ...visuals import Layout
from .. import adapter_for
from . import FIELD, Settings, check_stages
from .plugin import PREFIX

VIEWS = "image_num_patches"
"""What vLLM calls the number of tiles of each picture, where a model is given a row of tiles."""


class Twin:
    """A model's adapter, and a plan for it.

    plan, stages  as they act on this model. signals: those of the vision encoder that they read; reads_text: the question too.

    Raises NotImplementedError for a plan that cannot serve this model.
    """

    def __init__(self, config: Any, settings: Settings) -> None:
        self.settings = settings
        plain = copy.deepcopy(config)
        plain.architectures = [name.removeprefix(PREFIX) for name in plain.architectures or ()]
        if hasattr(plain, FIELD):
            delattr(plain, FIELD)
        with torch.device("meta"):
            self.model: nn.Module = AutoModelForImageTextToText.from_config(plain).eval()
        self.adapter = self.found()
        self.plan = settings.pipeline.fit(self.adapter.language_model.config)
        check_stages(self.plan)
        self.stages = self.plan.input_stages
        read = {kind_of(name): name for name in self._needs()}
        self.signals = {name for name in self._needs() if kind_of(name) in VISION_SIGNALS}
        self.reads_text = bool(set(TEXT_SIGNALS) & set(read))
        self._check()

    @staticmethod
    def of(config: Any) -> Twin | None:
        """The twin that the settings in a model's config ask for; None where there are none. Made once."""
        settings = Settings.of(config)
        return None if settings is None else _twin(_Key(config, settings))

    def found(self) -> Adapter:
        """The adapter of the twin as its modules are now."""
        adapter = adapter_for(self.model)
        assert isinstance(adapter, Adapter)
        return adapter

    def _needs(self) -> list[str]:
        """The signals that the stages read."""
        for stage in self.plan.parts:
            if getattr(stage, "clip", None) is not None:
                raise NotImplementedError(
                    f"{stage!r}: a CLIP beside the model does not run inside vLLM: leave clip= out"
                )
            if asked := [name for name in names_of(stage.needs) if kind_of(name) in PROMPT_SIGNALS]:
                raise NotImplementedError(
                    f"{stage!r} reads {asked[0]} of the language model before that runs, which vLLM cannot give: choose a method "
                    f"that reads features, or attention of the vision encoder"
                )
        forms = Forms(self.adapter.language_model, self.model)
        return list(resolve_needs(self.adapter, forms, self.plan, clip=False).values())

    def _check(self) -> None:
        plan, row = self.plan, " >> ".join(map(repr, self.plan.stages))
        check_positions(self.adapter, plan)
        if self.adapter.reindexes and plan.position_policy() == "keep":
            mass = "" if plan.mass is None else f", mass={plan.mass}"
            raise NotImplementedError(
                f"{plan!r} keeps the position ids of the full prompt, and vLLM numbers the tokens of {self.adapter.family} without "
                f"gaps: serve with plan({row}, positions='reindex'{mass})"
            )
        if self.reads_text and not self.settings.text:
            raise NotImplementedError(
                f"{plan!r} reads the question, so what is kept of an image differs from one to the next, and vLLM's caches help "
                f"less: allow it by text=True (--text)"
            )

    # ------------------------------------------------------------------ how many, and how they lie
    def encoded(self, arguments: dict[str, Any], counts: Sequence[int]) -> Encoded:
        """The pictures of a call of the encoder, not put together of tiles yet. arguments: vLLM's, which go by the names that they
        have in transformers; counts: tokens of each picture."""
        each, views = list(counts), arguments.get(VIEWS)
        if views is not None:
            each = [n // int(v) for n, v in zip(counts, views, strict=True) for _ in range(int(v))]
        return self.adapter.encoded("image", arguments, each)

    def assembled(self, encoded: Encoded, counts: Sequence[int]) -> Encoded:
        """The same with tiles put together."""
        self.adapter.assemble(encoded, [Run(row, 0, n) for row, n in enumerate(counts)])
        return encoded

    def kept(self, arguments: dict[str, Any], count: int) -> int:
        """How many of the `count` tokens of one picture enter the language model. Raises ValueError where the plan asks for more
        than there are."""
        views = arguments.get(VIEWS)
        tiny = torch.zeros(1 if views is None else int(views[0]), 3, 1, 1)
        layouts = self.encoded({**arguments, "pixel_values": tiny}, [count]).layouts
        structural = sum(len(layout.structural) for layout in layouts)
        return self.budget(count - structural) + self.structural(structural)

    def budget(self, cells: int) -> int:
        """How many of the patch tokens of a picture are kept."""
        for stage in self.stages:
            cells = stage.budget(cells)
        return cells

    def structural(self, count: int) -> int:
        """How many of its structural tokens are kept."""
        return 0 if self.plan.structural == "drop" else count

    def whole(self, layout: Layout) -> bool:
        """Whether all tokens of a picture are kept."""
        return self.budget(layout.cells) + self.structural(len(layout.structural)) == layout.tokens

    def question(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The token ids of a prompt that are the question: what stands behind its last visual; all text where nothing does."""
        config, marks = self.adapter.config, set(self.adapter.placeholders.values())
        ends = {
            token
            for name in ("start", "end")
            if (token := getattr(config, f"vision_{name}_token_id", None)) is not None
        }
        last = max((i for i, token in enumerate(prompt) if token in marks), default=-1)
        rest = list(prompt[last + 1 :])
        if rest and self.adapter.delimited and rest[0] in ends:
            rest = rest[1:]
        return tuple(rest) or tuple(token for token in prompt if token not in marks | ends)


class _Key:
    """A config and settings, equal where both say the same."""

    def __init__(self, config: Any, settings: Settings) -> None:
        self.config, self.settings = config, settings
        self.said = (json.dumps(config.to_dict(), sort_keys=True, default=str), settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.said == other.said

    def __hash__(self) -> int:
        return hash(self.said)


@functools.lru_cache(4)
def _twin(key: _Key) -> Twin:
    return Twin(key.config, key.settings)


def overrides(checkpoint: str, settings: Settings) -> dict[str, Any]:
    """What has to be overridden in the config of a checkpoint, once it is known that the plan can serve it. Raises ValueError for
    what is no checkpoint, NotImplementedError for what cannot serve."""
    try:
        config = AutoConfig.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"cannot load the config of {checkpoint!r}: {str(error).splitlines()[0]}") from error
    found = settings.overrides(config.architectures or [config.model_type])
    Twin(config, settings)
    return found


def sliced(arguments: dict[str, Any], first: int, last: int, pictures: int) -> dict[str, Any]:
    """What vLLM hands to the encoder for `pictures` pictures, for those from `first` to before `last`."""
    grids, views = arguments.get("image_grid_thw"), arguments.get(VIEWS)
    rows = grids.prod(-1).tolist() if grids is not None else None if views is None else [int(v) for v in views]
    found = {}
    for name, value in arguments.items():
        if name == "pixel_values" and rows is not None:
            begin = sum(rows[:first])
            value = value[begin : begin + sum(rows[first:last])]
        elif isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.dim() and len(value) == pictures):
            value = value[first:last]
        found[name] = value
    return found
