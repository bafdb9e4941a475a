# SPDX-License-Identifier: Apache-2.0
"""Density peaks of few tokens on the CPU: the whole table in float64 and then NumPy, since the time of the calls counts, and one
of NumPy takes a third of one of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..match.blocked import COLUMNS, ROWS, round_up
from .blocked import SAME
from .naive import clearest

CELLS, PRODUCTS = 1 << 16, 1 << 23
"""Distances of one visual, and multiplications for them, up to which it has few tokens. Of one visual, so that a batch gives what
its members give alone."""
_NUMBERS = 1 << 20
"""Numbers of the tokens and of the tables that are looked at together."""
_INF, _MOST = np.float32("inf"), np.finfo(np.float32).max


def few(x: Tensor, y: Tensor) -> bool:
    """Whether the distances of x [G, n, C] and y [G, m, C] are so few."""
    cells = x.shape[1] * y.shape[1]
    return 0 < cells <= CELLS and cells * x.shape[2] <= PRODUCTS


def density_peaks(x: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    def some(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        spread, gap, _ = _peaks(x, k, mask)
        return spread, gap

    return _in_turn(some, x, mask)


def clusters(x: Tensor, count: int, k: int) -> tuple[Tensor, Tensor]:
    """As `kernels.density.clusters`."""

    def some(x: Tensor) -> tuple[Tensor, Tensor]:
        spread, gap, square = _peaks(x, k, None)
        centres = clearest(spread, gap, count)
        rows = square[np.arange(len(x))[:, None], centres.numpy()]
        return centres, torch.from_numpy(rows.argmin(1))  # the first of equals

    return _in_turn(some, x)


def nearest(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    def some(x: Tensor, y: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        square = squares(x, y if mask is None else y.masked_fill(~mask[..., None], 0))
        if mask is not None:
            square = np.where(mask.numpy()[:, None], square, _INF)
        index = square.argmin(2)  # the first of equals
        near = square.min(2)
        index[near == _INF] = -1
        return _root(near, x.shape[2]), torch.from_numpy(index)

    return _in_turn(some, x, y, mask)


def _in_turn(some: Callable[..., tuple[Tensor, Tensor]], x: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """`some` of [G, ...], as many of G at a time as are few."""
    given, rows = (x, *others), max(part.shape[1] for part in (x, *others) if part is not None)
    step = max(1, _NUMBERS // (rows * max(x.shape[2], rows)))
    if len(x) <= step:
        return some(*given)
    parts = [some(*(None if y is None else y[g : g + step] for y in given)) for g in range(0, len(x), step)]
    first, second = zip(*parts, strict=True)
    return torch.cat(first), torch.cat(second)


def squares(x: Tensor, y: Tensor | None = None) -> Any:
    """Squared distances of x [G, n, C] and y [G, m, C] (None: x itself), [G, n, m] float32, as `blocked.products`."""
    other = _numbers(x if y is None else y)
    middle = other.mean(1, keepdims=True, dtype=np.float64)  # any centre does
    right = _centred(other, middle, COLUMNS)
    left = right if y is None else _centred(_numbers(x), middle, ROWS)
    product = torch.bmm(torch.from_numpy(left), torch.from_numpy(right).transpose(1, 2)).numpy()
    if y is None:
        own = norms = product.diagonal(axis1=1, axis2=2) * (1 - SAME)
    else:
        own, norms = (np.einsum("gnc,gnc->gn", x, x) * (1 - SAME) for x in (left, right))
    product *= -2
    product += own[:, :, None]
    product += norms[:, None]
    np.maximum(product, 0, out=product)
    np.minimum(product, _MOST, out=product)
    return product[:, : x.shape[1], : other.shape[1]].astype(np.float32)


def _numbers(x: Tensor) -> Any:
    return (x if x.dtype == torch.float64 else x.float()).detach().numpy()


def _centred(x: Any, middle: Any, unit: int) -> Any:
    """What is left of x [G, n, C] without `middle`, filled up with zeros to a multiple of `unit`, float64."""
    found = np.empty((len(x), round_up(x.shape[1], unit), x.shape[2]))
    np.subtract(x, middle, out=found[:, : x.shape[1]], dtype=np.float64)
    found[:, x.shape[1] :] = 0
    return found


def _peaks(x: Tensor, k: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Any]:
    """Spread, gap, and the squared distances."""
    (groups, n, width), count = x.shape, min(k, x.shape[1])
    if mask is None:
        square = far = squares(x)
    else:
        known = mask.numpy()
        far, pairs = squares(x.masked_fill(~mask[..., None], 0)), known[:, None] & known[:, :, None]
        square, far = np.where(pairs, far, _INF), np.where(pairs, far, np.float32(0))
        count = np.clip(known.sum(1, keepdims=True), 1, k)
    close = square if k >= n else np.partition(square, k - 1)[..., :k]
    if mask is not None:
        close = np.where(close == _INF, np.float32(0), close)
    spread = (close.sum(2, dtype=np.float64) / (count * width)).astype(np.float32)
    if mask is not None:
        spread[~known] = np.inf
    order = spread.argsort(1, kind="stable")
    rank = order.argsort(1)
    gap = np.where(rank[:, None] < rank[:, :, None], square, _INF).min(2)
    gap[np.arange(groups), order[:, 0]] = far.max((1, 2))
    if mask is not None:
        gap[~known] = 0
    return torch.from_numpy(spread), _root(gap, width), square


def _root(square: Any, width: int) -> Tensor:
    return torch.from_numpy(np.sqrt(square / np.float64(width)).astype(np.float32))
