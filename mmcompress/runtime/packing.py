# SPDX-License-Identifier: Apache-2.0
"""Packing: from "which tokens live" to a shorter batch, right-aligned, in order, with no more padding than needed.

Counts are known on the host before the forward pass (budgets are exact), so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..kernels.compact import compact
from ..selection import Selection, gather

Array: TypeAlias = "np.ndarray[Any, Any]"
"""What is known on the host: small, and without a launch for each step."""


def sent(x: Array | Tensor, device: torch.device) -> Tensor:
    """What is known on the host, on `device`, without waiting: the values are taken over before this returns."""
    return (x if isinstance(x, Tensor) else torch.from_numpy(x)).to(device, non_blocking=True)


def take(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Rows of `tensors` [B or 1, S, ...], all on one device, at `index` [B, M]: [B, M, ...] on that device."""
    return compact(tensors, index.to(tensors[0].device))


def take_last(x: Tensor, index: Tensor) -> Tensor:
    """Columns of `x` [..., B or 1, S] at `index` [B, M]: [..., B, M], on the device of x."""
    index = index.to(x.device)
    if x.shape[-2] == index.shape[0] and x.dim() == 2:
        return x.gather(-1, index)
    x = x.expand(*x.shape[:-2], index.shape[0], x.shape[-1])
    return x.gather(-1, index.expand(*x.shape[:-2], *index.shape))


def follow(given: Any, index: Tensor, length: int, name: str) -> Any:
    """What a caller gave beside the tokens, for those at `index` [B, M] of `length`: every tensor in it (lists and dicts are gone
    through) that has a batch and the tokens as neighbouring dimensions, [..., B or 1, length, ...], gets M tokens; what has no
    such dimension stays. Raises NotImplementedError where the tokens are there in another form."""
    if isinstance(given, dict):
        return type(given)((key, follow(value, index, length, f"{name}[{key!r}]")) for key, value in given.items())
    if type(given) in (list, tuple):
        return type(given)(follow(value, index, length, name) for value in given)
    if not isinstance(given, Tensor):
        return given
    batch = len(index)
    for dim in range(1, given.dim()):
        if given.shape[dim] == length and given.shape[dim - 1] in (1, batch):
            flat = given.movedim((dim - 1, dim), (0, 1))
            taken = take([flat.expand(batch, *flat.shape[1:])], index)[0]
            return taken.movedim((0, 1), (dim - 1, dim))
    if given.dim() == 1 and given.shape[0] == length and batch == 1:
        return given[index[0].to(given.device)]
    if given.dim() and given.shape[0] in (length, batch * length) and length > 1:
        raise NotImplementedError(
            f"{name} of shape {tuple(given.shape)} speaks of the {length} tokens of the prompt without a batch dimension, so it "
            f"cannot be shortened with them: give it as [{batch}, {length}, ...]"
        )
    return given


@dataclass
class Packed:
    """source [B, M]: the token that each packed slot holds; place [B, M]: where in the sequence it now stands (differs
    where a method does not keep raster order), -1 in padding; valid [B, M], None if there is no padding."""

    source: Tensor
    place: Tensor
    valid: Tensor | None


def pack(places: Tensor, counts: list[int]) -> Packed:
    """Pack a batch.

    places [B, S]: for every token the place in the sequence where it is to stand (no place twice per row), -1 if it is
    gone. counts: how many tokens live in each row.
    """
    longest = max(counts)
    place, source = places.sort(dim=1, stable=True)
    place, source = place[:, places.shape[1] - longest :], source[:, places.shape[1] - longest :]
    return Packed(source, place, None if min(counts) == longest else place >= 0)


