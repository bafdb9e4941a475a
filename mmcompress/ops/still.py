# SPDX-License-Identifier: Apache-2.0
"""Places of a video that stay the same over a window of frames: which windows, and one token for all that is seen there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.gather import gather
from ..kernels.merge import merge
from .groups import group_sizes
from .precision import wide
from .segments import Places, nearest_of_group
from .shares import worth_shares
from .ties import argmax_first, largest


def table_of(at: Places) -> Tensor:
    """The token at each place of each frame, [U, T * P] int64, -1 where there is none."""
    number = torch.arange(at.tokens, device=at.frame.device).expand_as(at.frame)
    table = torch.full((len(number), at.frames * at.most), -1, device=number.device)
    return table.scatter(1, at.frame * at.most + at.cell, number)


@torch.no_grad()
def unchanged(x: Tensor, at: Places, threshold: float) -> tuple[Tensor, Tensor]:
    """Cosine of each token x [U, N, C] with the one at the same place of the next frame, by place, [U, T - 1, P] float32 (0
    where one is missing), and whether it is above the threshold."""
    table = table_of(at).unflatten(1, (at.frames, at.most))
    here, there = (table[:, :-1].flatten(1), table[:, 1:].flatten(1))
    both = (here >= 0) & (there >= 0)
    rows = F.normalize(wide(x), dim=-1)
    cosine = (gather(rows, here.clamp_min(0)) * gather(rows, there.clamp_min(0))).sum(2)
    shape = (at.frames - 1, at.most)
    return cosine.masked_fill(~both, 0).unflatten(1, shape), ((cosine > threshold) & both).unflatten(1, shape)


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
           those that another one stands for. There are 2 T groups.
    means  [U, N, C]: means of all that each stands for (0 where it stands for none).
    """

    head: Tensor
    group: Tensor
    means: Tensor

    @staticmethod
    def of(x: Tensor, at: Places, window: Tensor, still: Tensor) -> Still:
        own = torch.arange(at.tokens, device=x.device).expand_as(at.frame)
        begin = window.gather(1, at.frame)
        head = torch.where(still, table_of(at).gather(1, begin * at.most + at.cell), own)
        group = torch.where(still, torch.where(head == own, begin, -1), at.frames + at.frame)
        return Still(head, group, merge(x, head, at.tokens, mean=True))

    def sizes(self, frames: int) -> Tensor:
        """Tokens of each group, those that stand for several first, and how many are none of them: [U, 2 T + 1]."""
        return group_sizes(torch.where(self.group < 0, 2 * frames, self.group), 2 * frames + 1)

    def shares(self, frames: int, k: int) -> Tensor:
        """`k` tokens over the groups by their sizes, [U, 2 T + 1] int64; the last are copies, kept where all others are."""
        sizes = self.sizes(frames)
        first = sizes[:, :-1].sum(1, keepdim=True).clamp_max(k)
        return torch.cat([worth_shares(sizes[:, :-1], sizes[:, :-1], first), k - first], 1)

    def copies(self, score: Tensor, count: Tensor) -> tuple[Tensor, Still]:
        """The `count` [U, 1] tokens of the largest `score` [U, N] of those that another one stands for, [U, N] bool; and these
        groups without them."""
        chosen = largest(score, count, self.group < 0)
        own = torch.arange(score.shape[1], device=score.device)
        return chosen, replace(self, head=torch.where(chosen, own, self.head))

    def gathered(
        self, at: Places, group: Tensor, centres: Tensor, k: int, beta: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """Clusters around `centres` [U, N] bool, at most `k` in a row: the centre that each token of the video goes into, [U,
        N] int64, -1 for none, and its share there, [U, N] float32.

        Tokens of `group` [U, N] go to the nearest centre of their group; those of group -1 nowhere, centres among them stay as
        they are. A cluster is the mean of what stands for its tokens; with `beta` that part of the centre and the rest of the
        mean of the others."""
        total = k * len(group)
        into = nearest_of_group(self.means, group, 2 * at.frames, at.most, centres & (group >= 0), total)
        own = torch.arange(at.tokens, device=into.device)
        into = torch.where(centres, own, into)
        others = group_sizes(torch.where(centres | (into < 0), at.tokens, into), at.tokens + 1)[:, :-1]
        others = others.gather(1, into.clamp_min(0)).float()
        if beta is None:
            share = 1 / (others + 1)
        else:
            share = torch.where(centres, torch.where(others > 0, beta, 1.0), (1 - beta) / others.clamp_min(1))
        members = group_sizes(self.head, at.tokens).gather(1, self.head)
        into = into.gather(1, self.head)
        return into, torch.where(into < 0, 0, share.gather(1, self.head) / members)
