# SPDX-License-Identifier: Apache-2.0
"""Packing: from "which tokens live" to a shorter batch, right-aligned, in order, with no more padding than needed.

Counts are known on the host before the forward pass (budgets are exact), so nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `x` [B or 1, S, D] at `index` [B, M]: [B, M, D], on the device of x."""
    index = index.to(x.device)
    x = x.expand(index.shape[0], -1, -1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


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

    def restore(self, hidden: Tensor) -> Tensor:
        """Rows [B, physical, H] back at their logical places, [B, logical, H], zeros where a token is gone."""
        assert self.source is not None
        index = self.source.to(hidden.device)
        if self.valid is not None:  # padding goes to a spare row that is cut off
            index = index.masked_fill(~self.valid.to(hidden.device), self.logical)
        full = hidden.new_zeros(hidden.shape[0], self.logical + 1, hidden.shape[-1])
        return full.scatter(1, index[..., None].expand_as(hidden), hidden)[:, :-1]