def renumbered(
    positions: Tensor | Any,
    places: Tensor,
    packed: Packed,
    valid: Tensor | None,
    reindex: bool,
    samples: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Position ids of packed tokens, [..., B, M], and how many ids have gone in each row, [B].

    positions [..., B or 1, S], or the number of the first token, where they count on from there; places, packed: as given to and
    made by `pack`; valid [B, S]: which tokens were real; samples [B, S]: the sample of each token, where a row holds several. With
    `reindex` a token loses as many as have gone before its place in its sample, else every token keeps its own.
    """

    def at(index: Tensor) -> Tensor:
        if isinstance(positions, Tensor) and positions.dim():
            return take_last(positions, index)
        return index if isinstance(positions, int) and not positions else index + positions

    if not reindex:
        return at(packed.source), None
    gone = places < 0
    gone = (gone if valid is None else gone & valid.to(gone.device)).cumsum(1)
    if samples is not None:
        begins = torch.nn.functional.pad(sent(samples, gone.device).diff(dim=1) != 0, (1, 0), value=True)
        numbers = torch.arange(gone.shape[1], device=gone.device).expand_as(gone)
        first = numbers.masked_fill(~begins, 0).cummax(1).values
        gone = gone - torch.nn.functional.pad(gone, (1, 0)).gather(1, first)
    place = packed.place if packed.valid is None else packed.place.clamp_min(0)
    moved = at(place)
    return moved - gone.gather(1, place).to(moved.device), gone[:, -1]


@dataclass(eq=False)
class Group:
    """The tokens of one call as the layers from `start` on see them.

    logical, physical  how many tokens the caller passed, how many are there.
    counts             how many of the physical ones are real in each row (host).
    valid              [B, physical] bool, None: all.
    source             [B, physical] logical token in each slot; None: the same.
    place              [B, physical] logical place where each slot stands, ascending, -1 in padding; None: the same. Differs from
                       source where a method does not keep raster order.
    from_base          [B, physical] slot of the first group of the call (after cuts in layers only).
    from_previous      [B, physical] slot of the group before (after cuts in layers only).
    tail               how many tokens at the end no row has dropped.
    mass               [B, physical] float32: how many tokens each stands for; None: one each.
    calibration        [B, 2, physical] float32: how many tokens each stands for in the first layer and in the others, in this call
                       alone; None: nothing is calibrated.
    positions          [..., B or 1, physical] position ids, before what earlier calls have shifted; gone [B]: by how much this
                       call has shifted them in each row so far; None: not at all.
    merges             what a cut merges: rows [U, 1] of the batch, slots [U, N] in the group before, and the selection.
    stage              plan string of the stage that cut; scores: rows [U, 1], slots [U, N] as above, and by which scores [U, N].
    """

    start: int
    logical: int
    physical: int
    counts: list[int]
    valid: Tensor | None = None
    source: Tensor | None = None
    place: Tensor | None = None
    from_base: Tensor | None = None
    from_previous: Tensor | None = None
    tail: int = 0
    positions: Tensor | None = None
    gone: Tensor | None = None
    merges: list[tuple[Tensor, Tensor, Selection]] = field(default_factory=list)
    stage: str = ""
    scores: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    mass: Tensor | None = None
    calibration: Tensor | None = None

    def enter(self, hidden: Tensor) -> Tensor:
        """Hidden states of the group before, [B, S, H], as those of this one: merged and gathered, [B, physical, H]."""
        for rows, at, chosen in self.merges:
            rows, at = rows.to(hidden.device), at.to(hidden.device)
            made = chosen.rows if chosen.rows is not None else chosen.apply(hidden[rows, at])
            slots = gather(at, chosen.keep)
            hidden = hidden.index_put((rows, slots), made.to(hidden))
        return hidden if self.from_previous is None else take([hidden], self.from_previous)[0]

    def restore(self, hidden: Tensor, ends: Array) -> Tensor:
        """Rows [B, physical, H] at their logical places, [B, logical, H]. A place whose token is gone shows the last token that is
        left before it: that is what the next token follows. So does the last place of a run of visual tokens (`ends`
        [B, logical]), whatever the order inside. Zeros before the first token."""
        assert self.source is not None and self.place is not None
        device = hidden.device
        source, place = self.source.to(device), self.place.to(device)
        numbers = torch.arange(1, self.logical + 1, device=device).expand(len(source), -1).contiguous()
        slots = numbers[:, : self.physical]
        # how many slots stand up to each place is the number of the last one of them; padding stands before all
        last = torch.searchsorted(place.contiguous(), numbers)
        if self.valid is None:
            index = last.scatter(1, source, slots)
        else:
            valid = self.valid.to(device)
            last = last.masked_fill(last <= (~valid).sum(1, keepdim=True), 0)
            spare = torch.nn.functional.pad(last, (0, 1))
            index = spare.scatter(1, source.masked_fill(~valid, self.logical), slots)[:, :-1]
        index = torch.where(sent(ends, device), last, index)
        shown = torch.cat([hidden.new_zeros(len(hidden), 1, hidden.shape[2]), hidden], 1)
        return gather(shown, index)
