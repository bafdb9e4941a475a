# SPDX-License-Identifier: Apache-2.0
"""Clusters around the tokens that lie densest and far from anything denser."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import density


@torch.no_grad()
def density_peaks(x: Tensor, count: int, neighbours: int | None = None) -> tuple[Tensor, Tensor]:
    """`count` clusters of the tokens `x` [U, n, C] around density peaks: the tokens that are their centres, [U, count] int64,
    the clearest peak first, and the cluster of each token, [U, n] int64.

    Distances are Euclidean over sqrt(C). The density of a token is exp(-mean of its `neighbours` smallest squared distances),
    its own 0 included (`count` of them if not given); its gap is the distance to the nearest denser token, for the densest one
    the largest distance there is. Centres are the tokens with the largest products of both; every other token joins its nearest
    centre. Of equally dense tokens the lower one counts as denser, so that copies of a token make one peak. Ties of the product
    go to the lower index, ties of distances to the clearer peak. Products are compared by their logarithm: densities of tokens
    that lie far apart would all be 0. Cost n^2 C, memory n.
    """
    return density.clusters(x, count, neighbours or count)
