# SPDX-License-Identifier: Apache-2.0
"""A visual that a model was shown."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..visuals import Layout
from .panes import Pane, panes, picture_number


@dataclass(frozen=True, eq=False)
class Seen:
    """One visual that the model was shown.

    layout   how its cells lie; panes: as grids to look at, tiles laid together.
    valid    [N] bool: cells that a token stands for where the explanation reads.
    kept     [N] bool: cells whose own token is there; the other valid ones live on in a merged token.
    pictures the picture, or the frames of the video; empty where inputs were given ready-made.
    times    when each of them is shown, in seconds from the start of the video; empty where nothing says so.
    frame    of a video that the model takes for a row of pictures: which one this is.
    """

    modality: str
    layout: Layout
    valid: Tensor
    kept: Tensor
    pictures: tuple[Any, ...] = ()
    times: tuple[float, ...] = ()
    frame: int | None = None

    @functools.cached_property
    def panes(self) -> tuple[Pane, ...]:
        return panes(self.layout)

    @property
    def coverage(self) -> float:
        """Part of the cells that something is known about."""
        return self.valid.float().mean().item()

    def seconds(self, pane: Pane) -> float | None:
        """When the picture of a pane is shown; None if nothing says so."""
        return self.times[picture_number(self.panes, pane, len(self.times))] if self.times else None
