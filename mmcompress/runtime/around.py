# SPDX-License-Identifier: Apache-2.0
"""Models around the one that sees: retrievers (ColPali and its like), which give an embedding for every token of the prompt.

They may put pictures among the embeddings themselves, so the model inside is given neither ids nor pixels; and what they make of
a token that is gone would be an embedding too. It is zero, as embeddings of padding are: late interaction (MaxSim) then sees the
tokens that were kept.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from .adapter import Encoded
from .encoder import opened_by_tower
from .packing import Group
from .scope import ENCODE, current, leave, notes

GIVEN, GONE = "given to the model around", "gone"
"""Notes of an engine: ids and keywords of pixels of the call that runs; which tokens are gone, [B, S] bool."""


def pixels_in(given: dict[str, Any]) -> dict[str, str]:
    """By modality: the keyword of a call that brings its pixels."""
    named = {name for name, value in given.items() if name.startswith("pixel_values") and value is not None}
    return {"video" if "video" in name else "image": name for name in sorted(named)}


class Around:
    """What the model around the base model of an engine is given, and what it makes; there is none where both have one config."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.model, self.base = engine, engine.adapter.model, engine.base
        self.parameters = list(inspect.signature(self.model.forward).parameters)

    @staticmethod
    def of(engine: Any) -> Around | None:
        adapter = engine.adapter
        return Around(engine) if adapter.config is not adapter.model.config else None

    def install(self) -> Iterator[RemovableHandle]:
        yield self.model.register_forward_hook(self._post)
        tower = getattr(self.engine.adapter, "tower", None)
        if tower is not None:
            original = tower.forward
            wrapper = functools.partial(self._tower, original)
            self.engine.replace(tower, "forward", functools.update_wrapper(wrapper, original))

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note what the model around is given."""
        given = {**dict(zip(self.parameters, args, strict=False)), **kwargs}
        notes(self.engine).clear()
        notes(self.engine)[GIVEN] = given.get("input_ids"), pixels_in(given)

    def _tower(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """The vision encoder. Called by the model around, it encodes as a method of the base model does, which is recorded."""
        given = notes(self.engine).get(GIVEN)
        scope = current(self.engine, ENCODE)
        if scope is not None and not opened_by_tower(scope):  # a method of the base model called it
            return original(*args, **kwargs)
        if given is None or not given[1] or current(self.engine) is not None:
            return original(*args, **kwargs)
        leave(self.engine, ENCODE)
        values = inspect.signature(original).bind(*args, **kwargs).args
        output = self.base.get_image_features(*values)
        output.pooler_output = torch.cat(list(output.pooler_output))
        return output

    def seen(self, ids: Tensor | None, embeds: Tensor | None) -> tuple[Tensor | None, list[Encoded], dict[str, str]]:
        """What the base model's call lacks: its ids, what was encoded for it, and the keywords of all pixels there were."""
        outer, pixels = notes(self.engine).pop(GIVEN, (None, {}))
        if ids is None and outer is not None and embeds is not None and embeds.shape[:2] == outer.shape:
            encoded = [notes(self.engine).pop(modality, None) for modality in pixels]
            return outer, [one for one in encoded if one is not None], pixels
        return ids, [], pixels

    def note(self, group: Group) -> None:
        """Note what is gone of the tokens of a call."""
        assert group.source is not None
        places = group.source if group.valid is None else group.source.masked_fill(~group.valid, group.logical)
        there = torch.zeros(len(places), group.logical + 1, dtype=torch.bool, device=places.device)
        notes(self.engine)[GONE] = ~there.scatter(1, places, True)[:, :-1]

    def _post(self, module: Any, args: tuple, output: Any) -> None:
        gone = notes(self.engine).pop(GONE, None)
        embeddings = getattr(output, "embeddings", None)
        if gone is not None and embeddings is not None:
            output.embeddings = embeddings.masked_fill(gone[..., None].to(embeddings.device), 0.0)
