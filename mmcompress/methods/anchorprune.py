# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.diverse import expand
from ..ops.precision import wide
from ..ops.relevance import mean_cosine
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need, check_clip
from ..visuals import Visuals


@register("anchorprune")
@dataclass(frozen=True, repr=False)
class AnchorPrune(InputStage):
    """Protect the tokens that the question asks for, then add those that are important and far from all that is kept.

    "AnchorPrune: Relevance-Anchored Contextual Expansion", ECCV 2026, arXiv 2607.07033. The ranking by relevance is protected
    up to the `patience`-th token behind its first `least` (default: k / 6.4) that is new, which is to be farther than
    `novelty` (cosine distance) from each of these first ones; at most the part `most` of k. Then the token of the largest
    importance times distance to what is kept, the distance at most 1, comes next, until there are k.

    With `clip`, the CLIP of the vision tower (see cdpruner), relevance is MINUS the cosine of patch and question in its joint
    space, which is where novelty is measured too, as in the reference for LLaVA. Without, it is the largest cosine of the
    projected token to one of the instruction, as there for Qwen. Importance is the attention of CLS, and distances are those
    of the encoder features; without CLS the attention received, and the projected tokens; without either the
    cosine to their mean. `tokenizer`: see cdpruner.

    Cost N^2 C and k N with a table of N^2; above 4,096 tokens k N C and O(N). Departs from the reference: cuts tiles as it cuts
    pictures (there a picture of tiles stays whole), keeps M-RoPE positions, and where no instruction is found,
    importance decides alone (there nothing is pruned).
    """

    keep: float | int = 0.111
    least: int | None = None
    novelty: float = 0.2
    patience: int = 3
    most: float = 0.5
    clip: str | None = None
    tokenizer: str | None = None
    paper: ClassVar[str] = "arXiv 2607.07033"
    needs: ClassVar[tuple[Need, ...]] = (
        ("clip_text", "text_embeddings"),
        ("clip_patches", None),
        ("cls_attention", "received_attention", None),
        ("encoder_features", None),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self)
        for name, low in (("least", 0), ("patience", 1)):
            value = getattr(self, name)
            if not (value is None and name == "least") and (type(value) is not int or value < low):
                raise ValueError(f"{name}={value!r}: give a number of tokens, at least {low}")
        if not 0 <= self.most <= 1:
            raise ValueError(f"most={self.most}: give the part of the budget that may be protected, in [0, 1]")
        if not 0 <= self.novelty < float("inf"):
            raise ValueError(f"novelty={self.novelty}: give a cosine distance, at least 0 (the paper: 0.2)")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        relevance, compared = self.relevance(visuals)
        importance, features = self.importance(visuals)
        start, sizes = self.anchor(relevance, compared, visuals.k)
        return Selection.of(self.expansion(features, importance, visuals.k, start, sizes), relevance)

    def relevance(self, visuals: Visuals) -> tuple[Tensor, Tensor]:
        """How much the question asks for each token, [U, N], and the features whose novelty counts, [U, N, C]."""
        if "clip_text" in visuals.signals:
            patches = visuals["clip_patches"]
            raw = -mean_cosine(patches, visuals["clip_text"][:, None])
            low, high = raw.amin(1, keepdim=True), raw.amax(1, keepdim=True)
            return (raw - low + 1e-6) / (high - low + 1e-12), patches
        text = visuals["text_embeddings"]
        tokens, words = (F.normalize(wide(x, visuals.features), dim=-1) for x in (visuals.features, text))
        return (tokens @ words.transpose(1, 2)).amax(2) if text.shape[1] else tokens[..., 0] * 0, visuals.features

    def importance(self, visuals: Visuals) -> tuple[Tensor, Tensor]:
        """What each token is worth besides, [U, N], and the features whose distances count, [U, N, C]."""
        early = "cls_attention" in visuals.signals and "encoder_features" in visuals.signals
        features = visuals["encoder_features"] if early else visuals.features
        for name in ("cls_attention", "received_attention"):
            if name in visuals.signals:
                return wide(visuals[name]), features
        mean = wide(features).mean(1, keepdim=True)
        return F.cosine_similarity(wide(features), mean, dim=-1).relu(), features

    def anchor(self, relevance: Tensor, features: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ranking by relevance [U, M], and how many of its first tokens each visual protects, [U]."""
        least = min(max(1, round(k / 6.4) if self.least is None else self.least), k)
        most = max(least, int(self.most * k))
        ranking = wide(relevance).sort(dim=1, descending=True, stable=True).indices[:, :most]
        unit = F.normalize(gather(wide(features), ranking), dim=-1)
        far = 1 - (unit @ unit[:, :least].transpose(1, 2)).amax(2)
        new = (far > self.novelty) & (torch.arange(most, device=far.device) >= least)
        enough = (new.cumsum(1) >= self.patience).long()
        return ranking, torch.where(enough.any(1), enough.argmax(1) + 1, most)

    @staticmethod
    def expansion(features: Tensor, importance: Tensor, k: int, start: Tensor, sizes: Tensor) -> Tensor:
        """All k tokens, those that are protected first, [U, k]."""
        return expand(features, k, importance.clamp_min(0), cap=1.0, start=start, sizes=sizes)
