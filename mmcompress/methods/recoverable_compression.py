# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.crops import alike_crops, joined
from ..ops.neighbours import take_in
from ..ops.outliers import stands_apart
from ..ops.relevance import mean_cosine
from ..ops.shares import worth_shares
from ..ops.ties import largest
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need, check_clip
from ..visuals import Visuals


@register("recoverable_compression")
@dataclass(frozen=True, repr=False)
class RecoverableCompression(InputStage):
    """Keep what CLS attends to, recover what the question asks for, and squeeze the rest into a few centres and one token.

    Chen et al., "Recoverable Compression: A Multimodal Vision Token Recovery Mechanism Guided by Text Information", AAAI
    2025, arXiv 2409.01179. a is the attention of CLS in the last block of the encoder, its heads taken as one; t is the cosine
    of patch and question in CLIP's joint space over the root of its width D. Patches of the largest a are kept, then, of the
    others, those of the largest t. Of what is left, those of the largest a are centres: to each the a-weighted sum of its
    `neighbours` best others is added, by cosine of keys + `text_weight` t; the a-weighted sum of all that are no centres is
    the last token (all there is for k = 1), in the slot of the largest a among them. Kept patches come in raster order, then
    centres by falling a. How many of each kind the picture itself says: outliers of a (20 neighbours), of t (20) and of the
    remaining a (10), by their local density. Each crop (thumbnail, tile, frame) is treated alone, with a budget by its size.

    `clip`: name or folder of the CLIP whose image tower the model has, `tokenizer`: of the prompts, as in cdpruner. Without
    it t is the mean cosine of the projected token and the LLM's embeddings of the instruction, over the root of their width.
    Without CLS a is the attention that a patch receives, scaled to sum 1 in a crop. Cost N k C twice, in blocks.

    Departs from the reference, whose number of tokens follows from the outliers: a budget of k shares k - 1 out in proportion
    to them (equal numbers if there are none), and at their own sum is the paper's choice. Bugs of the reference that
    `compat="reference"` brings back: keys of the wrong patches among what is left, outliers of t counted over a row in which
    kept patches have its minimum, shares cut down after rounding, patches without CLIP's last norm, and the text read at the
    last place of the padding (the last two need a clip).
    """

    keep: float | int = 0.1
    neighbours: int = 32
    text_weight: float = 50.0
    compat: str | None = None
    clip: str | None = None
    tokenizer: str | None = None
    paper: ClassVar[str] = "arXiv 2409.01179"
    merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self)
        if type(self.neighbours) is not int or self.neighbours < 0:
            raise ValueError(f"neighbours={self.neighbours!r}: give how many patches a centre takes in (the paper: 32)")
        if not math.isfinite(self.text_weight):
            raise ValueError(f"text_weight={self.text_weight}: give a finite number (the paper: 50; 0 is keys alone)")
        if self.compat not in (None, "reference"):
            raise ValueError(f"compat={self.compat!r}: choose None or 'reference' (with its bugs)")

    @property
    def joint(self) -> tuple[str, str]:
        """Signals of patches and question in CLIP's joint space."""
        return ("clip_patches_plain@-1", "clip_text_last") if self.compat else ("clip_patches@-1", "clip_text")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        patches, text = self.joint
        seen = (("cls_joint_attention@-1", "received_attention"), "joint_keys@-1", "encoder_features")
        return (*seen, (text, "text_embeddings"), (patches, None))

    def select(self, visuals: Visuals) -> Selection:
        score, t = visuals["cls_joint_attention@-1", "received_attention"].detach().float(), self.text_score(visuals)
        features, keys = visuals["encoder_features"], visuals["joint_keys@-1"]
        views = visuals.layout.views if visuals.slots is None else ()
        keep, rows, plain = [], [], []
        assign = torch.full_like(score, -1, dtype=torch.int64)
        for part in alike_crops(views, visuals.n, visuals.k, score.device):
            a, s = part.take(score), part.take(t)
            if "cls_joint_attention@-1" not in visuals.signals:
                a = a / a.sum(1, keepdim=True).clamp_min(1e-30)
            found = torch.cat(self.counts(a, s), 1)
            shares = worth_shares(found, torch.full_like(found, part.k), part.k - 1).split(1, dim=1)
            order, is_centre = self.order(a, s, shares)
            order, is_centre = order[:, : part.k], is_centre[:, : part.k - 1]
            merged, into = self.merge(part.take(features), a, s, part.take(keys), order[:, :-1], is_centre)
            into = into.scatter(1, order[:, -1:], part.k - 1)
            keep.append(part.slots(order))
            rows.append(merged.view(len(score), -1, merged.shape[2]))
            plain.append(F.pad(~is_centre, (0, 1)).view(len(score), -1))
            assign = part.put(assign, part.numbers(into))
        slots, made = joined(keep), visuals.project(joined(rows))
        made = torch.where(joined(plain)[..., None], gather(visuals.features, slots), made)
        return Selection(slots, assign, rows=made, scores=score)

    @torch.no_grad()
    def text_score(self, visuals: Visuals) -> Tensor:
        """t of each token, [U, N] float32."""
        patches, text = self.joint
        if text in visuals.signals:
            tokens, words = visuals[patches], visuals[text][:, None]
        else:
            tokens, words = visuals.features, visuals[text, "text_embeddings"]
        return mean_cosine(tokens, words) / math.sqrt(tokens.shape[-1])

    def counts(self, a: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """How many patches by a, patches by t and centres the paper would take of B crops, each [B, 1]; a, t [B, n]."""
        n = a.shape[1]

        def part(size: Tensor | int, outliers: Tensor, of: Tensor | int) -> Tensor:
            outliers = outliers.sum(1, keepdim=True)
            return (size * (outliers.double() / of)).long() if self.compat else size * outliers // of

        visual = part(n, stands_apart(a, 20), n)
        kept = largest(a, visual)
        if self.compat:
            textual = part(n - visual, stands_apart(self.covered(t, kept), 20), n)
        else:
            textual = stands_apart(t, 20, ~kept).sum(1, keepdim=True)
        kept = kept | largest(t, textual, ~kept)
        size = kept.sum(1, keepdim=True)
        return visual, textual, part(size, stands_apart(a, 10, ~kept), (n - size).clamp_min(1))

    @staticmethod
    def covered(t: Tensor, kept: Tensor) -> Tensor:
        """t as the reference looks for outliers in it: with its minimum at all that is kept."""
        return torch.where(kept, t.amin(1, keepdim=True), t)

    @staticmethod
    def order(a: Tensor, t: Tensor, shares: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """All places [B, n] in output order, and which of them are centres: kept ones, centres, the rest by falling a. `shares`:
        how many there are by a, by t and as centres, [B, 1] each."""
        kept = largest(a, shares[0])
        kept = kept | largest(t, shares[1], ~kept)
        middle = largest(a, shares[2], ~kept)
        n, falling = a.shape[1], a.sort(dim=1, descending=True, stable=True).indices.argsort(1)
        raster = torch.arange(n, device=a.device) - 2 * n
        order = torch.where(kept, raster, falling - n * middle).argsort(1)
        return order, middle.gather(1, order)

    def merge(
        self, features: Tensor, a: Tensor, t: Tensor, keys: Tensor, own: Tensor, is_centre: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tokens [B, c + 1, C] of B crops with the first places `own` [B, c], and which of them each patch went into, [B, n]
        (`take_in`). features [B, n, C] before the projector, a and t [B, n], keys [B, n, d] with all heads side by side."""
        if self.compat:  # places among what is left were taken for places in the list of all keys
            left = torch.ones_like(a, dtype=torch.bool).scatter(1, own, is_centre)
            keys = gather(keys, (left.long().cumsum(1) - 1).clamp_min(0))
        return take_in(features, a, keys, own, is_centre, self.neighbours, self.text_weight * t)
