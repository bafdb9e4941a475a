# SPDX-License-Identifier: Apache-2.0
"""One gather after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def compact(tensors: Sequence[Tensor], index: Tensor, valid: Tensor | None) -> list[Tensor]:
    """Tensors [B or 1, S, ...] to [B, M, ...]."""
    found = []
    for x in tensors:
        shape = *index.shape, *[1] * (x.dim() - 2)
        at = index if valid is None else index.masked_fill(~valid, 0)
        rows = x.expand(len(index), *x.shape[1:])
        rows = rows.gather(1, at.view(shape).expand(*index.shape, *x.shape[2:]))
        found.append(rows if valid is None else rows.masked_fill(~valid.view(shape), 0))
    return found
