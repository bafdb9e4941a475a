# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.ties import largest
from ..plan import register
from ..stage import AttentionStage, Rewrite, check_layer, layer_at
from ..visuals import AttentionRows, widened

_SEEN, _HIDDEN = "dycoke_seen", "dycoke_hidden"


@register("dycoke_decode")
@dataclass(frozen=True, repr=False)
class DyCokeDecode(AttentionStage):
    """While decoding, layers from `layer` on see only the visual tokens that the new token attends to most in the layer before.

    Tao et al., "DyCoke", CVPR 2025, arXiv 2411.15024, its dynamic pruning of the KV cache; behind `dycoke` or any other method. In
    each step the share `drop` of the visual tokens is hidden; while the attention on them has a cosine of `threshold` or more with
    that of the step before, the choice stays. The paper means that (`mode="reuse"`); in the reference such steps see all
    (`mode="reference"`). What is hidden may come back, since the cache keeps it: neither memory nor, here, time is saved. The rows
    of these layers are computed once more without the hidden tokens, which is exactly what a shorter view of the cache gives. The
    paper gains little by its view, too: it copies keys and values at each step. Cost: the attention of these layers once more, in
    each step.

    Only calls of one token behind a prompt are such steps: without a cache nothing is hidden. `layer` is a number (the paper: 3)
    or a part of the depth. The reference never hides the last visual token, and begins a sample with what it saw in the last one.
    """

    drop: float = 0.7
    layer: int | float = 3
    threshold: float = 0.9
    mode: str = "reuse"
    paper: ClassVar[str] = "arXiv 2411.15024"

    def __post_init__(self) -> None:
        check_layer(self.layer)
        for name in ("drop", "threshold"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r}: give a number in [0, 1] (the paper: {getattr(type(self), name)})")
        if self.mode not in ("reuse", "reference"):
            raise ValueError(f"mode={self.mode!r}: choose 'reuse' (the paper) or 'reference' (its code)")

    def layers(self, depth: int) -> range:
        return range(layer_at(self.layer, depth) - 1, depth)

    def rewriting(self, rows: AttentionRows) -> Rewrite | None:
        if any(rows.fresh):
            rows.state.pop(_SEEN, None)
        if any(rows.fresh) or rows.stream.shape[1] > 1:
            return None
        if _HIDDEN in rows.carried:
            hidden = rows.carried[_HIDDEN].to(rows.stream.device)
            return lambda weights, part: _without(weights, hidden)
        now = rows.mean()[:, -1]
        seen, hidden = (
            widened(rows.state[name], now.shape[1]) if name in rows.state else torch.zeros_like(now, dtype=kind)
            for name, kind in ((_SEEN, now.dtype), (_HIDDEN, torch.bool))
        )
        hidden, _ = self.view(now, seen, hidden, rows.visual)
        rows.state[_SEEN] = now
        rows.state[_HIDDEN] = hidden
        rows.carried[_HIDDEN] = hidden
        return None

    def view(self, now: Tensor, before: Tensor, hidden: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Which columns [B, K] later layers do not see in this step; and the cosine [B] of the attention on visual columns with
        that of the step before (0 in the first step).

        now, before [B, K]: attention of the new token in this and in the last step (0 where there was none); hidden [B, K]: what
        was hidden then; visual [B, K]: which columns are of visual tokens."""
        now, before = now.masked_fill(~visual, 0), before.masked_fill(~visual, 0)
        alike = F.cosine_similarity(now, before, dim=1)
        count = (visual.sum(1, keepdim=True).double() * (1 - self.drop)).long()
        fresh = visual & ~largest(now, count, visual)
        stays = (alike >= self.threshold)[:, None]
        return torch.where(stays, hidden if self.mode == "reuse" else torch.zeros_like(hidden), fresh), alike


def _without(weights: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Attention [B, heads, q, K] as it is without the `hidden` columns [B, K]; and which rows have changed."""
    gone = hidden[:, None, None]
    lost = (weights * gone).sum(3, keepdim=True)
    return weights.masked_fill(gone, 0) / (1 - lost).clamp_min(1e-30), hidden.any(1)[:, None].expand(
        -1, weights.shape[2]
    )
