# SPDX-License-Identifier: Apache-2.0
"""Whole rows are copied, of all samples at once: several times as fast as a gather of elements."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..gather import gather


def compact(tensors: Sequence[Tensor], index: Tensor, valid: Tensor | None) -> list[Tensor]:
    """Tensors [B or 1, S, ...] to [B, M, ...]."""
    if valid is None:
        return [gather(x, index) for x in tensors]
    index, gone = index.masked_fill(~valid, 0), ~valid
    return [gather(x, index).masked_fill_(gone.view(*gone.shape, *[1] * (x.dim() - 2)), 0) for x in tensors]
