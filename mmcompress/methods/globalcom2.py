# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.crops import alike_crops
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import View, Visuals

LOGITS = "cls_logits@-1"


@register("globalcom2")
@dataclass(frozen=True, repr=False)
class GlobalCom2(InputStage):
    """The thumbnail says how many tokens each tile may keep, and has a say in which.

    Liu et al., "Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution Large
    Vision-Language Models", AAAI 2026, arXiv 2501.05179. A token's score is what CLS makes of it in the last block of the
    encoder, before the softmax; without a CLS token (`score="cosine"`; None: where the family has none) minus the cosine of
    its encoder features to the mean of its crop. The thumbnail, cut into as many cells as there are tiles, gives tile j the
    weight w_j = 1 + p_j - 1 / tiles, p being the softmax of the sums of its cells over `tau`. A tile keeps its best by
    (1 - `alpha`) times its own scores plus `alpha` times those of the thumbnail stretched over the tiles, each with norm 1
    in the tile; the thumbnail keeps its own best and has weight 1. Cost N log N beyond the signal.

    The paper keeps floor(R n_j w_j) of the n_j tokens of tile j, all of them at most, which loses some. Here R is not k / N
    but the ratio at which these sum to k exactly, for each visual (of equals the lower slot comes first). Departs from
    the reference in order and newlines too: tokens stay where they are, and padded rows have no newline. A visual without a
    thumbnail (one view, a video), which the reference does not compress, keeps its k best scores, and so does what an
    earlier stage has thinned out.
    """

    keep: float | int = 0.25
    score: str | None = None
    tau: float = 10.0
    alpha: float = 0.5
    paper: ClassVar[str] = "arXiv 2501.05179"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score not in (None, "cls", "cosine"):
            raise ValueError(f"score={self.score!r}: choose 'cls', 'cosine' or None (cls where the family has it)")
        if not self.tau > 0:
            raise ValueError(f"tau={self.tau!r}: give a temperature > 0 (10 in the paper)")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha!r}: give the weight of the thumbnail, in [0, 1] (0.5 in the paper)")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        if self.score is None:
            return ((LOGITS, "encoder_features"),)
        return (LOGITS,) if self.score == "cls" else ("encoder_features",)

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        views = visuals.layout.views if visuals.slots is None else ()
        score = visuals[self.needs[0]].float()  # type: ignore[index]
        crops = alike_crops(views, visuals.n, visuals.n, score.device)  # all of each crop
        if score.dim() == 3:
            features, score = score, score.new_empty(score.shape[:2])
            for part in crops:
                tokens = part.take(features)
                typical = F.cosine_similarity(tokens, tokens.mean(1, keepdim=True), dim=-1)
                score[:, part.cells] = -typical.unflatten(0, (len(score), -1))
        if not has_thumbnail(views):
            return Selection.top(score, visuals.k)

        guide, weight, numbers = global_scores(views, score), self.weights(views, score), tiling(views)[2]
        weight = torch.cat([torch.ones_like(weight[:, :1]), weight], 1)
        claim, mixed, seen = score.double(), torch.empty_like(score), 0
        for part in crops:
            own, theirs = (F.normalize(part.take(x), dim=1) for x in (score, guide))
            own = (1 - self.alpha) * own + self.alpha * theirs
            count, size = part.cells.shape
            w = torch.stack([weight[:, i] for i in numbers[seen : seen + count]], 1)
            # the ratio from which on a crop keeps its i-th best
            ratio = torch.arange(1, size + 1, device=w.device) / (size * w[..., None])
            best = own.sort(dim=1, descending=True, stable=True).indices
            claim = claim.scatter(1, part.slots(best), ratio.flatten(1))
            mixed[:, part.cells] = own.unflatten(0, (len(mixed), -1))
            seen += count
        return Selection.of(claim.sort(dim=1, stable=True).indices[:, : visuals.k], mixed)

    def weights(self, views: Sequence[View], score: Tensor) -> Tensor:
        """What part of the mean ratio each tile may keep by the scores [U, N]: [U, tiles], float64, mean 1.

        Cells of the thumbnail are equal; what is left over belongs to those of the last row and column.
        """
        thumbnail, edges = _thumbnail(views, score), []
        for cells, parts in zip(thumbnail.shape[1:], tiling(views)[:2], strict=True):
            step = max(cells // parts, 1)
            edges.append([(i * step, (i + 1) * step if i < parts - 1 else cells) for i in range(parts)])
        regions = (thumbnail[:, top:bottom, left:right] for top, bottom in edges[0] for left, right in edges[1])
        sums = torch.stack([region.double().sum((1, 2)) for region in regions], 1)
        power = ((sums - sums.amax(1, keepdim=True)) / self.tau).exp()
        part = power / (power.sum(1, keepdim=True) + 1e-8)
        return 1 + part - part.mean(1, keepdim=True)


def has_thumbnail(views: Sequence[View]) -> bool:
    """Whether the views are a thumbnail and either tiles laid together or tiles of equal size."""
    others = [view for view in views if view.role != "thumbnail"]
    if not others or len(others) != len(views) - 1:
        return False
    together = [view.role for view in others] == ["tiles"]
    return together or all((view.role, view.grid) == ("tile", others[0].grid) for view in others)


def tiling(views: Sequence[View]) -> tuple[int, int, list[int]]:
    """Rows and columns of tiles; and what every crop with tokens is, in the order of their first slots: 0 the thumbnail,
    from 1 the tiles in raster order."""
    lefts, tops = (sorted({view.box[i] for view in views if view.role == "tile"}) for i in (0, 1))
    rows, columns, numbers = len(tops), len(lefts), []
    for view in views:
        if view.role == "tiles":
            rows, columns = (len(seams) + 1 for seams in view.seams)
            numbers += [1 + tile for tile in sorted(set(view.tiles().tolist()))]
        elif view.role == "tile":
            numbers.append(1 + tops.index(view.box[1]) * columns + lefts.index(view.box[0]))
        else:
            numbers.append(0)
    return rows, columns, numbers


def global_scores(views: Sequence[View], score: Tensor) -> Tensor:
    """The thumbnail's scores at the place of every token: stretched over the tiles bilinearly, [U, N]."""
    thumbnail, (rows, columns, numbers) = _thumbnail(views, score), tiling(views)
    height, width = next(view.grid for view in views if view.role != "thumbnail")
    together = any(view.role == "tiles" for view in views)
    shape = (height, width) if together else (rows * height, columns * width)
    wide = F.interpolate(thumbnail[:, None], shape, mode="bilinear")[:, 0]
    tiles = [wide] if together else [part for row in wide.split(height, 1) for part in row.split(width, 2)]
    if together:
        numbers = [int(view.role == "tiles") for view in views]
    return torch.cat([[thumbnail, *tiles][number].flatten(1) for number in numbers], 1)


def _thumbnail(views: Sequence[View], score: Tensor) -> Tensor:
    """The scores [U, N] of the thumbnail as a map [U, h, w]."""
    at = next(i for i, view in enumerate(views) if view.role == "thumbnail")
    return score.split([view.cells for view in views], 1)[at].unflatten(1, views[at].grid)
