# SPDX-License-Identifier: Apache-2.0
"""What may match what, and what is asked of a match."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEAST = 1e-12
"""No norm is taken for less."""


@dataclass(frozen=True)
class Rule:
    """The options of `match`, as they hold inside one segment, where rows of both sides count from 0."""

    m: int = 1
    largest: bool = True
    normalize: bool = True
    frame: int = 1
    low: int | None = None
    high: int | None = None
    same_cell: bool = False
    exclude_self: bool = False

    def first(self, row: int) -> int:
        """The first column that a row may match."""
        return 0 if self.low is None else max(0, (row // self.frame + self.low) * self.frame)

    def last(self, row: int, columns: int) -> int:
        """One past the last column, of `columns`, that a row may match."""
        return columns if self.high is None else max(0, min(columns, (row // self.frame + self.high + 1) * self.frame))

    def allowed(self, row: Any, column: Any) -> Any:
        """Which pairs may match; `row` and `column`, both tensors or both arrays, are broadcast."""
        step = column // self.frame - row // self.frame
        allowed = step == step
        if self.low is not None:
            allowed &= step >= self.low
        if self.high is not None:
            allowed &= step <= self.high
        if self.same_cell:
            allowed &= column % self.frame == row % self.frame
        if self.exclude_self:
            allowed &= column != row
        return allowed

    def steps(self, rows: int, columns: int) -> range:
        """By how many frames a row and its match can be apart."""
        low, high = -((rows - 1) // self.frame), (columns - 1) // self.frame
        return range(
            low if self.low is None else max(low, self.low), min(high, high if self.high is None else self.high) + 1
        )

    def blocks(self, rows: int, size: int) -> Iterator[tuple[int, int]]:
        """Rows in blocks of at most `size`; in bands of large frames no block lies in two frames."""
        whole = self.frame if (self.low is not None or self.high is not None) and self.frame >= size // 4 else rows
        for frame in range(0, rows, max(1, whole)):
            end = min(rows, frame + whole)
            for first in range(frame, end, size):
                yield first, min(end, first + size)


def norms(x: Tensor) -> Tensor:
    """|row| of `x` [..., D], float32. Half precision is read in blocks."""
    if x.dtype == torch.float32:
        return torch.linalg.vector_norm(x, dim=-1)
    step = max(1, (1 << 20) // max(1, x[..., :1, :].numel()))
    parts = [torch.linalg.vector_norm(part.float(), dim=-1) for part in x.split(step, dim=-2)]
    return torch.cat(parts, -1) if parts else x.new_zeros(x.shape[:-1], dtype=torch.float32)


def inverse_norms(x: Tensor) -> Tensor:
    """1 / |row| of `x` [..., D], float32, at most 1e12; 0 where the norm is beyond float32: such rows count as zero vectors.

    A zero vector has the cosine 0 to everything, as in `torch.nn.functional.normalize`.
    """
    return norms(x).clamp_min_(LEAST).reciprocal_()


def without_huge(x: Tensor, inverse: Tensor) -> Tensor:
    """`x` with zeros in the rows whose norm is beyond float32, whose products could be NaN."""
    if x.device.type == "cpu" and inverse.numpy().all():
        return x
    return x.masked_fill((inverse == 0)[..., None], 0.0)
