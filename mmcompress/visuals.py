# SPDX-License-Identifier: Apache-2.0
"""Visuals and Layout: what a method sees."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .ops.frames import Frames
from .selection import Selection, gather

PER_VISUAL = frozenset({"cls_feature", "cls_features", "text_embeddings", "clip_text", "clip_text_last"})
"""Signals that have one value per visual, not one per token."""


@dataclass(frozen=True)
class View:
    """One grid of tokens: a picture, its tiles laid side by side, one tile, the thumbnail, or one frame.

    grid   rows, columns.
    box    left, top, right, bottom of what the grid shows, in parts of the original picture. It may reach over the edge
           where a processor pads the picture.
    role   "image" (the only view), "tiles" (a high-resolution picture, laid together), "tile", "thumbnail" or "frame";
           "audio" is a row of tokens in time.
    seams  the rows and the columns (counted in tokens) at which another tile begins, for role "tiles".
    """

    grid: tuple[int, int]
    box: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    role: str = "image"
    seams: tuple[tuple[float, ...], tuple[float, ...]] = ((), ())

    @property
    def cells(self) -> int:
        return self.grid[0] * self.grid[1]

    def boxes(self) -> Tensor:
        """Box of every cell, [cells, 4] in raster order, in parts of the original picture."""
        rows, columns = self.grid
        left, top, right, bottom = self.box
        y, x = torch.meshgrid(torch.arange(rows + 1) / rows, torch.arange(columns + 1) / columns, indexing="ij")
        x, y = left + x * (right - left), top + y * (bottom - top)
        return torch.stack([x[:-1, :-1], y[:-1, :-1], x[1:, 1:], y[1:, 1:]], -1).flatten(0, 1)

    def tiles(self) -> Tensor:
        """Number of the tile that the centre of every cell is in, [cells], in raster order of the tiles."""
        (row, _), (column, column_tiles) = (
            (torch.bucketize(torch.arange(n) + 0.5, torch.tensor(seams)), len(seams) + 1)
            for n, seams in zip(self.grid, self.seams, strict=True)
        )
        return (row[:, None] * column_tiles + column).flatten()


@dataclass(frozen=True)
class Layout:
    """How the tokens of one visual lie.

    views       the grids, in the order of the tokens; each in raster order.
    structural  indices of tokens that are no patches (CLS, newline, separator). They are never pruned, no method sees
                them, and they do not count towards a budget. All other tokens are the cells of the views, in order.
    parts       how many views each visual has, where a layer stage sees several together; empty: it is one visual.
    seconds     from one frame of a video to the next, where the model is told (Qwen2.5-VL's second_per_grid_ts); None: not known.
    """

    views: tuple[View, ...]
    structural: tuple[int, ...] = ()
    parts: tuple[int, ...] = ()
    seconds: float | None = None

    @staticmethod
    def raster(frames: int, rows: int, columns: int, structural: tuple[int, ...] = ()) -> Layout:
        """One picture, or several frames of a video one after the other."""
        role = "image" if frames == 1 else "frame"
        return Layout((View((rows, columns), role=role),) * frames, structural)

    @staticmethod
    def joined(layouts: Sequence[Layout]) -> Layout:
        """Of several visuals, one behind the other, without their structural tokens."""
        known = {layout.seconds for layout in layouts if layout.frames > 1}
        seconds = known.pop() if len(known) == 1 else None
        views = tuple(view for layout in layouts for view in layout.views)
        return Layout(views, parts=tuple(len(layout.views) for layout in layouts), seconds=seconds)

    @property
    def cells(self) -> int:
        """Number of patch tokens, N in the docstrings of the methods."""
        return sum(view.cells for view in self.views)

    @property
    def frames(self) -> int:
        """Of how many frames (temporal patches, of encoders that take several pictures at a time) the tokens are, all alike, one
        after the other; 1 for pictures, sounds, and several visuals together."""
        alike = len(self.parts) < 2 and len(set(self.views)) == 1 and self.views[0].role == "frame"
        return len(self.views) if alike else 1

    @property
    def tokens(self) -> int:
        """Number of all tokens, structural ones included."""
        return self.cells + len(self.structural)

    def patch_tokens(self) -> list[int]:
        """Indices (among all tokens of the visual) of the tokens that are patches."""
        structural = set(self.structural)
        return [i for i in range(self.tokens) if i not in structural]

    def view_of(self) -> Tensor:
        """Number of the view that every cell is in, [N]."""
        return torch.repeat_interleave(torch.tensor([view.cells for view in self.views]))

    def before(self) -> Tensor:
        """The cell at the same place of the frame before, [N] int64; -1 where there is none: in first frames and in pictures."""
        found, first, end = [], 0, 0
        starts = set(itertools.accumulate(self.parts, initial=0))
        for number, view in enumerate(self.views):
            last = self.views[number - 1] if number and number not in starts else None
            follows = last is not None and view.role == "frame" == last.role and last.grid == view.grid
            cells = torch.arange(first, first + view.cells) if follows else torch.full((view.cells,), -1)
            first, end = end, end + view.cells
            found.append(cells)
        return torch.cat(found)

    def boxes(self) -> Tensor:
        """Box of every cell in its picture (or frame), [N, 4] as left, top, right, bottom in parts of the original."""
        return torch.cat([view.boxes() for view in self.views])


def _no_road(x: Tensor) -> Tensor:
    raise NotImplementedError("this family has no road from encoder features to LLM tokens, which the method needs")


@dataclass(frozen=True)
class AttentionRows:
    """What an attention stage sees of one LLM layer in one call, for B samples.

    Rows are the last Q tokens of the call: with visuals in the call all those behind the last of them, else all. Columns are
    the K tokens that the layer holds, of the cache and of the call, in order (a static cache: with its empty end).

    layer     number of the layer.
    stream    [B, S, D]: the residual stream that enters it, tokens of this call only.
    changing  [B, Q] bool: which rows may change: real tokens behind the last visual of their sample.
    visual    [B, K] bool: columns of visual tokens; real [B, K] bool: columns that are no padding.
    fresh     which samples have visuals in this call.
    mean      () -> [B, Q, K] float32: the softmax attention of the rows as the layer makes it, mean over heads.
    before    () -> how many columns were there before this call; tokens () -> how many tokens the conversation has with it.
    place     () -> [B or 1, K] int64: number in the conversation of the token of each column; the same in all layers.
    state     by name, one row per sample: what was noted in this layer. It lives in the cache, follows its rows (beams), and
              is there again in the next call. Replace entries, never change a tensor.
    carried   by name: for the layers behind this one, in this call only.
    """

    layer: int
    stream: Tensor
    changing: Tensor
    visual: Tensor
    real: Tensor
    fresh: tuple[bool, ...]
    mean: Callable[[], Tensor]
    before: Callable[[], int]
    tokens: Callable[[], int]
    place: Callable[[], Tensor]
    state: dict[str, Tensor]
    carried: dict[str, Tensor]

    def columns(self, name: str, new: Tensor | None = None) -> Tensor:
        """What was noted of each column under `name`, [B, K], 0 where nothing was; first `new` [B, S] is added to it, for the
        tokens of this call."""
        if new is not None:
            known = self.state.get(name, new[:, :0])
            self.state[name] = torch.cat([widened(known, self.before()), new], 1)
        return widened(self.state.get(name, self.visual[:, :0]), self.visual.shape[1])


def widened(x: Tensor, columns: int, fill: float = 0) -> Tensor:
    """The first `columns` columns of `x` [B, P, ...]; missing ones are `fill`."""
    x = x[:, :columns]
    more = x.new_full((x.shape[0], columns - x.shape[1], *x.shape[2:]), fill)
    return torch.cat([x, more], 1) if more.shape[1] else x


@dataclass(frozen=True)
class Visuals:
    """A dense batch of U visuals (images or videos) with the same layout and the same budget.

    features  [U, N, D]: the patch tokens as they are about to enter the LLM (or, in an LLM layer, their hidden states).
    layout    how the tokens lie before any stage has acted. In layer stages that ask for it (`LayerStage.lays`) that of all
              visuals of a sample, one behind the other; else just a row of N tokens.
    k         exact number of tokens to keep.
    signals   by name; only what the stages of a plan ask for is computed. Means over heads, of the block whose output the
              LLM gets; with "@" of another one ("keys@0", "cls_logits@-1", "received_attention@0.375" of the depth):
              `cls_attention`, `cls_logits` (before the softmax) [U, N], `cls_joint_attention` [U, N] (heads not split);
              `received_attention`, `given_attention`, `received_logits`, `given_logits` [U, N] (means over the patches on
              the other side); `hub_attention:9.0` [U, N] (given by the hubs, those patches that receive more than 9 times the
              mean; by all where there are none); `keys` [U, N, d], `joint_keys` [U, N, C] (heads side by side).
              `encoder_features` [U, N, De], `cls_feature` [U, De] (of a video: of the first frame), `cls_features` [U, T, De] (of
              each frame or view); `text_embeddings` [U, T, D] of the instruction, as they enter the LLM. Where a stage has a
              `clip`, in its joint space, float32: `clip_patches` [U, N, E] of a block,
              through CLIP's last norm and projection (`clip_patches_plain`: without the norm), and the question `clip_text`
              [U, E] (`clip_text_last`: read at the last place of the padded text) of unit length.
              In layer stages, of the layer before the cut or with "@next" of the one behind it: `last_attention` [U, N] (of the
              last prompt token), `mean_attention` (of all prompt tokens), `pagerank` [U, N], `text_attention` [U, T, N] (of the
              instruction), `text_attention_heads` [U, heads, T, N], `last_attention_heads` [U, heads, 1, N],
              `key_norms` [U, N] and `text_key_norms` [U, T] (L1),
              `rotary_gain` [U, T, N] (what the rotary embedding alone would make the logits). Of the residual stream behind
              the final norm: `final_states` [U, N, D], `text_final_states` [U, T, D]; as it is: `text_states` [U, T, D].
              Of the whole prompt, before the LLM: `first_text_attention` [U, N] (of the instruction in LLM layer 0, mean over heads
              and text), `answer_relevance:16:exact` [U, N] (gradient-weighted, of the model's own answer of at most 16 tokens).
              `transitions@6` [U, N]: how much the layers from 6 on have changed each token (`absolute_transitions@6`: by the
              size of the cosine; `transitions@3+4+9+`: these layers).
              From before the LLM: `text_relevance` [U, T] (how much the visual tokens mean each word),
              `input_scores` [U, N] (of the last input stage).
    slots     [U, N]: which cell of `layout` each token is; the cells in order as long as no stage has acted.
    cut       number of the cut, for layer stages that cut several times.
    """

    features: Tensor
    layout: Layout
    k: int
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    slots: Tensor | None = None
    road: Callable[[Tensor], Tensor] = _no_road
    cut: int = 0

    @property
    def n(self) -> int:
        """Number of tokens, N."""
        return self.features.shape[1]

    def __getitem__(self, names: str | tuple[str, ...]) -> Tensor:
        """The signal of that name, or the first there is of several that may stand for each other."""
        wanted = (names,) if isinstance(names, str) else names
        for name in wanted:
            if name in self.signals:
                return self.signals[name]
        raise ValueError(
            f"signal {' or '.join(wanted)} is not available here; there is: {', '.join(self.signals) or 'none'}"
        )

    def by_frame(self) -> Frames:
        """The tokens by frame, [U, T, P, D]: of a video T frames (temporal patches) of P places; all else is one frame."""
        frames = self.layout.frames
        return Frames.of(self.features, frames, self.layout.cells // frames, self.slots)

    def project(self, rows: Tensor) -> Tensor:
        """Encoder features [U, m, De] sent down the family's own road to the LLM: [U, m, D]."""
        return self.road(rows)

    def take(self, selection: Selection) -> Visuals:
        """What the next stage sees: the output tokens of `selection`, and the signals of the slots they stand for."""
        features = selection.rows if selection.rows is not None else selection.apply(self.features)
        signals = {n: s if n in PER_VISUAL else gather(s, selection.keep) for n, s in self.signals.items()}
        slots = (
            self.slots
            if self.slots is not None
            else torch.arange(self.n, device=features.device).expand(len(features), -1)
        )
        return replace(self, features=features, signals=signals, slots=gather(slots, selection.keep))
