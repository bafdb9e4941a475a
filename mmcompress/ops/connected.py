# SPDX-License-Identifier: Apache-2.0
"""Tokens of a video that hang together by similarity, in each frame and then over all of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.components import components
from ..kernels.merge import merge
from .precision import wide
from .segments import Places


@torch.no_grad()
def keys_of(label: Tensor, degree: Tensor) -> Tensor:
    """The key token of the component of each one, [n] int64: that of the highest degree, the lowest of equals."""
    n = len(label)
    code = torch.add(torch.arange(n - 1, -1, -1, device=label.device), degree, alpha=n)
    return n - 1 - torch.zeros_like(label).scatter_reduce(0, label, code, "amax")[label] % max(1, n)


@dataclass(frozen=True)
class Connected:
    """Components of the N tokens of one video, first inside each frame, then of their means over all frames.

    spatial   [N] int64: the key token of the component of each token in its frame.
    temporal  [N] int64: the key token, among all frames, of what that is in.
    keys      [K] int64, ascending: the key tokens of the second step.
    means     [M, C]: means of the components of the first step, in the order of their keys; firsts [M]: these.
    place     [N] int64: which of them each token is in. into [M] int64: which of the second step each of them is in.
    """

    spatial: Tensor
    temporal: Tensor
    keys: Tensor
    means: Tensor
    firsts: Tensor
    place: Tensor
    into: Tensor

    @staticmethod
    def of(x: Tensor, at: Places, tau: float) -> Connected:
        """Of tokens x [1, N, C]: two are connected if their cosine is above `tau`. Reads how many components there are. Cost
        n^2 C / 2 for frames of n, and M^2 C / 2, in blocks."""
        packed = at.packed()
        found = components(packed.rows(x), tau, cu_seqlens=packed.ends, max_seqlen=packed.most)
        spatial = packed.unpacked(packed.slots(keys_of(*found)))[0]
        firsts, place = distinct(spatial)
        means = merge(wide(x), place[None], len(firsts), mean=True)
        key = keys_of(*(part[0] for part in components(means, tau)))
        second, into = distinct(key)
        return Connected(spatial, firsts[key[place]], firsts[second], means[0], firsts, place, into)

    def representatives(self, x: Tensor) -> Tensor:
        """Means, of the tokens x [N, C], of the components of the second step, each the mean of those of the first: [K, C]."""
        means = self.means[None]
        if torch.is_grad_enabled() and x.requires_grad:
            means = merge(wide(x)[None], self.place[None], len(self.firsts), mean=True)
        return merge(means, self.into[None], len(self.keys), mean=True)[0]


def distinct(values: Tensor) -> tuple[Tensor, Tensor]:
    """The different ones of `values` [n], ascending, and which of them each is. Their number is read."""
    if values.device.type == "cpu":
        found, inverse = np.unique(values.numpy(), return_inverse=True)
        return torch.from_numpy(found), torch.from_numpy(inverse)
    there = torch.zeros(len(values), dtype=torch.int64, device=values.device).scatter(0, values, 1)
    place = there.cumsum(0) - 1
    count = place[-1:].tolist()[0] + 1
    return there.sort(descending=True, stable=True).indices[:count], place[values]
