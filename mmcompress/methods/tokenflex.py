# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.flexpool import columns_of, flexible_pool, pooled_cells
from ..ops.groups import apportion, group_sizes
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import View, Visuals
from ..weights import Learned, Saved, load_into


class TokenFlexProjector(nn.Module):
    """From pooled encoder features to LLM tokens: LayerNorm, then a SwiGLU of `ratio` times the width, without a residual."""

    def __init__(self, dim: int, out: int, ratio: int = 3) -> None:
        super().__init__()
        self.layernorm = nn.LayerNorm(dim)
        self.f1, self.f2 = nn.Linear(dim, ratio * dim), nn.Linear(dim, ratio * dim)
        self.g = nn.Linear(ratio * dim, out)

    def forward(self, x: Tensor) -> Tensor:
        """Features [..., dim] as tokens [..., out]."""
        x = self.layernorm(x.to(self.g.weight))
        return self.g(F.silu(self.f1(x)) * self.f2(x))


@register("tokenflex")
@dataclass(frozen=True, repr=False)
class TokenFlex(Learned, InputStage):
    """Pool the encoder's grid to any number of tokens before a projector that was trained with random numbers of them.

    Hu et al., "TokenFLEX: Unified VLM Training for Flexible Visual Tokens Inference", arXiv 2504.03154. The grid is enlarged to
    a multiple of the wanted one (linear, ends fixed) and averaged over equal windows; LayerNorm and SwiGLU make LLM tokens
    of that. Each view (thumbnail, tiles, video frame) gets its part of k by its size and is pooled alone, in its own
    proportions; where k is no product of such sides, the first rows have a token more. Where an earlier stage has thinned a
    visual out, it is pooled as one row. A token stands in the middle of its window.

    weights: the folder that `mmcompress learn tokenflex` wrote for this very model; None: the model's own projector, which
    was never shown pooled features, a lossy baseline. All tokens (keep=1.0) are the stock model, bit for bit. Departs from the
    reference: the language model stays as it is, and square numbers are not the only ones. Cost 2 N D sqrt(k) to pool.
    """

    keep: float | int = 0.25
    weights: str | None = None
    paper: ClassVar[str] = "arXiv 2504.03154"
    merging: ClassVar[bool] = True
    needs: ClassVar[tuple[Need, ...]] = ("encoder_features",)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights()

    def build(self, saved: Saved) -> nn.Module:
        if "g.weight" not in saved.tensors:
            raise ValueError(f"weights={self.weights!r} hold no projector")
        out, wide = saved.tensors["g.weight"].shape
        dim = len(saved.tensors["layernorm.weight"])
        return load_into(TokenFlexProjector(dim, out, wide // dim), saved)

    def select(self, visuals: Visuals) -> Selection:
        features = visuals["encoder_features"]
        views = visuals.layout.views if visuals.slots is None else (View((1, visuals.n)),)
        pooled, keep, into = self.pool(features, views, visuals.k)
        rows = self.trained(pooled) if self.trained is not None else visuals.project(pooled.to(features.dtype))
        weight = _shares(views, visuals.k)
        keep, into, weight = (
            t.to(features.device, non_blocking=True).expand(len(features), -1) for t in (keep, into, weight)
        )
        return Selection(keep, into, weight, rows.to(visuals.features.dtype))

    @staticmethod
    def pool(features: Tensor, views: tuple[View, ...], k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features [U, k, C] float32; the cell that each of them stands at [k], and the token that each cell lies in [N]."""
        cells = [view.cells for view in views]
        quotas, keep, into = _lying(views, k)
        parts = features.split(cells, dim=1)
        kinds = [(view.grid, quota) for view, quota in zip(views, quotas, strict=True)]
        made: dict[int, Tensor] = {}
        for kind in dict.fromkeys(kinds):
            (height, width), quota = kind
            mine = [i for i, other in enumerate(kinds) if other == kind and quota]
            if mine:
                grids = torch.cat([parts[i] for i in mine]).unflatten(1, (height, width))
                found = flexible_pool(grids, columns_of(quota, height, width)).chunk(len(mine))
                made.update(zip(mine, found, strict=True))
        return torch.cat([made[i] for i in sorted(made)], 1), keep, into


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _lying(views: tuple[View, ...], k: int) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """How many of `k` tokens each view gives, and of all of them together, on the CPU: the cell that each token stands at [k], and
    the token that each cell lies in [N]. The same pictures come again."""
    cells = [view.cells for view in views]
    quotas = apportion(torch.tensor([cells]), k, max(cells))[0].tolist()
    keep, into, first, done = [], [], 0, 0
    for view, quota in zip(views, quotas, strict=True):
        if quota:
            middle, inside = pooled_cells(view.grid[0], columns_of(quota, *view.grid), view.grid[1])
            keep.append(middle + first)
            into.append(inside + done)
        else:  # fewer tokens than views: with the next one that has some
            into.append(torch.full((view.cells,), min(done, k - 1)))
        first, done = first + view.cells, done + quota
    return tuple(quotas), torch.cat(keep), torch.cat(into)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _shares(views: tuple[View, ...], k: int) -> Tensor:
    """The share of each cell in the token that it lies in, [N] on the CPU."""
    into = _lying(views, k)[2][None]
    return (1 / group_sizes(into, k).gather(1, into))[0]
