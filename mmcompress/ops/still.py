# SPDX-License-Identifier: Apache-2.0
"""Places of a video that stay the same over a window of frames: which windows, and one token for all that is seen there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.gather import gather
from ..kernels.merge import merge
from .groups import group_sizes
from .known import known_zero
from .precision import wide
from .segments import Packed, Places, nearest_of_group
from .shares import worth_shares
from .ties import argmax_first, largest


def table_of(at: Places) -> Tensor:
    """The token at each place of each frame, [U, T * P] int64, -1 where there is none."""
    number = torch.arange(at.tokens, device=at.frame.device).expand_as(at.frame)
    if at.whole:
        return number
    table = torch.full((len(number), at.frames * at.most), -1, device=number.device)
    return table.scatter(1, at.frame * at.most + at.cell, number)


@torch.no_grad()
def unchanged(x: Tensor, at: Places, threshold: float) -> tuple[Tensor, Tensor]:
    """Cosine of each token x [U, N, C] with the one at the same place of the next frame, by place, [U, T - 1, P] float32 (0
    where one is missing), and whether it is above the threshold."""
    shape, rows = (at.frames, at.most), F.normalize(wide(x), dim=-1)
    table = table_of(at)
    there = (table >= 0).unflatten(1, shape)
    rows = (rows if at.whole else gather(rows, table.clamp_min(0))).unflatten(1, shape)
    both = there[:, :-1] & there[:, 1:]
    cosine = (rows[:, :-1] * rows[:, 1:]).sum(3).masked_fill(~both, 0)
    return cosine, (cosine > threshold) & both


@torch.no_grad()
def best_windows(same: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The split of a video into windows in which most tokens repeat: the first frame of the window of each frame, [U, T] int64, and
    how many tokens repeat one before them in their window, [U] int64.

    same [U, T - 1, P] bool: what does not change from a frame to the next. A window of L frames saves L - 1 tokens at each
    place that is the same throughout; windows have at most `longest` frames; of equal splits shorter last windows are taken.
    Cost T^2 + T P, in T steps.
    """
    visuals, steps, _ = same.shape
    device, frames = same.device, steps + 1
    number = torch.arange(steps, device=device)[:, None]
    run = number - torch.where(same, -1, number).cummax(1).values
    held = torch.zeros(visuals, steps, frames + 1, dtype=torch.int64, device=device)
    held = held.scatter_add(2, run, torch.ones_like(run)).flip(2).cumsum(2).flip(2)
    length = torch.arange(frames, device=device)
    best = torch.zeros(visuals, 1, dtype=torch.int64, device=device)
    begins = []
    for frame in range(frames):
        most = min(frame + 1, longest)
        saved = best[:, frame + 1 - most :].flip(1)
        if frame:
            saved = saved + held[:, frame - 1, :most] * length[:most]
        chosen = argmax_first(saved)
        best = torch.cat([best, saved.gather(1, chosen[:, None])], 1)
        begins.append(frame - chosen)
    begin = torch.stack(begins, 1)
    window, at = torch.zeros_like(begin), begin[:, -1:]
    for frame in range(frames - 1, -1, -1):
        at = torch.where(at > frame, begin[:, frame : frame + 1], at)
        window[:, frame : frame + 1] = at
    return window, best[:, -1]


def window_lengths(window: Tensor) -> Tensor:
    """How many frames the window of each frame has, [U, T], by the first frame of each one's window."""
    return group_sizes(window, window.shape[1]).gather(1, window)


@torch.no_grad()
def same_throughout(same: Tensor, window: Tensor, at: Places) -> Tensor:
    """Which tokens are at places that stay `same` [U, T - 1, P] in their whole window of several frames, [U, N] bool."""
    count = window.shape[1]
    changes = F.pad(~same, (0, 0, 1, 0)) & (window.diff(dim=1, prepend=window[:, :1] - 1) == 0)[..., None]
    index = window[..., None].expand_as(changes)
    broken = torch.zeros(changes.shape, dtype=torch.int64, device=same.device).scatter_add(1, index, changes.long())
    still = (broken == 0) & (group_sizes(window, count) > 1)[..., None]
    own = window.gather(1, at.frame) * at.most + at.cell
    return still.flatten(1).gather(1, own)


