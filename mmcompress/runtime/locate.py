# SPDX-License-Identifier: Apache-2.0
"""Where the visuals lie in a prompt: the one thing that has to come from the device before anything can be decided.

It comes in one read: ids, which of the caller's tokens are real, and which embeddings are broken. Everything behind it is
arithmetic on small arrays, which waits for nothing and launches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..visuals import Layout, View
from .adapter import Adapter, Encoded, Run
from .call import Call
from .packing import Array
from .record import Span

MARKS = ("start", "end")
MICRO = 1_000_000
SMALL = 1 << 16
"""Numbers in a tensor that is still a list of sizes, grids or places, and no picture."""


def placeholder_masks(call: Call, adapter: Adapter) -> dict[str, Tensor]:
    """Where the visual tokens of each modality stand, [B, S] bool."""
    ids = _ids(call, adapter)
    return {} if ids is None else {modality: ids == token for modality, token in adapter.placeholders.items()}


def _ids(call: Call, adapter: Adapter) -> Tensor | None:
    """The ids of a call [B, S]; where it has embeddings alone, those of the tokens that are looked for, and -1 for others. None
    where it has neither."""
    if call.input_ids is not None or call.inputs_embeds is None:
        return call.input_ids
    given, embedding = call.inputs_embeds, adapter.model.get_input_embeddings()
    ids = torch.full(given.shape[:2], -1, device=given.device)
    marks = [token for modality in adapter.placeholders for token in _marks(adapter, modality) or ()]
    for token in (*marks, *adapter.placeholders.values()):  # the same rule as transformers'
        ids = ids.masked_fill((given == embedding(torch.full((), token, device=given.device))).all(-1), token)
    return ids


def _marks(adapter: Adapter, modality: str) -> tuple[int, int] | None:
    """The start and the end token of a modality, None where it has none."""
    begin, end = (getattr(adapter.config, f"{modality}_{mark}_token_id", None) for mark in MARKS)
    return None if begin is None or end is None else (int(begin), int(end))


def fetched(parts: Mapping[str, Tensor | None]) -> dict[str, Array]:
    """Tensors [B, *] of numbers or bool on the host, by name: those on a device come in one read, as int64."""
    there = {name: x.detach() if x.requires_grad else x for name, x in parts.items() if x is not None}
    away = {name: x for name, x in there.items() if x.device.type != "cpu"}
    found = {name: x.numpy() for name, x in there.items() if name not in away}
    for device in {x.device for x in away.values()}:
        mine = {name: x for name, x in away.items() if x.device == device}
        batch = max(len(x) for x in mine.values())
        joined = torch.cat([x.long().expand(batch, -1) for x in mine.values()], 1).cpu().numpy()
        edges = np.cumsum([x.shape[1] for x in mine.values()])[:-1]
        found |= dict(zip(mine, np.split(joined, edges, 1), strict=True))
    return found


@torch.compiler.disable
def on_host(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an encoder method, with sizes and grids (small tensors of whole numbers) on the host: one read of the device
    for all of them, whoever asks for them afterwards."""
    small = {
        name: x
        for name, x in arguments.items()
        if isinstance(x, Tensor)
        and x.device.type not in ("cpu", "meta")
        and not x.is_floating_point()
        and x.numel() <= SMALL
    }
    found = fetched({name: x.reshape(1, -1) for name, x in small.items()})
    moved = {name: torch.from_numpy(found[name]).view(x.shape).to(x.dtype) for name, x in small.items()}
    return {**arguments, **moved}


@torch.compiler.disable
@torch.no_grad()
def locate(call: Call, adapter: Adapter, valid: Tensor | None, embeds: Tensor, text: bool) -> tuple[Array, list[Span]]:
    """Which tokens are real, [B, S] bool on the host, and where each visual lies; with `text`, also where its instruction is.
    Visuals that the mask hides are left out. The one wait for the device of a prefill: `call.past` and `call.past_valid` come with
    it. Raises ValueError if `embeds` [B, S, D] are not finite at a visual token, or a mask hides a part of a visual."""
    ids = _ids(call, adapter)
    assert ids is not None
    if ids.shape != embeds.shape[:2]:
        raise ValueError(
            f"{ids.shape[1]} tokens became {embeds.shape[1]} embeddings inside the model, so it cannot be told where the "
            f"{next(iter(adapter.placeholders))} features are: let the processor put one placeholder for each of them into the "
            f"prompt"
        )
    broken = (embeds - embeds).any(-1)  # not finite: what is makes 0
    past = call.past.view(1, 1) if isinstance(call.past, Tensor) else None
    steps = call.seconds.reshape(1, -1) if isinstance(call.seconds, Tensor) else None
    if steps is not None and steps.device.type != "cpu":
        steps = (steps.double() * MICRO).round()  # what comes from a device comes as whole numbers
    parts = {"ids": ids, "broken": broken, "valid": valid, "before": call.past_valid, "past": past, "steps": steps}
    host = fetched(parts)
    ids_, before = host["ids"], host.get("before")
    if past is not None:
        call.past = int(host["past"].flat[0])
    if before is not None and before.all():
        call.past_valid = None
    real = np.ones(ids_.shape, bool)
    if valid is not None:
        real &= host["valid"] != 0
    kinds = np.zeros(ids_.shape, np.int8)
    for code, token in enumerate(adapter.placeholders.values(), start=1):
        kinds[ids_ == token] = code
    visual = kinds > 0
    if host["broken"].any() and (found := (host["broken"] != 0) & visual & real).any():
        row = int(found.any(1).argmax())
        raise ValueError(
            f"visual features of batch row {row} are not finite (NaN or Inf), so nothing can be chosen among them: look at the "
            f"picture's pixel values, and run a vision encoder that overflows in float16 in bfloat16 or float32"
        )
    call.visual = visual
    places = {modality: kinds == code for code, modality in enumerate(adapter.placeholders, start=1)}
    spans = _spans(call, adapter, places, ids_)
    if valid is not None and (hidden := visual & ~real).any():
        spans = [span for span in spans if not _hidden(span, hidden)]
    if call.seconds is not None:
        seconds = (
            list(call.seconds) if steps is None else (host["steps"][0] / (1 if steps.device.type == "cpu" else MICRO))
        )
        for span in spans:
            if span.modality == "video" and span.index < len(seconds):
                span.layout = replace(span.layout, seconds=float(seconds[span.index]))
    if text:
        samples = np.zeros_like(ids_) if call.samples is None else call.samples.numpy()
        for sample in np.unique(samples):
            mine = samples == sample
            instruction = instruction_of(np.where(mine & real, kinds, -1), adapter)
            for span in spans:
                if mine[span.row, span.places[0]]:
                    span.words = np.flatnonzero(instruction[span.row])
    return real, spans


