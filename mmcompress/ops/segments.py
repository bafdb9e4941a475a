# SPDX-License-Identifier: Apache-2.0
"""Videos cut into segments where neighbouring frames differ, and their tokens packed frame by frame."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import density
from .groups import group_sizes, group_sum
from .precision import wide


class Lies(Protocol):
    """What is asked of a layout."""

    @property
    def frames(self) -> int: ...

    @property
    def cells(self) -> int: ...


class Has(Protocol):
    """What is asked of visuals."""

    @property
    def features(self) -> Tensor: ...

    @property
    def layout(self) -> Lies: ...

    @property
    def slots(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Places:
    """Where N tokens lie in videos of `frames` frames of at most `most` tokens; a picture is one frame.

    frame  [U, N] int64: the frame of each token; cell [U, N] int64: its place there, in [0, most).
    whole  whether all tokens are there, in order.
    """

    frame: Tensor
    cell: Tensor
    frames: int
    most: int
    whole: bool = False

    @staticmethod
    def of(visuals: Has) -> Places:
        many, tokens = visuals.features.shape[:2]
        frames = visuals.layout.frames
        most = visuals.layout.cells // frames
        slots = visuals.slots
        if slots is None:
            slots = torch.arange(tokens, device=visuals.features.device).expand(many, -1)
        return Places(slots // most, slots % most, frames, most, visuals.slots is None)

    @property
    def tokens(self) -> int:
        return self.frame.shape[1]

    def row(self, visual: int) -> Places:
        """Those of one of the videos."""
        part = slice(visual, visual + 1)
        return replace(self, frame=self.frame[part], cell=self.cell[part])

    def sizes(self) -> Tensor:
        """Tokens of each frame, [U, T] int64."""
        if self.whole:
            return self.frame.new_full((len(self.frame), self.frames), self.most)
        return group_sizes(self.frame, self.frames)

    def packed(self) -> Packed:
        """All tokens, frame by frame."""
        return Packed(self.frame, self.frames, self.most, self.whole)


@torch.no_grad()
def likeness(frames: Tensor) -> Tensor:
    """Cosine of each frame vector to the next one: frames [U, T, G] to [U, T - 1] float32."""
    unit = F.normalize(wide(frames), dim=-1, eps=1e-8)
    return (unit[:, :-1] * unit[:, 1:]).sum(-1)


def segments(similar: Tensor, fewest: int, threshold: float) -> Tensor:
    """Number of the segment of each frame, [U, T] int64 from 0: cut where `similar` [U, T - 1] is below `threshold`, and where
    it is lowest until there are `fewest` segments (or as many as frames). Ties go to the lower frame."""
    lowest = similar.sort(dim=1, stable=True).indices[:, : max(0, fewest - 1)]
    cut = (similar < threshold).scatter(1, lowest, True)
    return F.pad(cut.long().cumsum(1), (1, 0))


def of_segment(values: Tensor, segment: Tensor) -> Tensor:
    """Sum over the segment of each frame: values and segment [U, T] to [U, T]."""
    return values if values.shape[1] == 1 else group_sum(values, segment, values.shape[1]).gather(1, segment)


def first_of_segment(values: Tensor, segment: Tensor) -> Tensor:
    """The value of the first frame of the segment of each frame, where values [U, T] rise."""
    if values.shape[1] == 1:
        return values
    return values.masked_fill(F.pad(segment[:, 1:] == segment[:, :-1], (1, 0)), 0).cummax(1).values


class Packed:
    """The tokens of groups side by side, as the kernels take segments: nothing waits for the device.

    groups [U, N] in [0, count), -1 for tokens that take no part; they come behind all segments. most: the most tokens of a group,
    as known on the host. whole: the tokens come group by group, each of `most`.

    order    [U * N]: the token of each packed row, None: in order. segment [U * N]: the group of each, counted through.
    ends     [U * count + 1]: where the groups begin.
    """

    def __init__(self, groups: Tensor, count: int, most: int, whole: bool = False) -> None:
        visuals, self.tokens = groups.shape
        self.groups, self.count, self.most, every = groups, count, max(1, most), visuals * count
        if visuals > 1:
            groups = groups + count * torch.arange(visuals, device=groups.device)[:, None]
        if whole:
            self.segment, self.order = groups.flatten(), None
            self.ends = torch.arange(0, groups.numel() + 1, most, device=groups.device)
            return
        self.segment, self.order = groups.masked_fill(self.groups < 0, every).flatten().sort(stable=True)
        self.ends = torch.searchsorted(self.segment, torch.arange(every + 1, device=groups.device))

    def rows(self, x: Tensor, count: int | None = None) -> Tensor:
        """The first `count` rows of x [U, N, ...] as they are packed."""
        x = x.flatten(0, 1)
        return x[:count] if self.order is None else x.index_select(0, self.order[:count])

    def unpacked(self, values: Tensor) -> Tensor:
        """What was found for each packed row, [U * N], back at its token, [U, N]."""
        if self.order is not None:
            values = torch.empty_like(values).scatter(0, self.order, values)
        return values.view(-1, self.tokens)

    def slots(self, rows: Tensor) -> Tensor:
        """The slot of each of the packed `rows` in its visual."""
        found = rows if self.order is None else self.order[rows]
        return found % self.tokens if len(self.groups) > 1 else found


@torch.no_grad()
def peaks(x: Tensor, packed: Packed, neighbours: int | Tensor) -> Tensor:
    """How much each token is a density peak of its group, [U, N] float32: the logarithm of density times gap (see
    `ops.density.density_peaks`); -inf for tokens that take no part.

    x [U, N, C]; packed: the groups. neighbours: how many make a density, with the token itself; or for each group how many, [U,
    count], 1 to 7. With 1 all are equally dense, so that the first of a group is its peak; with 2 so are tokens that are nearest
    to each other: of such a pair no one is the denser. Cost n^2 C / 2 for a group of n (on a GPU for each number of neighbours),
    memory O(N C).
    """
    if isinstance(neighbours, int):
        return _peaks(x, packed, neighbours, None)
    groups = packed.groups
    own = neighbours.gather(1, groups.clamp_min(0)).masked_fill(groups < 0, 0)
    asked = range(1, 8) if x.device.type != "cpu" else [k for k in range(1, 8) if (own.numpy() == k).any()]
    found = torch.full(groups.shape, float("-inf"), device=x.device)
    for k in asked:
        mine = own == k
        here = _peaks(x, packed, k, mine)
        if k == 2:  # in the order of the slots the later of a pair is less dense, in the other order the earlier
            other = _peaks(x.flip(1), Packed(groups.flip(1), packed.count, packed.most), k, mine.flip(1)).flip(1)
            here = torch.maximum(here, other)
        found = torch.where(mine, here, found)
    return found


def _peaks(x: Tensor, packed: Packed, k: int, mask: Tensor | None) -> Tensor:
    known = None if mask is None else packed.rows(mask)
    spread, gap = density.density_peaks(packed.rows(x), k, mask=known, cu_seqlens=packed.ends, max_seqlen=packed.most)
    return packed.unpacked(gap.log() - spread).masked_fill(packed.groups < 0, float("-inf"))


@torch.no_grad()
def nearest_of_group(x: Tensor, packed: Packed, centres: Tensor, total: int) -> Tensor:
    """The slot of the centre of its group that is nearest to each token, [U, N] int64, that of a centre itself; -1 for tokens of
    group -1 or of a group without centres.

    x [U, N, C]; packed: the groups; centres [U, N] bool, at most `total` of them in all. Euclidean, ties to the lower
    slot. Cost n m C per group.
    """
    stand = Packed(packed.groups.masked_fill(~centres, -1), packed.count, packed.most)
    found = density.nearest(
        packed.rows(x), stand.rows(x, total), cu_seqlens_x=packed.ends, cu_seqlens_y=stand.ends,
        max_seqlens=(packed.most, stand.most),
    )[1]  # fmt: skip
    slot = packed.unpacked(stand.slots(found.clamp_min(0)).masked_fill(found < 0, -1))
    own = torch.arange(packed.tokens, device=x.device)
    return torch.where(centres, own, slot).masked_fill(packed.groups < 0, -1)
