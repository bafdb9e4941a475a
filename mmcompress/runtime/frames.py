# SPDX-License-Identifier: Apache-2.0
"""Fewer frames for the vision encoder behind a full-length facade.

Frames are rows of the encoder that know nothing of each other. It is given those that a stage chooses; the places of the others in
its output are filled with copies, so that projector, packing and placeholder counts see all tokens, and are dropped before the LLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..stage import FrameStage
from ..visuals import Layout
from .adapter import Adapter, Encoded
from .encoder import TowerScope
from .packing import sent
from .scope import ENCODE, current
from .scorer import FrameScorer

FILMS = "videos in this call of the encoder"
"""How many frames each video has that comes as rows of pictures: a key in the scope's state."""


def films_in(arguments: dict[str, Any]) -> list[int] | None:
    """How many frames each video has that an encoder method is given as [videos, frames, C, H, W]; None for other forms."""
    pixels = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
    return [pixels.shape[1]] * len(pixels) if isinstance(pixels, Tensor) and pixels.dim() == 5 else None


@dataclass
class _Run:
    """One call of the encoder: the frames of each video that were chosen, and which rows of its output all tokens copy."""

    chosen: list[list[int]]
    rows: Tensor


class FrameFacade(TowerScope):
    """Runs one FrameStage in front of a vision encoder; `owner` is the engine."""

    merged = None

    def __init__(self, owner: Any, adapter: Adapter, stage: FrameStage) -> None:
        super().__init__(owner)
        self.adapter, self.stage = adapter, stage
        self.scorer: FrameScorer | None = None
        if stage.scorer is not None:
            placeholders = tuple(adapter.placeholders.values())
            self.scorer = FrameScorer(stage.scorer, adapter.model, stage.tokenizer, placeholders)

    def install(self) -> Iterator[RemovableHandle]:
        tower = self.adapter.tower
        yield tower.register_forward_pre_hook(self._choose, with_kwargs=True)
        yield tower.register_forward_hook(self._spread_output)
        yield tower.register_forward_hook(self.end, always_call=True)

    # ------------------------------------------------------------------ what the runtime asks
    def spread(self, block: int) -> Tensor | None:
        return None

    def clusters(self, encoded: Encoded, arguments: dict[str, Any]) -> None:
        """Nothing is merged; notes which tokens of each visual stay, [k] each."""
        run = self.run()
        if run is None:
            raise RuntimeError(
                f"{self.stage!r}: the vision encoder ran past its hooks, so no frames were chosen: call "
                f"mmcompress.compress(model, plan) again"
            )
        encoded.chosen = []
        for layout, frames in zip(encoded.layouts, run.chosen, strict=True):
            places = layout.cells // layout.frames
            first = torch.tensor(frames)[:, None] * places
            encoded.chosen.append((first + torch.arange(places)).flatten())

    def left(self, layouts: list[Layout]) -> list[int]:
        """How many of the tokens of each visual enter the LLM."""
        return [layout.cells // layout.frames * self.stage.count(layout.frames) for layout in layouts]

    # ------------------------------------------------------------------ hooks
    def _choose(self, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if self.rests:
            return None
        names = list(inspect.signature(module.forward).parameters)
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        pixels = kwargs.pop(names[0])
        grids = kwargs["grid_thw"].tolist() if self.adapter.packed else None
        counts = [grid[0] for grid in grids] if grids else self._films(pixels)
        sizes = [h * w for _, h, w in grids] if grids else [1] * len(counts)
        units = [size // self.adapter.unit for size in sizes] if grids else sizes
        parts = list(pixels.split([count * size for count, size in zip(counts, sizes, strict=True)]))
        pictures = [self._pictures(part, grid) for part, grid in zip(parts, grids or [None] * len(parts), strict=True)]
        scores = self._scores(pictures, [n * unit for n, unit in zip(counts, units, strict=True)])
        run = _Run([self.stage.choose(s, n) for s, n in zip(scores, counts, strict=True)], torch.empty(0))
        made, rows, first = [], [], 0
        for part, chosen, count, size, unit in zip(parts, run.chosen, counts, sizes, units, strict=True):
            kept = part.unflatten(0, (count, size))[sent(torch.tensor(chosen), part.device)]
            made.append(kept.flatten(0, 1))
            near = [min(range(len(chosen)), key=lambda j, f=frame: abs(chosen[j] - f)) for frame in range(count)]  # type: ignore[misc]
            rows.append((first + torch.tensor(near)[:, None] * unit + torch.arange(unit)).flatten())
            first += len(chosen) * unit
        run.rows = torch.cat(rows)
        self.begin(run)
        if grids:
            fewer = [[len(chosen), h, w] for chosen, (_, h, w) in zip(run.chosen, grids, strict=True)]
            given = kwargs["grid_thw"]
            kwargs["grid_thw"] = torch.tensor(fewer, dtype=given.dtype).to(given.device, non_blocking=True)
        return (torch.cat(made),), kwargs

    def _films(self, pixels: Tensor) -> list[int]:
        """How many frames each video has, of an encoder that is given rows of pictures."""
        scope = current(self.owner, ENCODE)
        films = scope.state.get(FILMS) if scope is not None else None
        if films is None or sum(films) != len(pixels):
            raise NotImplementedError(
                f"{self.stage!r}: {type(self.adapter.tower).__name__} is given {len(pixels)} pictures, and it is not known which "
                f"of them are frames of which video: choose a stage behind the encoder, or give the processor fewer frames"
            )
        return films

    def _spread_output(self, module: Any, args: tuple, output: Any) -> Any:
        run = self.run()
        if run is None or self.rests:
            return output
        if self.adapter.packed:
            rows = sent(run.rows, output.pooler_output.device)
            output.pooler_output = output.pooler_output[rows]
            if getattr(output, "deepstack_features", None):
                output.deepstack_features = [level[rows] for level in output.deepstack_features]
            return output
        rows = sent(run.rows, output.last_hidden_state.device)
        output.last_hidden_state = output.last_hidden_state[rows]
        if getattr(output, "pooler_output", None) is not None:
            output.pooler_output = output.pooler_output[rows]
        if output.hidden_states is not None:
            output.hidden_states = tuple(state if state is None else state[rows] for state in output.hidden_states)
        return output

    # ------------------------------------------------------------------ what frames are scored by
    def _pictures(self, part: Tensor, grid: Sequence[int] | None) -> Tensor:
        """The pictures [T, d, C, H, W] of the frames of a video, d of which make one."""
        if grid is None:
            return part[:, None]
        frames, rows, columns = grid
        config, side = self.adapter.tower.config, int(self.adapter.unit**0.5)
        p, depth = config.patch_size, config.temporal_patch_size
        x = part.view(frames, rows // side, columns // side, side, side, -1, depth, p, p)
        return x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(frames, depth, -1, rows * p, columns * p)

    def _scores(self, pictures: list[Tensor], lengths: list[int]) -> list[list[float] | None]:
        """A score for each frame of each video, None without a scorer."""
        if self.scorer is None:
            return [None] * len(pictures)
        call = self.owner.call
        if call is None or call.input_ids is None:
            raise NotImplementedError(
                f"{self.stage!r} reads the question, but the video was encoded without its prompt: pass input_ids and pixels in "
                f"one call of the model, or leave scorer= out"
            )
        ids, token = call.input_ids.cpu(), self.adapter.placeholders["video"]
        there = (ids == token).sum(1).tolist()
        if not self.adapter.packed:  # pooled on the way to the prompt, all alike
            lengths = [sum(there) // len(lengths)] * len(lengths)
        found, row = [], 0
        for film, length in zip(pictures, lengths, strict=True):
            while row < len(there) and there[row] < length:
                row += 1
            if row == len(there):
                raise ValueError(f"{self.stage!r}: the prompt has other video placeholders than {lengths}")
            there[row] -= length
            scores = self.scorer.scores(film.flatten(0, 1), self.scorer.question(ids[row]))
            found.append(scores.unflatten(0, film.shape[:2]).mean(1).tolist())
        return found
