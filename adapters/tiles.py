# SPDX-License-Identifier: Apache-2.0
"""Which views are the tiles of one picture, and how they lie: found by where they stand and by what they show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.adapter import Encoded, Run
from ..runtime.packing import Array
from ..visuals import Layout, View
from .layouts import tiled

NEAR = 8
"""Tokens between two tiles of a picture at most: marks of places, ends of rows."""
ALIKE = 0.25
"""Mean squared difference of tiles laid together and the view of the whole, in parts of its variance, up to which they are one."""
THUMB = 8
"""Side of the small pictures that are compared."""


class Picture(NamedTuple):
    """views: how many views it has. rows, columns of its tiles. first: whether the view of the whole comes before them."""

    views: int = 1
    rows: int = 1
    columns: int = 1
    first: bool = False


def small(arguments: dict[str, Any], views: int) -> Tensor | None:
    """Small pictures [n, 3, p, p] of the views that were encoded, padding left out; None if there is just one."""
    pixels = arguments["pixel_values"].detach()
    if pixels.dim() == 5:  # of each sample; padding is given by name, or is 0
        mask = arguments.get("pixel_attention_mask")
        pixels = pixels.flatten(0, 1)
        real = mask.flatten() if mask is not None and mask.dim() == 2 else pixels.flatten(1).any(1)
        pixels = pixels[real.to(pixels.device).bool()]
    if views < 2 or len(pixels) != views:
        return None
    return F.adaptive_avg_pool2d(pixels.float(), THUMB)


def pictures(views: Tensor, runs: list[Run], tokens: Sequence[int]) -> list[Picture]:
    """The pictures that small views [n, 3, p, p] make, which stand in `runs` with `tokens` of each. Waits for the device."""
    shown, near = views.cpu().numpy(), _near(runs, tokens)
    found: list[Picture] = []
    start = 0
    while start < len(shown):
        end = start + 1
        while end < len(near) and near[end]:
            end += 1
        found.append(_first_picture(shown[start:end]))
        start += found[-1].views
    return found


def _near(runs: list[Run], tokens: Sequence[int]) -> list[bool]:
    """Whether each view stands close behind the one before it. None does where a run is no whole number of views."""
    near: list[bool] = []
    before: Run | None = None
    for run in runs:
        near.append(before is not None and before.row == run.row and run.start - before.start - before.length <= NEAR)
        left = run.length - tokens[len(near) - 1]
        while left > 0 and len(near) < len(tokens):
            left -= tokens[len(near)]
            near.append(True)
        if left:
            return []
        before = run
    return near


def _first_picture(views: Array) -> Picture:
    """The picture that begins with the first of some views, each close to the next."""
    best, least = Picture(), ALIKE
    for count in range(3, len(views) + 1):
        for first in (False, True):
            whole, tiles = (views[0], views[1:count]) if first else (views[count - 1], views[: count - 1])
            rows, columns, difference = arrangement(tiles, whole)
            spread = float(whole.reshape(len(whole), -1).var(1, ddof=1).mean())
            if spread and difference / spread < least:
                best, least = Picture(count, rows, columns, first), difference / spread
    return best


def arrangement(tiles: Array, whole: Array) -> tuple[int, int, float]:
    """Rows and columns of tiles [n, 3, p, p] that laid together look most like `whole` [3, p, p], and the mean squared error."""
    count, side = len(tiles), whole.shape[-1]
    found = (1, count, math.inf)
    for rows in (r for r in range(1, count + 1) if count % r == 0):
        columns = count // rows
        laid = tiles.reshape(rows, columns, -1, side, side).transpose(2, 0, 3, 1, 4)
        pooled = laid.reshape(-1, side, rows, side, columns).mean((2, 4))
        difference = float(np.square(pooled - whole).mean())
        if difference < found[2]:
            found = (rows, columns, difference)
    return found


def join(encoded: Encoded, found: Sequence[Picture]) -> None:
    """Make the views of an encoder call the visuals `found`."""
    counts, views = [picture.views for picture in found], iter([layout.views[0] for layout in encoded.layouts])
    encoded.layouts = [_laid([next(views) for _ in range(picture.views)], picture) for picture in found]
    for name, values in encoded.signals.items():
        encoded.signals[name] = _together(values, counts)
    if encoded.clusters is not None:
        encoded.clusters = _together(encoded.clusters, counts)
        rest = iter(encoded.left)
        encoded.left = [sum(next(rest) for _ in range(count)) for count in counts]
    encoded.pixels = None


def _laid(views: list[View], picture: Picture) -> Layout:
    """The layout of a picture whose views have these grids."""
    if picture.views == 1:
        return Layout((views[0],))
    places = tiled(picture.rows, picture.columns, 1, picture.first).views
    return Layout(tuple(replace(place, grid=view.grid) for place, view in zip(places, views, strict=True)))


def _together(parts: list[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """Neighbouring parts joined, `counts` of them each time."""
    rest = iter(parts)
    return [torch.cat([next(rest) for _ in range(count)]) for count in counts]
