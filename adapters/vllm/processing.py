# SPDX-License-Identifier: Apache-2.0
"""The frontend: as many placeholders as tokens are kept, and everything that decides which ones in the keys of all caches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import PromptUpdateDetails

from . import FIELD
from .twin import Twin

IDENTITY, QUESTION = "mmcompress_identity", "mmcompress_question"
"""What comes with each picture to the worker: 16 bytes that tell it from others, as two int64; and the ids of the question."""


class Compressing:
    """A processor of vLLM, of any family, whose images have fewer placeholders."""

    info: Any

    @functools.cached_property
    def twin(self) -> Twin:
        twin = Twin.of(self.info.get_hf_config())
        assert twin is not None
        return twin

    def get_dummy_mm_inputs(self, *args: Any, **kwargs: Any) -> Any:
        self._made_up = True  # a prompt for measuring memory, without any text
        try:
            return super().get_dummy_mm_inputs(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._made_up = False

    _made_up = False

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        twin = self.twin
        question: tuple[int, ...] = ()
        if inputs.mm_data_items.get_all_counts().get("image", 0) and not self._made_up:
            if inputs.prompt and inputs.prompt[-1] in twin.adapter.placeholders.values():
                raise ValueError(
                    "the prompt ends with an image, and its last token may be dropped: put text behind it, as chat templates do"
                )
            question = twin.question(inputs.prompt) if twin.reads_text else ()
        # keyword arguments are part of the key of an item in every cache
        key = (repr(twin.plan), question)
        kwargs = {**inputs.hf_processor_mm_kwargs, FIELD: key}
        return super().apply(dataclasses.replace(inputs, hf_processor_mm_kwargs=kwargs), timing_ctx)  # type: ignore[misc]

    def _apply_hf_processor_main(self, mm_items: Any, *args: Any, **kwargs: Any) -> Any:
        # releases differ in what they call the mapping
        mappings = [value for value in (*args, *kwargs.values()) if isinstance(value, Mapping) and FIELD in value]
        plan, question = mappings[0][FIELD]
        out = super()._apply_hf_processor_main(  # type: ignore[misc]
            mm_items, *map(_without, args), **{name: _without(value) for name, value in kwargs.items()}
        )
        images = mm_items.get_all_counts().get("image", 0)
        if images:
            salt = repr((plan, question, [sorted(_without(m).items()) for m in mappings]))
            out[IDENTITY] = torch.stack([_identity(item, salt) for item in mm_items["image"].get_all_items_for_hash()])
            if self.twin.reads_text:
                out[QUESTION] = torch.tensor([question or (0,)] * images)
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]) -> Any:
        fields = dict(super()._get_mm_fields_config(hf_inputs, _without(hf_processor_mm_kwargs)))  # type: ignore[misc]
        fields |= {
            name: MultiModalFieldConfig.batched("image", keep_on_cpu=True)
            for name in (IDENTITY, QUESTION)
            if name in hf_inputs
        }
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, object], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        updates = super()._get_prompt_updates(mm_items, _without(hf_processor_mm_kwargs), out_mm_kwargs)  # type: ignore[misc]
        items = out_mm_kwargs.get("image", ())
        return [
            dataclasses.replace(update, replacement=self._shrunk(update.replacement, items))
            if update.modality == "image"
            else update
            for update in updates
        ]

    def _shrunk(self, replacement: Any, items: Sequence[Any]) -> Callable[[int], PromptUpdateDetails]:
        """A replacement with as many of its placeholders as are kept, and all of its other tokens."""

        def shrunk(index: int) -> PromptUpdateDetails:
            full = replacement(index) if callable(replacement) else replacement
            details = full if isinstance(full, PromptUpdateDetails) else PromptUpdateDetails.from_seq(list(full))
            which = details.is_embed
            embeds = [True] * len(details.full) if which is None else which(details.full).tolist()
            data = {name: value[None] for name, value in items[index].get_data().items() if hasattr(value, "dim")}
            left = self.twin.kept(data, sum(embeds))
            tokens = []
            for token, is_embed in zip(details.full, embeds, strict=True):
                if not is_embed or left > 0:
                    tokens.append(token)
                left -= is_embed
            return PromptUpdateDetails(full=tokens, is_embed=which)

        return shrunk


def _without(value: Any) -> Any:
    """A mapping without what is only there for the key; anything else as it is."""
    return {k: v for k, v in value.items() if k != FIELD} if isinstance(value, Mapping) and FIELD in value else value


def _identity(item: Any, salt: str) -> torch.Tensor:
    """What tells a picture, and what is done to it, from others: [2] int64."""
    digest = hashlib.blake2b(salt.encode(), digest_size=16)
    for chunk in MultiModalHasher.iter_item_to_bytes("image", item):
        digest.update(chunk)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.int64)


def factories(base: Any) -> dict[str, Any]:
    """What a model registers for its processor, on top of what `base` registered: those may be functions, so that only what they
    make tells the class."""
    made = base._processor_factory

    @functools.cache
    def compressing(kind: type) -> type:
        return type(f"Compressing{kind.__name__}", (Compressing, kind), {})

    def processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
        kind = type(made.processor(info, dummy_inputs, **kwargs))
        return compressing(kind)(info, dummy_inputs, **kwargs)

    return {"processor": processor, "info": made.info, "dummy_inputs": made.dummy_inputs}