def _spans(call: Call, adapter: Adapter, places: dict[str, Array], ids: Array) -> list[Span]:
    """All visuals of a call; `places` by modality, [B, S] bool: where its placeholders stand."""
    spans: list[Span] = []
    there = {modality for modality, mask in places.items() if mask.any()}
    given = {encoded.modality for encoded in call.encoded}
    for modality in sorted(given, key=lambda m: (m in there, m)):
        # frames of a video may stand on the placeholders of pictures
        others = there - given - {"audio"} if modality != "audio" else set()
        standing = [m for m in (modality, *others) if m in there]
        if (
            not standing
            and modality == "video"
            and "image" in there
            and (marks := _marks(adapter, "video")) is not None
        ):
            inside = (ids == marks[0]).cumsum(1) > (ids == marks[1]).cumsum(1)
            places["video"], places["image"] = places["image"] & inside, places["image"] & ~inside
            standing = ["video"] if places["video"].any() else []
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
    return spans


def _hidden(span: Span, hidden: Array) -> bool:
    """Whether `hidden` [B, S] hides a visual."""
    part = int(hidden[span.row, span.places].sum())
    if part not in (0, len(span.places)):
        raise ValueError(
            f"the attention mask hides {part} of the {len(span.places)} tokens of a {span.modality} in batch row {span.row}: "
            f"hide all of a visual, or none of it"
        )
    return part > 0


def instruction_of(kinds: Array, adapter: Adapter) -> Array:
    """The text after the last visual of each row, [B, S] bool; all text of rows that have none there.

    kinds [B, S]: 0 for text, above 0 for visual tokens. Where the adapter says so, the tokens beside those are no text.
    """
    visual, words = kinds > 0, kinds == 0
    if adapter.delimited:
        beside = _edged(visual)
        words &= ~(beside[:, :-2] | beside[:, 2:]) if adapter.opened else ~beside[:, :-2]
    after = words & ~np.maximum.accumulate(visual[:, ::-1], 1)[:, ::-1]
    return np.where(after.any(1, keepdims=True), after, words)  # where the question came before the picture


def _deal(modality: str, encoded: list[Encoded], mask: Array, adapter: Adapter) -> list[Span]:
    """Deal the visuals of one modality, in encoding order, to the placeholders in `mask` [B, S].

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
        places = np.flatnonzero(mask[row])
        first = 0
        while first < len(places):
            layout = layouts[index]
            mine = places[first : first + layout.tokens]
            apart, none = list(layout.structural), mine[:0]
            cells, others = (mine[layout.patch_tokens()], mine[apart]) if apart else (mine, none)
            spans += [Span(row + copy, index, modality, layout, cells, 0, others, none) for copy in range(copies)]
            first += layout.tokens
            index += 1
    return spans


def _edged(mask: Array) -> Array:
    """A mask [B, S] with False on both sides, [B, S + 2]."""
    edged = np.zeros((len(mask), mask.shape[1] + 2), bool)
    edged[:, 1:-1] = mask
    return edged


def _runs(mask: Array, beside: Array | None = None) -> list[Run]:
    """The runs of True in the rows of `mask` [B, S], row after row; `beside`: those of that one, with what `mask` has in them."""
    edges = np.diff(_edged(mask if beside is None else beside).view(np.int8), axis=1)
    (rows, starts), ends = np.nonzero(edges == 1), np.nonzero(edges == -1)[1]
    found = [
        Run(row, start, int(mask[row, start:end].sum()))
        for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True)
    ]
    return [run for run in found if run.length]
