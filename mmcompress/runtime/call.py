# SPDX-License-Identifier: Apache-2.0
"""State of one forward pass: what was encoded for it, where its visuals lie, which tokens each layer has."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..stage import MODALITIES, Pipeline
from ..visuals import Layout, View
from .adapter import Adapter, Encoded, Run
from .packing import Group
from .record import CallRecord, Span
from .scope import Scope

HIDDEN, BROKEN = 32, 64
"""Added to the kind of a visual token that the attention mask hides; of one whose embedding is not finite."""


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
    def of(valid: Tensor, spans: list[Span], past: int, device: torch.device) -> Sight:
        """valid [B, S] bool on the host; past: length of the cache."""
        length = valid.shape[1]
        visual, ends = torch.zeros_like(valid), [0 if past else length] * len(valid)
        fresh = [False] * len(valid)
        for span in spans:
            visual[span.row, span.patches] = True
            trailing = span.layout.tokens - span.layout.patch_tokens()[-1]  # of structural tokens behind the last patch
            end = int(span.patches[-1]) + trailing
            ends[span.row] = max(ends[span.row], end) if fresh[span.row] else end
            fresh[span.row] = True
        behind = valid & (torch.arange(length) >= torch.tensor(ends)[:, None])
        open_, packed = int(behind.any(0).long().argmax()) if behind.any() else length, int(behind.sum(1).max())
        return Sight(visual.to(device), behind.to(device), tuple(fresh), (length - open_, packed))


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
    past, past_valid  logical length of the cache before the call, and which tokens of an unpruned cache are real.
    hidden            how many tokens there are up to the last one that the caller's mask hides in any row.
    groups            the tokens of the call, from the first layer on and after each cut.
    pools             [B, physical] int8: which slots of the last group hold patch tokens, by the number of their pool (`pools_of`),
                      0 for others; pool_counts: how many of each pool per row; structural: structural tokens in all rows.
    texts             [B, physical] bool: which slots hold the instruction (where a layer stage reads it); text_counts: how many.
    kept              by name: a number for each slot of the last group, [B, physical], for signals that come from before.
    entered           how many visual tokens of each row came to the first cut of the stage that is cutting.
    cuts              layers whose stage has been decided.
    sight             where its visuals are, and notes, carried: the state of each layer that has changed, and what goes from
                      layer to layer, if a stage rewrites attention.
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
    visual: Tensor | None = None
    mask: Any = None
    ready: Any = None
    config: Any = None
    windows: Sequence[Any] = ()
    samples: Tensor | None = None
    cache: Cache | None = None
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
    entered: list[int] = field(default_factory=list)
    cuts: set[int] = field(default_factory=set)
    sight: Sight | None = None
    notes: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    carried: dict[str, Tensor] = field(default_factory=dict)
    deepstack: dict[int, Tensor] = field(default_factory=dict)
    masks: dict[tuple[int, ...], Any] = field(default_factory=dict)
    tables: dict[tuple[int, ...], tuple[Tensor, ...]] = field(default_factory=dict)
    step: bool = False
    record: CallRecord | None = None
    start: float | None = None

    def __post_init__(self) -> None:
        super().__init__(self.owner)

    def group_of(self, layer: int) -> Group:
        """The tokens that layer number `layer` has."""
        return [group for group in self.groups if group.start <= layer][-1]

    def patches(self, pools: Collection[int]) -> Tensor:
        """Which slots of the last group hold patch tokens of some pools, [B, physical] bool."""
        assert self.pools is not None
        numbers = [self.pools == number for number in pools]
        return functools.reduce(torch.logical_or, numbers, torch.zeros_like(self.pools, dtype=torch.bool))

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


def placeholder_masks(call: Call, adapter: Adapter) -> dict[str, Tensor]:
    """Where the visual tokens of each modality stand, [B, S] bool."""
    masks = {modality: _where(call, adapter, token) for modality, token in adapter.placeholders.items()}
    return {modality: mask for modality, mask in masks.items() if mask is not None}


def _where(call: Call, adapter: Adapter, token: int) -> Tensor | None:
    """Where a token stands, [B, S] bool; None where the call has neither ids nor embeddings."""
    if call.input_ids is not None:
        return call.input_ids == token
    if call.inputs_embeds is None:
        return None
    embedding = adapter.model.get_input_embeddings()  # embeddings were given: the same rule as transformers'
    wanted = embedding(torch.tensor(token, device=call.inputs_embeds.device))
    return (call.inputs_embeds == wanted).all(-1)


def _inside(call: Call, adapter: Adapter, modality: str) -> Tensor | None:
    """What stands between the start and the end tokens of a modality, [B, S] bool on the host; None where it has none."""
    marks = [getattr(adapter.config, f"{modality}_{end}_token_id", None) for end in ("start", "end")]
    if any(mark is None for mark in marks):
        return None
    opened, closed = (_where(call, adapter, int(mark)) for mark in marks if mark is not None)
    if opened is None or closed is None:
        return None
    return (opened.long().cumsum(1) > closed.long().cumsum(1)).cpu()


def locate(call: Call, adapter: Adapter, valid: Tensor | None, embeds: Tensor, text: bool) -> tuple[Tensor, list[Span]]:
    """Which tokens are real, [B, S] on the host, and where each visual lies; with `text`, also where its instruction is. Visuals
    that the mask hides are left out. The one wait for the device of a prefill. Raises ValueError if `embeds` [B, S, D] are not
    finite at a visual token, or a mask hides a part of a visual."""
    device = embeds.device
    masks = placeholder_masks(call, adapter)
    for modality, mask in masks.items():
        if mask.shape != embeds.shape[:2]:
            raise ValueError(
                f"{mask.shape[1]} tokens became {embeds.shape[1]} embeddings inside the model, so it cannot be told where the "
                f"{modality} features are: let the processor put one placeholder for each of them into the prompt"
            )
    kinds = torch.zeros(next(iter(masks.values())).shape, dtype=torch.int8, device=device)
    for code, mask in enumerate(masks.values(), start=1):
        kinds[mask.to(device)] = code
    broken = (kinds > 0) & ~embeds.isfinite().all(-1)
    if valid is not None:
        hidden = ~valid.to(device)
        broken &= ~hidden
        kinds = torch.where(hidden, torch.where(kinds > 0, kinds + HIDDEN, -1), kinds)
    kinds = torch.where(broken, kinds + BROKEN, kinds).cpu()
    for row in (kinds > BROKEN).any(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"visual features of batch row {row} are not finite (NaN or Inf), so nothing can be chosen among them: look at the "
            f"picture's pixel values, and run a vision encoder that overflows in float16 in bfloat16 or float32"
        )
    hidden, call.visual = kinds > HIDDEN, kinds > 0
    spans: list[Span] = []
    places = {m: (kinds == code) | (kinds == code + HIDDEN) for code, m in enumerate(masks, start=1)}
    there = {modality for modality, mask in places.items() if bool(mask.any())}
    given = {encoded.modality for encoded in call.encoded}
    for modality in sorted(given, key=lambda m: (m in there, m)):
        # frames of a video may stand on the placeholders of pictures
        others = there - given - {"audio"} if modality != "audio" else set()
        standing = [m for m in (modality, *others) if m in there]
        if (
            not standing
            and modality == "video"
            and "image" in there
            and (inside := _inside(call, adapter, "video")) is not None
        ):
            places["video"], places["image"] = places["image"] & inside, places["image"] & ~inside
            standing = ["video"] if bool(places["video"].any()) else []
        if not standing:
            raise NotImplementedError(
                f"{modality} features were encoded, but no {modality} placeholder stands in the prompt, so it cannot be told where "
                f"they are (some models put pictures and videos on the same one): give pictures and videos in prompts of their "
                f"own, or uncompress the model"
            )
        encoded, mask = [e for e in call.encoded if e.modality == modality], places[standing[0]]
        if modality == "audio":
            # features come packed, padded or in pieces of one length: only the prompt says how long each one is; a video that is
            # shown in turns with its sound does not end it
            beside = mask | places["video"] if "video" in places else mask
            encoded[0].layouts = [Layout((View((1, run.length), role="audio"),)) for run in _runs(mask, beside)]
        spans += _deal(modality, encoded, mask, adapter)
    spans = [span for span in spans if not _hidden(span, hidden)]
    if text:
        samples = torch.zeros_like(kinds) if call.samples is None else call.samples
        for sample in samples.unique().tolist():
            mine = samples == sample
            instruction = instruction_of(kinds.masked_fill(~mine | hidden, -1), adapter)
            for span in spans:
                if mine[span.row, span.patches[0]]:
                    span.text = instruction[span.row].nonzero()[:, 0]
    return (kinds >= 0) & ~hidden, spans


def _hidden(span: Span, hidden: Tensor) -> bool:
    """Whether `hidden` [B, S] hides a visual."""
    part = int(hidden[span.row, span.patches].sum())
    if part not in (0, len(span.patches)):
        raise ValueError(
            f"the attention mask hides {part} of the {len(span.patches)} tokens of a {span.modality} in batch row {span.row}: "
            f"hide all of a visual, or none of it"
        )
    return part > 0


def instruction_of(kinds: Tensor, adapter: Adapter) -> Tensor:
    """The text after the last visual of each row, [B, S] bool; all text of rows that have none there.

    kinds [B, S]: 0 for text, above 0 for visual tokens. Where the adapter says so, the tokens beside those are no text.
    """
    visual, words = kinds > 0, kinds == 0
    if adapter.delimited:
        beside = torch.nn.functional.pad(visual, (1, 1))
        words &= ~(beside[:, :-2] | beside[:, 2:]) if adapter.opened else ~beside[:, :-2]
    after = words & visual.long().flip(1).cumsum(1).flip(1).eq(0)
    return torch.where(after.any(1, keepdim=True), after, words)  # where the question came before the picture


def _deal(modality: str, encoded: list[Encoded], mask: Tensor, adapter: Adapter) -> list[Span]:
    """Deal the visuals of one modality, in encoding order, to the placeholders in `mask` [B, S] (host).

    `generate` may have repeated every row after encoding (beams, several return sequences).
    """
    total, features = int(mask.sum()), sum(layout.tokens for e in encoded for layout in e.layouts)
    copies, rest = divmod(total, features)
    if rest or mask.shape[0] % max(copies, 1):
        raise ValueError(
            f"the prompt has {total} {modality} placeholders, but {features} {modality} features were encoded: give one "
            f"{modality} for each of its place in the prompt"
        )
    if len(encoded) == 1 and modality != "audio":
        adapter.assemble(encoded[0], _runs(mask[::copies]))
    layouts = [layout for e in encoded for layout in e.layouts]
    spans: list[Span] = []
    index = 0
    for row in range(0, mask.shape[0], copies):
        places = mask[row].nonzero()[:, 0]
        first = 0
        while first < len(places):
            layout = layouts[index]
            mine = places[first : first + layout.tokens]
            parts = mine[layout.patch_tokens()], mine[list(layout.structural)]
            spans += [Span(row + copy, index, modality, layout, parts[0], 0, parts[1]) for copy in range(copies)]
            first += layout.tokens
            index += 1
    return spans


def _runs(mask: Tensor, beside: Tensor | None = None) -> list[Run]:
    """The runs of True in the rows of `mask` [B, S], row after row; `beside`: those of that one, with what `mask` has in them."""
    edges = torch.nn.functional.pad((mask if beside is None else beside).long(), (1, 1)).diff(dim=1)
    starts, ends = (edges == 1).nonzero(), (edges == -1).nonzero()[:, 1]
    found = [
        Run(row, start, int(mask[row, start:end].sum()))
        for (row, start), end in zip(starts.tolist(), ends.tolist(), strict=True)
    ]
    return [run for run in found if run.length]


def alike(spans: list[Span]) -> list[list[Span]]:
    """Spans in batches that can be decided as one dense tensor."""
    batches: dict[Any, list[Span]] = defaultdict(list)
    for span in spans:
        batches[span.modality, span.layout, span.kept, len(span.text)].append(span)
    return list(batches.values())


def rows_alike(
    call: Call, pools: Collection[int], budget: Callable[[int], int]
) -> dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]]:
    """Rows of the batch that can be decided as one dense tensor, by (visual tokens of the pools, budget, text tokens): their
    numbers [U, 1], and the places of these visual tokens [U, N] and of their instruction [U, T] in the last group."""
    assert call.texts is not None
    patches = call.patches(pools)
    members: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for row, tokens in enumerate(call.patch_counts(pools)):
        if tokens:
            members[tokens, budget(row), call.text_counts[row]].append(row)
    found = {}
    for (tokens, k, words), numbers in members.items():
        rows = torch.tensor(numbers, device=patches.device)
        at, text = (
            mask[rows].to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
            for mask, count in ((patches, tokens), (call.texts, words))
        )
        found[tokens, k, words] = rows[:, None], at, text
    return found
