# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.diverse import greedy_map, max_min
from ..ops.centring import centred, distinctiveness
from ..ops.crops import alike_crops
from ..ops.precision import wide
from ..ops.relevance import mean_of_patches
from ..plan import as_pipeline, register
from ..selection import Selection
from ..stage import Need
from ..visuals import Visuals
from .cdpruner import CDPruner
from .divprune import DivPrune
from .hosted import Hosted


@register("cen_prune")
@dataclass(frozen=True, repr=False)
class CenPrune(Hosted):
    """A diversity method, told what all tokens have in common: cosines of centred features, untypical tokens preferred.

    Wen, Lee and Choi, "Cen-Prune: Centering before Pruning", preprint 2026, built from its text: there is no code and no
    recorded run to compare with. `host` is the method as a plan string without `keep`: "divprune" or "cdpruner", whose
    signals are asked for. Its cosines become those of the features less their mean. Each token weighs as much as its raw
    features are unlike those of the others on average, brought to (0, 1]: a factor of its distance to the picks of
    divprune (not for the first pick), or of its relevance in cdpruner. `center=False` and `weight=False` switch the two
    off; what is left is the host. Cost as the host, and N D.

    Each crop (thumbnail, tile) has its own mean, weights and budget, at the same ratio, as in the paper;
    `crops="together"` treats the visual as one, as the hosts do, and as the frames of a video and what an earlier stage
    has left are always treated. `space="encoder"` compares the features before the projector or merger, which the paper
    does for Qwen2.5-VL; `patches` is how many of them lie side by side in one row, to be replaced by their mean (4 there).
    """

    center: bool = True
    weight: bool = True
    crops: str = "each"
    space: str = "llm"
    patches: int = 1
    paper: ClassVar[str] = "preprint 2026"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops not in ("each", "together"):
            raise ValueError(f"crops={self.crops!r}: choose 'each' (the paper) or 'together'")
        if self.space not in ("llm", "encoder"):
            raise ValueError(f"space={self.space!r}: choose 'llm' or 'encoder' (before the projector)")
        if isinstance(self.patches, bool) or not isinstance(self.patches, int) or self.patches < 1:
            raise ValueError(f"patches={self.patches!r}: give the number of patches that make one token, at least 1")
        if self.patches > 1 and self.space != "encoder":
            raise ValueError(f"patches={self.patches}: only encoder features are made of patches: add space='encoder'")

    def stage(self) -> DivPrune | CDPruner:
        """The host."""
        stages = as_pipeline(self.host).parts
        if len(stages) != 1 or not isinstance(stages[0], (DivPrune, CDPruner)):
            raise ValueError(
                f"host={self.host!r}: choose 'divprune' or 'cdpruner', with its options but keep if need be"
            )
        return stages[0]

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (*super().needs, *(("encoder_features",) if self.space == "encoder" else ()))

    @property
    def positions(self) -> str:  # type: ignore[override]
        return self.stage().positions

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        host, features = self.stage(), self._compared(visuals)
        views = visuals.layout.views if visuals.slots is None and self.crops == "each" else ()
        if all(view.role == "frame" for view in views):
            views = ()
        quality = host.log_quality(host.relevance(visuals)) if isinstance(host, CDPruner) else None
        keep, scores = [], features.new_zeros(features.shape[:2], dtype=torch.float32)
        for part in alike_crops(views, visuals.n, visuals.k, features.device):
            raw = wide(part.take(features))
            weight = distinctiveness(raw) if self.weight else torch.ones_like(raw[..., 0])
            scores[:, part.cells] = weight.unflatten(0, (len(scores), -1)).to(scores)
            tokens = centred(raw) if self.center else raw
            if quality is None:
                picks = max_min(tokens, part.k, weight)
            else:
                picks = greedy_map(tokens, part.take(quality) + weight.log(), part.k)
            keep.append(part.slots(picks))
        return Selection.of(torch.cat(keep, 1), scores)

    def _compared(self, visuals: Visuals) -> Tensor:
        """The features whose cosines count, [U, N, C]."""
        if self.space == "llm":
            return visuals.features
        return mean_of_patches(visuals["encoder_features"], self.patches)