@dataclass(frozen=True)
class Still:
    """Tokens of a video, those at still places as one for their window: it stands in the window's first frame.

    head   [U, N] int64: the token that stands for each, itself where it is not still.
    group  [U, N] int64: the first frame of its window for one that stands for several, T + its frame for one that does not, -1 for
           those that another one stands for.
    means  [U, N, C]: means of all that each stands for (0 where it stands for none).
    count  how many groups there are: 2 T; a picture is one.
    """

    head: Tensor
    group: Tensor
    means: Tensor
    count: int

    @staticmethod
    def of(x: Tensor, at: Places, window: Tensor, still: Tensor) -> Still:
        own = torch.arange(at.tokens, device=x.device).expand_as(at.frame)
        begin = window.gather(1, at.frame)
        head = torch.where(still, table_of(at).gather(1, begin * at.most + at.cell), own)
        group = torch.where(still, begin.masked_fill(head != own, -1), at.frames + at.frame)
        return Still(head, group, merge(x, head, at.tokens, mean=True), 2 * at.frames)

    @staticmethod
    def of_picture(x: Tensor, at: Places) -> Still:
        """Tokens of one frame, each of which stands for itself."""
        return Still(torch.arange(at.tokens, device=x.device).expand_as(at.frame), at.frame, x, 1)

    @functools.cached_property
    def number(self) -> Tensor:
        """The group of each token, [U, N], and one more for those that another one stands for."""
        return self.group % (self.count + 1)

    def sizes(self) -> Tensor:
        """Tokens of each group, those that stand for several first, and how many are none of them: [U, groups + 1]."""
        return group_sizes(self.number, self.count + 1)

    def shares(self, k: int) -> Tensor:
        """`k` tokens over the groups by their sizes, [U, groups + 1] int64; the last are copies, kept where all others are."""
        sizes = self.sizes()[:, :-1]
        first = sizes.sum(1, keepdim=True).clamp_max(k)
        return torch.cat([worth_shares(sizes, sizes, first), k - first], 1)

    def copies(self, score: Callable[[], Tensor], count: Tensor) -> tuple[Tensor | None, Still]:
        """The `count` [U, 1] tokens of the largest score() [U, N] of those that another one stands for, [U, N] bool, None if it is
        known that there are none; and these groups without them."""
        if known_zero(count):
            return None, self
        chosen = largest(score(), count, self.group < 0)
        own = torch.arange(chosen.shape[1], device=chosen.device)
        return chosen, replace(self, head=torch.where(chosen, own, self.head))

    def packed(self, at: Places, group: Tensor | None = None) -> Packed:
        """The tokens of each group, or of each `group` [U, N] of these numbers, side by side."""
        return Packed(self.group if group is None else group, self.count, at.most)

    def gathered(self, packed: Packed, centres: Tensor, k: int, beta: float | None = None) -> tuple[Tensor, Tensor]:
        """Clusters around `centres` [U, N] bool, at most `k` in a row: the centre that each token of the video goes into, [U,
        N] int64, -1 for none, and its share there, [U, N] float32.

        Tokens go to the nearest centre of their group in `packed`; those that take no part there nowhere, centres among them stay
        as they are. A cluster is the mean of what stands for its tokens; with `beta` that part of the centre and the rest of the
        mean of the others."""
        tokens = packed.tokens
        into = nearest_of_group(self.means, packed, centres, k * len(centres))
        into = torch.where(centres, torch.arange(tokens, device=into.device), into)
        number = into + 1
        size = group_sizes(number, tokens + 1).gather(1, number).float()
        if beta is None:
            share = size.reciprocal()
        else:
            centre = torch.where(size > 1, beta, 1.0)
            share = torch.where(centres, centre, (1 - beta) / (size - 1).clamp_min(1))
        into, share = into.gather(1, self.head), share.gather(1, self.head)
        members = group_sizes(self.head, tokens).gather(1, self.head)
        return into, (share / members).masked_fill(into < 0, 0)
