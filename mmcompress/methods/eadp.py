# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.coverage import max_coverage
from ..ops.crops import joined
from ..ops.precision import normalized, wide
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import View, Visuals


@register("eadp")
@dataclass(frozen=True, repr=False)
class EADP(InputStage):
    """Keep the k tokens that best cover what the question's telling words point at; words that point everywhere do not count.

    "Entropy-Aware Dense Visual Token Pruning", ECCV 2026, arXiv 2607.02484. Every word of the instruction has a map of cosines
    over each crop; the part `words` of them with the lowest entropy counts, weighted by it. `alpha` is the share of the whole
    text against these words. The map is brought to (0, 1] and smoothed by a 3 x 3 Gaussian; its power `beta` is what each place
    has to be covered by (greedy facility location of cosines). The text is read from the LLM's input embeddings, as in the
    reference for Qwen (beta=2 there). `negate`: cosines count with a minus, as they do in the reference everywhere, after what
    CLIP's patches do; False takes them as they are.

    Cost N^2 D / 2, k N^2 at most and N T D for T words, with a table of N^2. Departs from the reference:
    one pool for all crops of a picture (there quotas whose remainder is lost), the real grid of each crop is smoothed, an
    instruction of no words leaves coverage alone to decide.
    """

    keep: float | int = 0.111
    alpha: float = 0.5
    beta: float = 1.0
    words: float = 0.2
    negate: bool = True
    paper: ClassVar[str] = "arXiv 2607.02484"
    needs: ClassVar[tuple[Need, ...]] = ("text_embeddings",)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "words"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: give a share, in [0, 1]")
        if not 0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta}: give an exponent, at least 0 (the paper: 1 or 2)")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        text = wide(visuals["text_embeddings"], visuals.features)
        views = visuals.layout.views if visuals.slots is None else ()
        raw = visuals.features.new_zeros(visuals.features.shape[:2], dtype=torch.float32)
        if text.shape[1]:
            tokens = normalized(visuals.features, text)
            whole, words = self._signed(text.mean(1, keepdim=True)), self._signed(text)[:, None]
            runs = _runs(views) or [(1, (1, visuals.n))]
            parts = [self._seen(part, whole, words).view(len(raw), -1) for part in _parted(tokens, runs)]
            raw = joined(parts)
        importance = self.importance(raw, views)
        return Selection.of(self.picks(visuals.features, importance, visuals.k), importance)

    def entropy(self, maps: Tensor) -> Tensor:
        """How far each map of cosines [U, N, M, L] is spread over the N tokens, [U, M, L]."""
        spread = (100 * maps).softmax(1)
        return -(spread * (spread + 1e-12).log()).sum(1)

    def relevance(self, tokens: Tensor, text: Tensor, words: Tensor) -> Tensor:
        """What the text points at, [U, N] float32: tokens [U, N, C], text [U, M, C] and its words [U, M, L, C] in one space."""
        return self._seen(normalized(tokens, text), *(self._signed(wide(x, tokens)) for x in (text, words)))

    def _signed(self, text: Tensor) -> Tensor:
        text = normalized(text)
        return -text if self.negate else text

    def _seen(self, tokens: Tensor, text: Tensor, words: Tensor) -> Tensor:
        """The same of rows of length 1, those of the text with its sign; tokens [U g, N, C] may be several crops of each visual."""
        text, words = (
            x.repeat_interleave(len(tokens) // len(x), 0) if len(x) < len(tokens) else x for x in (text, words)
        )
        whole = torch.bmm(tokens, text.transpose(1, 2))
        maps = torch.bmm(tokens, words.flatten(1, 2).transpose(1, 2)).unflatten(2, words.shape[1:3])
        return (self.alpha * whole + (1 - self.alpha) * self.local(maps)).mean(2)

    def local(self, maps: Tensor) -> Tensor:
        """What the telling words point at, [U, N, M], from the maps of all words [U, N, M, L]."""
        entropy = self.entropy(maps)
        count = max(1, int(self.words * maps.shape[3]))
        low, chosen = entropy.sort(dim=2, stable=True)
        weight = (low[..., :count] / -(0.01 + 1e-6)).softmax(2)
        kept = maps.gather(3, chosen[:, None, :, :count].expand(-1, maps.shape[1], -1, -1))
        return (kept * weight[:, None]).sum(3)

    def importance(self, raw: Tensor, views: tuple[View, ...]) -> Tensor:
        """Relevance [U, N] as weights in (0, 1], smoothed in each of the grids `views` and raised to `beta`."""
        low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
        scaled = (raw - low + 1e-6) / (high - low + 1e-6)
        if views:
            runs = _runs(views)
            parts = zip(_parted(scaled, runs), runs, strict=True)
            scaled = joined([smoothed(part, grid).view(len(raw), -1) for part, (_, grid) in parts])
        return scaled**self.beta

    @staticmethod
    def picks(features: Tensor, importance: Tensor, k: int) -> Tensor:
        """The tokens of `features` [U, N, D] in the order they are picked, [U, k]; importance [U, N]: of covering each."""
        unit = normalized(features)
        table = (torch.bmm(unit, unit.transpose(1, 2)).clamp(-1, 1) + 1) / 2
        return max_coverage(table * importance[..., None], k)


def smoothed(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map [U, rows * columns] under a 3 x 3 Gaussian of width 1, mirrored at its edges."""
    edges = ("reflect" if min(grid) > 1 else "replicate",)
    padded = F.pad(x.view(len(x), 1, *grid), (1, 1, 1, 1), *edges)
    return F.conv2d(padded, _gaussian(x.dtype).to(x.device, non_blocking=True)).flatten(1)


@functools.cache
@torch.inference_mode(False)
def _gaussian(dtype: torch.dtype) -> Tensor:
    row = torch.exp(-(torch.arange(-1.0, 2.0, dtype=dtype) ** 2) / 2)
    kernel = row[:, None] * row[None]
    return (kernel / kernel.sum())[None, None]


def _runs(views: Sequence[View]) -> list[tuple[int, tuple[int, int]]]:
    """How many neighbouring views have the same grid, and which."""
    return [(len(list(same)), grid) for grid, same in itertools.groupby(view.grid for view in views)]


def _parted(x: Tensor, runs: Sequence[tuple[int, tuple[int, int]]]) -> list[Tensor]:
    """What each of the runs has of `x` [U, N, ...], view by view: [U * views, cells, ...]."""
    sizes = [(count, rows * columns) for count, (rows, columns) in runs]
    parts = x.split([count * cells for count, cells in sizes], 1) if len(sizes) > 1 else (x,)
    return [
        part.reshape(len(x) * count, cells, *x.shape[2:]) for part, (count, cells) in zip(parts, sizes, strict=True)
    ]
