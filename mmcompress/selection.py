# SPDX-License-Identifier: Apache-2.0
"""Selection: which tokens stay, what they stand for, and how anything else follows them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.gather import gather as gather
from .kernels.merge import merge


@dataclass(frozen=True)
class Selection:
    """What a stage decided for U visuals of N tokens each.

    keep    [U, k] int64: the slot that each output token stands for, in output order, no slot twice.
    assign  [U, N] int64, optional: the output token that each slot went into, -1 for slots that are gone.
    weight  [U, N], optional: the share of each slot in its output token; output j is the sum of weight * token over its
            slots. Without weights an output token is the token of its slot in `keep`.
    rows    [U, k, D], optional: the output tokens themselves, where they are not a weighted sum of the input tokens.
    scores  [U, N], optional: what the choice was made by, for pictures.
    """

    keep: Tensor
    assign: Tensor | None = None
    weight: Tensor | None = None
    rows: Tensor | None = None
    scores: Tensor | None = None

    @staticmethod
    def of(keep: Tensor, scores: Tensor | None = None) -> Selection:
        """Keep the slots `keep` [U, k], given in any order, in ascending order."""
        return Selection(keep.sort(dim=1).values, scores=scores)

    @staticmethod
    def top(scores: Tensor, k: int) -> Selection:
        """Keep the `k` best of `scores` [U, N]; ties go to the lower slot; output in ascending order."""
        scores = scores.float()
        best = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
        return Selection.of(best, scores)

    @staticmethod
    def of_clusters(clusters: Tensor, k: int) -> Selection:
        """One output token per cluster: `clusters` [U, N] holds the cluster of every slot, any integer.

        A cluster stands at its median member (the lower of two); output in ascending order. If there are more than `k`
        clusters, the smallest ones are dropped; if there are fewer, more members of the largest ones are kept.
        """
        rows, tokens = clusters.shape
        place = torch.arange(tokens, device=clusters.device).expand(rows, -1)
        ordered, slots = clusters.sort(dim=1, stable=True)
        begins = F.pad(ordered[:, 1:] != ordered[:, :-1], (1, 0))
        number = begins.cumsum(1)  # clusters counted from 0, in the order of `slots`
        size = torch.zeros_like(number).scatter_add(1, number, torch.ones_like(number))
        first = size.cumsum(1) - size
        rank = place - first.gather(1, number)
        mine = size.gather(1, number)
        median = rank == (mine - 1) // 2
        # medians first, then by size; slots in order where both are equal
        worth = torch.zeros_like(number).scatter(1, slots, median * (tokens + 1) + mine)
        keep = worth.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
        number = torch.zeros_like(number).scatter(1, slots, number)
        stands = torch.zeros_like(number).scatter(1, slots, median.long())
        # which output speaks for each cluster: its median's, else the last of its members'; 0 for none
        code = place[:, :k] + 1 + gather(stands, keep) * (k + 1)
        speaks = torch.zeros_like(number).scatter_reduce(1, gather(number, keep), code, "amax")
        output = speaks % (k + 1) - 1
        assign = output.gather(1, number).scatter(1, keep, place[:, :k])
        return Selection(keep, assign)

    @staticmethod
    def into(kept: Tensor, k: int, into: Tensor, weight: Tensor, scores: Tensor | None = None) -> Selection:
        """Keep the `k` slots of the mask `kept` [U, N]; `into` [U, N] int64 is the kept slot that each slot goes into, -1 for none,
        with `weight` [U, N]."""
        keep = kept.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :k]
        place = torch.arange(k, device=keep.device).expand_as(keep)
        number = torch.full_like(into, -1).scatter(1, keep, place)
        return Selection(keep, torch.where(into < 0, -1, number.gather(1, into.clamp_min(0))), weight, scores=scores)

    @property
    def k(self) -> int:
        return self.keep.shape[1]

    @property
    def merges(self) -> bool:
        """Whether output tokens are other than those of the slots in `keep`."""
        return self.rows is not None or self.weight is not None

    def apply(self, x: Tensor) -> Tensor:
        """The companion tensor `x` [U, N, ...] of the output tokens: [U, k, ...], gathered or merged (sums in float32)."""
        if self.weight is None or self.assign is None or not x.is_floating_point():
            return gather(x, self.keep)
        return merge(x, self.assign.to(x.device), self.k, self.weight.to(x.device))

    def sizes(self, sizes: Tensor) -> Tensor:
        """How many tokens each output token stands for, [U, k] float32, where those of the slots are `sizes` [U, N]."""
        if self.assign is None:
            return gather(sizes.float(), self.keep)
        total = sizes.new_zeros(len(sizes), self.k + 1, dtype=torch.float32)
        return total.scatter_add(1, self.assign.remainder(self.k + 1), sizes.float())[
            :, : self.k
        ]  # without what is gone

    def then(self, later: Selection, tokens: int) -> Selection:
        """This selection of `tokens` slots followed by `later`, which chose among the output tokens of this one.

        The result says where every original slot went. It carries no `rows` or `weight`: output tokens are made stage by
        stage with `apply`, which is exact; a product of two weight tables is not where tokens were replaced by `rows`.
        """
        keep = gather(self.keep, later.keep)
        if self.assign is None and later.assign is None:
            return Selection(keep)
        first, second = self.assignment(tokens), later.assignment(self.k)
        return Selection(keep, torch.where(first < 0, -1, second.gather(1, first.clamp_min(0))))

    def scatter(self, values: Tensor, tokens: int) -> Tensor:
        """`values` [U, k], one per output token, back on all slots [U, tokens]; NaN where a slot is gone.

        Merged slots all show the value of their output token.
        """
        assign = self.assignment(tokens)
        spread = values.float().gather(1, assign.clamp_min(0).to(values.device))
        return spread.masked_fill((assign < 0).to(values.device), float("nan"))

    def assignment(self, tokens: int) -> Tensor:
        """`assign` [U, tokens] in every case: without merging each kept slot went into its own output token."""
        if self.assign is not None:
            return self.assign
        order = torch.arange(self.k, device=self.keep.device).expand_as(self.keep)
        gone = torch.full((self.keep.shape[0], tokens), -1, dtype=torch.int64, device=self.keep.device)
        return gone.scatter(1, self.keep, order)

    def cpu(self) -> Selection:
        """The same selection on the CPU, without `rows`."""
        move = {
            n: t.detach().cpu() for n in ("keep", "assign", "weight", "scores") if (t := getattr(self, n)) is not None
        }
        return replace(self, rows=None, **move)
