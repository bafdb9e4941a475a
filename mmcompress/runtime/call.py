# SPDX-License-Identifier: Apache-2.0
"""State of one forward pass: what was encoded for it, where its visuals lie, which tokens each layer has."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..stage import MODALITIES, Pipeline
from ..visuals import Layout
from .adapter import Encoded
from .packing import Array, Group, sent
from .record import CallRecord, Span
from .scope import Scope


@dataclass
class Sight:
    """Where the visuals lie among the S tokens of a call, for stages that rewrite attention.

    visual  [B, S] bool: patch tokens. behind [B, S] bool: real tokens behind the last visual of their row (in a row without
            any: all, if there is a cache).
    fresh   which rows have visuals.
    counts  how many tokens at the end hold all those in `behind`: as the tokens came, and packed.
    """

    visual: Tensor
    behind: Tensor
    fresh: tuple[bool, ...]
    counts: tuple[int, int]

    @staticmethod
    def of(valid: Array, spans: list[Span], past: int, device: torch.device) -> Sight:
        """valid [B, S] bool; past: length of the cache."""
        length = valid.shape[1]
        visual, ends = np.zeros_like(valid), np.full(len(valid), 0 if past else length)
        fresh = [False] * len(valid)
        for span in spans:
            visual[span.row, span.places] = True
            trailing = span.layout.tokens - span.layout.patch_tokens()[-1]  # of structural tokens behind the last patch
            end = int(span.places[-1]) + trailing
            ends[span.row] = max(ends[span.row], end) if fresh[span.row] else end
            fresh[span.row] = True
        behind = valid & (np.arange(length) >= ends[:, None])
        open_, packed = int(behind.any(0).argmax()) if behind.any() else length, int(behind.sum(1).max())
        return Sight(sent(visual, device), sent(behind, device), tuple(fresh), (length - open_, packed))


class Own(NamedTuple):
    """What a layer gets where the language model gives it keywords of these `names`, with these rotary `tables` and `positions`:
    its tokens, its own `keywords` for them, and the names of those `others` that have to follow them."""

    group: Group
    names: tuple[str, ...]
    tables: Any
    positions: Any
    keywords: dict[str, Any]
    others: tuple[str, ...]


@dataclass(eq=False)
class Call(Scope):
    """One forward pass of the base model, in one thread.

    pixels            by modality: the keyword that brought its pixels, for what was not encoded.
    asleep            what is asked of the language model meanwhile runs as if there were no engine.
    visual            [B, S] bool on the host: all placeholders, structural and hidden ones too.
    mask              the attention mask that the caller gave.
    ready             the masks of who sees whom that came ready-made, over the tokens that the caller passed; see `masks`.
    config, windows   of the language model, and of each of its layers (see `windows`).
    samples           [B, S] number of the sample that each token belongs to, where a row holds several; else None.
    caches            whether the language model works with a cache: it was given one, or makes one itself.
    past, past_valid  logical length of the cache before the call, and which tokens of an unpruned cache are real.
    hidden            how many tokens there are up to the last one that the caller's mask hides in any row.
    groups            the tokens of the call, from the first layer on and after each cut.
    pools             [B, physical] int8: which slots of the last group hold patch tokens, by the number of their pool (`pools_of`),
                      0 for others; pool_counts: how many of each pool per row; structural: structural tokens in all rows.
    texts             [B, physical] bool: which slots hold the instruction (where a layer stage reads it); text_counts: how many.
    kept              by name: a number for each slot of the last group, [B, physical], for signals that come from before; summed:
                      the layer before which those that are sums over layers end.
    layouts           how all visuals of each row lie, one behind the other, where a layer stage reads that (None in a row without);
                      `kept["cells"]` then are the cells of it that the tokens are.
    seconds           from frame to frame of each video, as the model was told, in prompt order; None: it was not.
    entered           how many visual tokens of each row came to the first cut of the stage that is cutting.
    cuts              layers whose stage has been decided.
    sight             where its visuals are, and notes, carried: the state of each layer that has changed, and what goes from
                      layer to layer, if a stage rewrites attention.
    own               by layer: what it gets in the place of what the language model gives it.
    step              whether this is a step of decoding whose masses are rows of the ledgers (see `mass.is_step`).
    deepstack         by layer: features [B, physical of the first group, H] that are added before it (DeepStack levels that
                      come after the first cut; the model adds the others itself).
    """

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    encoded: list[Encoded]
    owner: Any = None
    pixels: dict[str, str] = field(default_factory=dict)
    asleep: bool = False
    visual: Array | None = None
    mask: Any = None
    ready: Any = None
    config: Any = None
    windows: Sequence[Any] = ()
    samples: Tensor | None = None
    cache: Cache | None = None
    caches: bool = False
    batch: int = 0
    past: int = 0
    past_valid: Tensor | None = None
    hidden: int = 0
    groups: list[Group] = field(default_factory=list)
    pools: Tensor | None = None
    pool_counts: dict[int, list[int]] = field(default_factory=dict)
    texts: Tensor | None = None
    text_counts: list[int] = field(default_factory=list)
    structural: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)
    summed: dict[str, int] = field(default_factory=dict)
    layouts: list[Layout | None] = field(default_factory=list)
    seconds: Any = None
    entered: list[int] = field(default_factory=list)
    cuts: set[int] = field(default_factory=set)
    sight: Sight | None = None
    notes: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[tuple[int, ...], Any] = field(default_factory=dict)
    tables: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict)
    own: dict[int, Own] = field(default_factory=dict)
    step: bool = False
    taken: dict[tuple[int, int], tuple[Group, tuple[Tensor, ...], tuple[Tensor, ...]]] = field(default_factory=dict)
    record: CallRecord | None = None
    start: float | None = None

    def __post_init__(self) -> None:
        super().__init__(self.owner)

    def group_of(self, layer: int) -> Group:
        """The tokens that layer number `layer` has."""
        for group in reversed(self.groups):
            if group.start <= layer:
                return group
        raise AssertionError("layers before the first group")

    def patches(self, pools: Collection[int]) -> Tensor:
        """Which slots of the last group hold patch tokens of some pools, [B, physical] bool."""
        assert self.pools is not None
        masks = [self.pools == number for number in pools]
        return functools.reduce(torch.logical_or, masks) if masks else torch.zeros_like(self.pools, dtype=torch.bool)

    def patch_counts(self, pools: Collection[int]) -> list[int]:
        """How many there are in each row."""
        return [sum(self.pool_counts[number][row] for number in pools) for row in range(self.batch)]

    def origin(self, span: Span) -> tuple[Encoded, int]:
        """The encoder call that a span came from, and its number there."""
        index = span.index
        for encoded in self.encoded:
            if encoded.modality == span.modality:
                if index < len(encoded.layouts):
                    return encoded, index
                index -= len(encoded.layouts)
        raise AssertionError("a span without an encoder call")


def pools_of(plan: Pipeline) -> dict[str, int]:
    """A number from 1 for every modality, the same for those that no stage in the layers tells apart: their tokens share a budget
    there, and how many are left of each is not known without waiting for the device."""
    inside = (*plan.layer_stages, *plan.exit_stages)
    wanted = {modality: tuple(modality in stage.modalities for stage in inside) for modality in MODALITIES}
    numbers = {key: number for number, key in enumerate(dict.fromkeys(wanted.values()), start=1)}
    return {modality: numbers[key] for modality, key in wanted.items()}


def alike(spans: list[Span]) -> list[list[Span]]:
    """Spans in batches that can be decided as one dense tensor."""
    batches: dict[Any, list[Span]] = defaultdict(list)
    for span in spans:
        batches[span.modality, span.layout, span.kept, len(span.words)].append(span)
    return list(batches.values())


def rows_alike(
    call: Call, pools: Collection[int], budget: Callable[[int], int], lays: bool = False
) -> dict[tuple[int, int, int, Layout | None], tuple[Tensor, Tensor, Tensor]]:
    """Rows of the batch that can be decided as one dense tensor, by (visual tokens of the pools, budget, text tokens, with `lays`
    how all visuals of the row lie, else None): their numbers [U, 1], and the places of these visual tokens [U, N] and of their
    instruction [U, T] in the last group."""
    assert call.texts is not None
    patches = call.patches(pools)
    members: dict[tuple[int, int, int, Layout | None], list[int]] = defaultdict(list)
    for row, tokens in enumerate(call.patch_counts(pools)):
        if tokens:
            members[tokens, budget(row), call.text_counts[row], call.layouts[row] if lays else None].append(row)
    found = {}
    for (tokens, k, words, layout), numbers in members.items():
        rows = sent(np.array(numbers)[:, None], patches.device)

        def places(mask: Tensor, count: int, rows: Tensor = rows, some: bool = len(numbers) < call.batch) -> Tensor:
            if not count:
                return rows.new_empty(len(rows), 0)
            mask = mask[rows[:, 0]] if some else mask
            return mask.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]

        found[tokens, k, words, layout] = rows, places(patches, tokens), places(call.texts, words)
    return found


def cells_of(call: Call, spans: list[Span], shape: tuple[int, int]) -> Array:
    """Which cell of the layout of its row each patch token is, [B, S] int64 (0 elsewhere); notes these layouts in the call."""
    cells = np.zeros(shape, np.int64)
    lying: defaultdict[int, list[Layout]] = defaultdict(list)
    for span in sorted(spans, key=lambda span: int(span.places[0])):
        first = sum(layout.cells for layout in lying[span.row])
        cells[span.row, span.places] = first + np.arange(len(span.places))
        lying[span.row].append(span.layout)
    call.layouts = [Layout.joined(lying[row]) if lying[row] else None for row in range(shape[0])]
    return cells
