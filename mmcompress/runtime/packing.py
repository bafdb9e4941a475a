# SPDX-License-Identifier: Apache-2.0
"""Packing: from "which tokens live" to a shorter batch, right-aligned, in order, with no more padding than needed.

Counts are known on the host before the forward pass (budgets are exact), so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..kernels.compact import compact
from ..selection import Selection, gather


def take(tensors: Sequence[Tensor], index: Tensor) -> list[Tensor]:
    """Rows of `tensors` [B or 1, S, ...], all on one device, at `index` [B, M]: [B, M, ...] on that device."""
    return compact(tensors, index.to(tensors[0].device))


def take_last(x: Tensor, index: Tensor) -> Tensor:
    """Columns of `x` [..., B or 1, S] at `index` [B, M]: [..., B, M], on the device of x."""
    index = index.to(x.device)
    x = x.expand(*x.shape[:-2], index.shape[0], x.shape[-1])
    return x.gather(-1, index.expand(*x.shape[:-2], *index.shape))


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
    positions: Tensor, places: Tensor, packed: Packed, valid: Tensor | None, reindex: bool
) -> tuple[Tensor, Tensor | None]:
    """Position ids of packed tokens, [..., B, M], and how many ids have gone in each row, [B].

    positions [..., B or 1, S]; places, packed: as given to and made by `pack`; valid [B, S]: which tokens were real.
    With `reindex` a token loses as many as have gone before its place, else every token keeps its own.
    """
    if not reindex:
        return take_last(positions, packed.source), None
    gone = places < 0
    gone = (gone if valid is None else gone & valid.to(gone.device)).long().cumsum(1)
    place = packed.place.clamp_min(0)
    return take_last(positions, place) - gone.gather(1, place).to(positions.device), gone[:, -1]


@dataclass(eq=False)
class Group:
    """The tokens of one call as the layers from `start` on see them.

    logical, physical  how many tokens the caller passed, how many are there.
    counts             how many of the physical ones are real in each row (host).
    valid              [B, physical] bool, None: all.
    source             [B, physical] logical token in each slot; None: the same.
    from_base          [B, physical] slot of the first group of the call (after cuts in layers only).
    from_previous      [B, physical] slot of the group before (after cuts in layers only).
    tail               how many tokens at the end no row has dropped.
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
    from_base: Tensor | None = None
    from_previous: Tensor | None = None
    tail: int = 0
    positions: Tensor | None = None
    gone: Tensor | None = None
    merges: list[tuple[Tensor, Tensor, Selection]] = field(default_factory=list)
    stage: str = ""
    scores: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def enter(self, hidden: Tensor) -> Tensor:
        """Hidden states of the group before, [B, S, H], as those of this one: merged and gathered, [B, physical, H]."""
        for rows, at, chosen in self.merges:
            rows, at = rows.to(hidden.device), at.to(hidden.device)
            made = chosen.rows if chosen.rows is not None else chosen.apply(hidden[rows, at])
            slots = gather(at, chosen.keep)
            hidden = hidden.index_put((rows.expand_as(slots), slots), made.to(hidden))
        return hidden if self.from_previous is None else take([hidden], self.from_previous)[0]

    def restore(self, hidden: Tensor) -> Tensor:
        """Rows [B, physical, H] back at their logical places, [B, logical, H], zeros where a token is gone."""
        assert self.source is not None
        index = self.source.to(hidden.device)
        if self.valid is not None:  # padding goes to a spare row that is cut off
            index = index.masked_fill(~self.valid.to(hidden.device), self.logical)
        full = hidden.new_zeros(hidden.shape[0], self.logical + 1, hidden.shape[-1])
        return full.scatter(1, index[..., None].expand_as(hidden), hidden)[:, :-1]
