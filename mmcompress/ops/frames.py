# SPDX-License-Identifier: Apache-2.0
"""Tokens of videos by frame: what has changed from one to the next, and one budget spent on all of them, exactly."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.gather import gather
from .known import known_zero
from .precision import wide
from .shares import worth_shares

ELEMENTS = 1 << 23
"""How many numbers are compared at a time."""


@dataclass(frozen=True)
class Frames:
    """The tokens of U visuals of T frames with P places each; a picture is one frame.

    x      [U, T, P, C]; 0 at places whose token an earlier stage has dropped.
    there  [U, T, P] bool: at which places there is a token; None: at all of them.
    token  [U, T * P] int64: number of the token at each place (0 where there is none); None: the place itself.
    """

    x: Tensor
    there: Tensor | None = None
    token: Tensor | None = None

    @staticmethod
    def of(features: Tensor, frames: int, places: int, slots: Tensor | None = None) -> Frames:
        """The tokens `features` [U, N, C] of `frames` frames of `places` places; slots [U, N]: the place of each among all of
        them, None where all are there in order. Places of tokens that are gone cost memory, but no arithmetic of their own."""
        if slots is None:
            return Frames(features.unflatten(1, (frames, places)))
        cells = frames * places
        number = torch.arange(features.shape[1], device=slots.device).expand_as(slots)
        token = torch.zeros(len(slots), cells, dtype=torch.int64, device=slots.device).scatter(1, slots, number)
        there = torch.zeros_like(token, dtype=torch.bool).scatter(1, slots, torch.ones_like(slots, dtype=torch.bool))
        index = slots[..., None].expand_as(features)
        x = features.new_zeros(len(slots), cells, features.shape[2]).scatter(1, index, features)
        return Frames(x.unflatten(1, (frames, places)), there.unflatten(1, (frames, places)), token)

    @property
    def shape(self) -> tuple[int, int, int]:
        """U, T, P."""
        visuals, frames, places = self.x.shape[:3]
        return visuals, frames, places

    @functools.cached_property
    def full(self) -> Tensor:
        """At which places there is a token, [U, T, P] bool."""
        return torch.ones(self.shape, dtype=torch.bool, device=self.x.device) if self.there is None else self.there

    @functools.cached_property
    def room(self) -> Tensor:
        """How many tokens each frame has, [U, T] int64."""
        return self.full.sum(2)

    def lay(self, values: Tensor) -> Tensor:
        """Values of the tokens [U, N, ...] at their places, [U, T, P, ...]; those of token 0 where there is none."""
        if self.token is not None:
            values = gather(values, self.token)
        return values.unflatten(1, self.shape[1:])

    def mean(self) -> Tensor:
        """Mean of the tokens of each frame, [U, T, C], in full precision; 0 for a frame without."""
        x = wide(self.x)
        return x.mean(2) if self.there is None else x.sum(2) / self.room.clamp_min(1)[..., None]

    def best(self, scores: Tensor, k: int) -> Tensor:
        """The tokens [U, k] with the largest `scores` [U, T, P] of the whole video, ties to the earlier place."""
        scores = scores if self.there is None else scores.masked_fill(~self.there, float("-inf"))
        order = scores.flatten(1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        return self.tokens(order.sort(dim=1).values)

    def best_of_each(self, scores: Tensor, counts: Tensor) -> Tensor:
        """Mask [U, T, P] of the `counts` [U, T] largest `scores` [U, T, P] of each frame; ties to the earlier place."""
        scores = scores if self.there is None else scores.masked_fill(~self.there, float("-inf"))
        order = scores.sort(dim=2, descending=True, stable=True).indices
        first = torch.arange(scores.shape[2], device=scores.device) < counts[..., None]
        best = torch.zeros_like(first).scatter(2, order, first)
        return best if self.there is None else best & self.there

    def chosen(self, mask: Tensor, k: int) -> Tensor:
        """The tokens [U, k] at the k places of `mask` [U, T, P] in each row, in order of places."""
        places = mask.flatten(1).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :k]
        return self.tokens(places)

    def tokens(self, places: Tensor) -> Tensor:
        """Numbers of the tokens at `places` [U, k] of the video."""
        return places if self.token is None else self.token.gather(1, places)


def similarity_before(frames: Frames, step: int = 1, eps: float = 1e-8) -> tuple[Tensor, Tensor]:
    """Cosine of each token with that at the same place `step` frames before, [U, T, P]; and where there are both, [U, T, P]
    bool, False in the first frames. 0 there. Cost N C; norms are not less than `eps`."""
    x = frames.x.detach()
    cosine = torch.zeros(frames.shape, dtype=wide(x[:, :0]).dtype, device=x.device)
    both = torch.zeros_like(frames.full)
    block = max(1, ELEMENTS // max(1, x[:, 0].numel()))  # frames at a time: no copy of a video in full precision
    for first in range(step, x.shape[1], block):
        last = min(first + block, x.shape[1])
        now, before = wide(x[:, first:last]), wide(x[:, first - step : last - step])
        length = now.square().sum(3).sqrt().clamp_min(eps) * before.square().sum(3).sqrt().clamp_min(eps)
        cosine[:, first:last] = (now * before).sum(3) / length
        both[:, first:last] = frames.full[:, first:last] & frames.full[:, first - step : last - step]
    return cosine.masked_fill(~both, 0), both


def motion(frames: Frames) -> Tensor:
    """How much each frame differs from the one before, [U, T]: mean over its places of 1 - cosine, in [0, 2]; the first frame is
    as far from nothing as can be in the mean of the others (1 where it is alone)."""
    cosine, both = similarity_before(frames)
    count = both.sum(2)
    found = ((1 - cosine) * both).sum(2) / count.clamp_min(1)
    known = count > 0
    mean = (found * known).sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp_min(1)
    mean = torch.where(known.any(1, keepdim=True), mean, torch.ones_like(mean))
    return torch.where(known, found, mean)


def spend(worth: Tensor, room: Tensor, k: int, least: int = 1) -> Tensor:
    """`k` tokens over the frames of videos in proportion to their worth, [U, T] int64 that sums to exactly `k` in every row.

    worth [U, T], not negative; room [U, T]: how many tokens a frame has; each frame gets `least` of them first (or all that it
    has), as long as `k` is enough for that: callers see to it. Rounded by `largest_remainder`."""
    base = room.clamp_max(least)
    left = k - base.sum(1, keepdim=True)
    worth = wide(worth)
    total = worth.sum(1, keepdim=True)
    part = torch.where(total > 0, worth / total.clamp_min(1e-30), torch.full_like(worth, 1 / worth.shape[1]))
    return base + largest_remainder(part * left, room - base, left)


def largest_remainder(wanted: Tensor, room: Tensor, k: Tensor | int) -> Tensor:
    """`wanted` [U, T] tokens of each frame, which sum to about `k`, as whole numbers that sum to exactly that: [U, T] int64.

    Rounded down and not more than `room` [U, T]; then one each by falling remainder, ties to the earlier frame; what is left when
    all have had one, since some are full, goes to the others by what they wanted."""
    if wanted.shape[1] == 1:
        return torch.zeros_like(room) + k
    whole = torch.minimum(wanted.floor().long().clamp_min(0), room)
    full = whole >= room
    order = (wanted - whole).masked_fill(full, -1).sort(dim=1, descending=True, stable=True).indices
    whole = whole + (order.argsort(1) < k - whole.sum(1, keepdim=True)).masked_fill(full, False)
    left = k - whole.sum(1, keepdim=True)
    if known_zero(left):
        return whole
    return whole + worth_shares(wanted.clamp_min(0), room - whole, left.clamp_min(0))


def evenly(mask: Tensor, k: Tensor | int) -> Tensor:
    """Of the True entries of each row of `mask` [U, n], `k` at even distances; all of them where there are not more."""
    count = mask.sum(1, keepdim=True)
    rank = mask.long().cumsum(1) - 1
    total = count.clamp_min(1)
    return mask & ((count <= k) | (((rank + 1) * k) // total > (rank * k) // total))
