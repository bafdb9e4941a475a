# SPDX-License-Identifier: Apache-2.0
"""State of one forward pass: what was encoded for it, where its visuals lie, which tokens each layer has."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..visuals import Layout
from .adapter import Adapter
from .packing import Group
from .record import CallRecord, Span


@dataclass
class Encoded:
    """What one call of an encoder method gave: the layouts of its visuals, their signals ([visuals, N, ...] each), the
    clusters that an encoder stage made ([visuals, N]) and how many there are in each visual."""

    modality: str
    layouts: list[Layout]
    signals: dict[str, Tensor] = field(default_factory=dict)
    clusters: Tensor | None = None
    left: int = 0


@dataclass
class Call:
    """One forward pass of the base model.

    past, past_valid  logical length of the cache before the call, and which tokens of an unpruned cache are real.
    shift             [B] what position ids are ahead of those in use after this call.
    groups            the tokens of the call, from the first layer on and after each cut.
    patches           [B, physical] bool: which slots of the last group hold patch tokens; patch_counts: how many per row.
    cuts              layers whose stage has been decided.
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    encoded: list[Encoded]
    cache: Cache | None = None
    batch: int = 0
    past: int = 0
    past_valid: Tensor | None = None
    shift: Tensor | None = None
    groups: list[Group] = field(default_factory=list)
    patches: Tensor | None = None
    patch_counts: list[int] = field(default_factory=list)
    cuts: set[int] = field(default_factory=set)
    masks: dict[tuple[int, int], Any] = field(default_factory=dict)
    record: CallRecord | None = None
    start: float | None = None

    def group_of(self, layer: int) -> Group:
        """The tokens that layer number `layer` has."""
        return [group for group in self.groups if group.start <= layer][-1]

    def origin(self, span: Span) -> tuple[Encoded, int]:
        """The encoder call that a span came from, and its number there."""
        index = span.index
        for encoded in self.encoded:
            if encoded.modality == span.modality:
                if index < len(encoded.layouts):
                    return encoded, index
                index -= len(encoded.layouts)
        raise AssertionError("a span without an encoder call")


def placeholder_masks(call: Call, adapter: Adapter) -> dict[str, Tensor]:
    """Where the visual tokens of each modality stand, [B, S] bool."""
    masks = {}
    for modality, token in adapter.placeholders.items():
        if call.input_ids is not None:
            masks[modality] = call.input_ids == token
        elif call.inputs_embeds is not None:  # embeddings were given: the same rule as transformers'
            embedding = adapter.model.get_input_embeddings()
            wanted = embedding(torch.tensor(token, device=call.inputs_embeds.device))
            masks[modality] = (call.inputs_embeds == wanted).all(-1)
    return masks


def locate(call: Call, adapter: Adapter, valid: Tensor | None, device: torch.device) -> tuple[Tensor, list[Span]]:
    """Which tokens are real, [B, S] on the host, and where each visual lies. The one wait for the device of a prefill."""
    masks = placeholder_masks(call, adapter)
    kinds = torch.zeros(next(iter(masks.values())).shape, dtype=torch.int8, device=device)
    for code, mask in enumerate(masks.values(), start=1):
        kinds[mask.to(device)] = code
    if valid is not None:
        kinds[~valid.to(device)] = -1
    kinds = kinds.cpu()
    spans: list[Span] = []
    for code, modality in enumerate(masks, start=1):
        layouts = [layout for e in call.encoded if e.modality == modality for layout in e.layouts]
        spans += _deal(modality, layouts, kinds == code)
    return kinds >= 0, spans


def _deal(modality: str, layouts: list[Layout], mask: Tensor) -> list[Span]:
    """Deal the visuals of one modality, in encoding order, to the placeholders in `mask` [B, S] (host).

    `generate` may have repeated every row after encoding (beams, several return sequences).
    """
    total, features = int(mask.sum()), sum(layout.tokens for layout in layouts)
    if not layouts or not total:
        return []
    copies, rest = divmod(total, features)
    if rest or mask.shape[0] % max(copies, 1):
        raise ValueError(
            f"the prompt has {total} {modality} placeholders, but {features} {modality} features were encoded: give one "
            f"{modality} for each of its place in the prompt"
        )
    spans: list[Span] = []
    index = 0
    for row in range(0, mask.shape[0], copies):
        places = mask[row].nonzero()[:, 0]
        first = 0
        while first < len(places):
            layout = layouts[index]
            mine = places[first : first + layout.tokens][layout.patch_tokens()]
            spans += [Span(row + copy, index, modality, layout, mine, 0) for copy in range(copies)]
            first += layout.tokens
            index += 1
    return spans


def alike(spans: list[Span]) -> list[list[Span]]:
    """Spans in batches that can be decided as one dense tensor."""
    batches: dict[Any, list[Span]] = defaultdict(list)
    for span in spans:
        batches[span.modality, span.layout].append(span)
    return list(batches.values())
