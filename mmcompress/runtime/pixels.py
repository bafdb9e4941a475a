# SPDX-License-Identifier: Apache-2.0
"""Smaller pictures for the vision encoder behind a full-length facade.

The encoder gets every picture (tile, frame) in a lower resolution; its output is spread over the grid of the picture as it
was, so that projector, packing and placeholder counts see all tokens. Tokens of one origin are a cluster, of which one enters
the LLM.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..stage import PixelStage
from ..visuals import Layout
from .adapter import Adapter, Encoded
from .encoder import TowerScope
from .packing import sent


@dataclass
class _Run:
    """One call of the encoder.

    units         for every row (segment) of the encoder: the coarse unit that each of its units has come from.
    counts        how many coarse units each row of a packed tower has.
    full, coarse  rows and columns of patches of a picture as it was, and smaller (where all pictures are alike).
    """

    units: list[Tensor] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    full: tuple[int, int] = (0, 0)
    coarse: tuple[int, int] = (0, 0)


class PixelFacade(TowerScope):
    """Runs one PixelStage in front of a vision encoder; `owner` is the engine."""

    merged = None

    def __init__(self, owner: Any, adapter: Adapter, stage: PixelStage) -> None:
        super().__init__(owner)
        self.adapter, self.stage = adapter, stage
        self.side = math.isqrt(adapter.unit)

    def install(self) -> Iterator[RemovableHandle]:
        tower = self.adapter.tower
        yield tower.register_forward_pre_hook(self._shrink, with_kwargs=True)
        yield tower.register_forward_hook(self._spread_output)
        yield tower.register_forward_hook(self.end, always_call=True)

    # ------------------------------------------------------------------ what the runtime asks
    def spread(self, block: int) -> Tensor | None:
        return None

    def clusters(self, encoded: Encoded, arguments: dict[str, Any]) -> list[Tensor]:
        """Which tokens of each visual have come from the same one, [N] each."""
        if self.adapter.packed:
            frames = iter(self._running().units)
            return [
                torch.cat([next(frames) + i * layout.cells for i in range(len(layout.views))])
                for layout in encoded.layouts
            ]
        units = torch.stack(self._running().units)
        numbers = units + torch.arange(len(units), device=units.device)[:, None] * units.shape[1]
        return [row[:, 0] for row in self.adapter.arrange(encoded, arguments, numbers[..., None], nearest=True)]

    def left(self, layouts: list[Layout]) -> list[int]:
        """How many of the tokens of each visual enter the LLM."""
        return [self.stage.budget(layout.cells) for layout in layouts]

    def _running(self) -> _Run:
        run = self.run()
        if run is None:
            raise RuntimeError(
                f"{self.stage!r}: the vision encoder ran past its hooks, so its pictures were not made smaller: call "
                f"mmcompress.compress(model, plan) again"
            )
        return run

    # ------------------------------------------------------------------ hooks
    def _grids(self, rows: int, columns: int) -> tuple[tuple[int, int], Tensor]:
        """From the patches of a picture: the patches of its smaller version, and the coarse unit of each unit."""
        side = self.side
        units = (rows // side, columns // side)
        coarse = units if self.rests else self.stage.grid(*units)
        y, x = ((torch.arange(n) + 0.5).mul(c / n).long() for n, c in zip(units, coarse, strict=True))
        return (coarse[0] * side, coarse[1] * side), (y[:, None] * coarse[1] + x).flatten()

    def _shrink(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        names, run = list(inspect.signature(module.forward).parameters), _Run()
        self.begin(run)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        pixels = kwargs.pop(names[0])
        if self.adapter.packed:
            pixels, kwargs["grid_thw"] = self._shrink_packed(run, pixels, kwargs["grid_thw"])
            return (pixels,), kwargs
        patch = self.adapter.tower.config.patch_size
        patch = patch if isinstance(patch, int) else patch[0]
        run.full = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        run.coarse, units = self._grids(*run.full)
        run.units = [units] * len(pixels)
        if run.coarse == run.full:
            return (pixels,), kwargs
        if "interpolate_pos_encoding" in names:
            kwargs["interpolate_pos_encoding"] = True
        return (_resized(pixels, run.coarse[0] * patch, run.coarse[1] * patch),), kwargs

    def _shrink_packed(self, run: _Run, patches: Tensor, grids: Tensor) -> tuple[Tensor, Tensor]:
        """The patches [P, C * t * p * p] of packed pictures and their grids, both of the smaller pictures."""
        config, side = self.adapter.tower.config, self.side
        p, depth = config.patch_size, config.temporal_patch_size
        made, sizes = [], []
        first = 0
        for frames, rows, columns in grids.tolist():
            (few_rows, few_columns), units = self._grids(rows, columns)
            part = patches[first : first + frames * rows * columns]
            first += len(part)
            sizes.append([frames, few_rows, few_columns])
            run.units += [units] * frames
            run.counts += [few_rows * few_columns // side**2] * frames
            if (few_rows, few_columns) == (rows, columns):
                made.append(part)
                continue
            part = part.view(frames, rows // side, columns // side, side, side, -1, depth, p, p)
            picture = part.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(frames * depth, -1, rows * p, columns * p)
            small = _resized(picture, few_rows * p, few_columns * p)
            small = small.view(frames, depth, -1, few_rows // side, side, p, few_columns // side, side, p)
            made.append(small.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(frames * few_rows * few_columns, -1))
        return torch.cat(made), torch.tensor(sizes, dtype=grids.dtype).to(grids.device, non_blocking=True)

    def _spread_output(self, module: Any, args: tuple, output: Any) -> Any:
        run = self._running()
        if self.adapter.packed:
            rows = sent(_packed_rows(run), output.pooler_output.device)
            output.pooler_output = output.pooler_output[rows]
            if getattr(output, "deepstack_features", None):
                output.deepstack_features = [level[rows] for level in output.deepstack_features]
            return output
        if run.coarse == run.full:
            return output
        prefix, device = self.adapter.prefix, output.last_hidden_state.device
        patches = sent(self._patches(run), device) + prefix
        index = torch.cat([torch.arange(prefix, device=device), patches])
        output.last_hidden_state = output.last_hidden_state[:, index]
        if output.hidden_states is not None:
            # transformers fills in only the states that the model reads
            output.hidden_states = tuple(state if state is None else state[:, index] for state in output.hidden_states)
        return output

    def _patches(self, run: _Run) -> Tensor:
        """The coarse patch that each patch of a picture shows: the same corner of the coarse unit."""
        (rows, columns), (_, few), side = run.full, run.coarse, self.side
        units = run.units[0].view(rows // side, columns // side)
        corner = torch.arange(side)
        y = (units // (few // side))[:, None, :, None] * side + corner[None, :, None, None]
        x = (units % (few // side))[:, None, :, None] * side + corner[None, None, None, :]
        return (y * few + x).expand(-1, side, -1, side).flatten()


def _packed_rows(run: _Run) -> Tensor:
    """The merged token of the small pictures that each token of the pictures shows, in order."""
    first = [sum(run.counts[:i]) for i in range(len(run.counts))]
    return torch.cat([units + start for units, start in zip(run.units, first, strict=True)])


def _resized(pictures: Tensor, height: int, width: int) -> Tensor:
    """Pictures [n, C, H, W] at another size, as an image processor makes them smaller."""
    small = F.interpolate(pictures.float(), (height, width), mode="bicubic", antialias=True, align_corners=False)
    return small.to(pictures.dtype)
