# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..ops.latents import latent_pool
from ..ops.ties import argmax_first
from ..plan import register
from ..selection import Selection, gather
from ..stage import InputStage, Need
from ..visuals import Visuals


@register("flash_compression")
@dataclass(frozen=True, repr=False)
class FlashCompression(InputStage):
    """Pool all tokens into k latents: k learned queries attend once over the tokens, with no projections.

    Wang et al., "FLASH: Latent-Aware Semi-Autoregressive Speculative Decoding for Multimodal Tasks", arXiv 2505.12728:
    only the pooling operator, W = softmax(A F^T), latents W F. Departs from the paper in where it stands: there
    it makes the input of a draft model from hidden states of the target and is trained with it; here it is applied to the tokens
    that enter the LLM. Cost 2 k N D.

    `queries` is a safetensors file with a tensor "queries" [C, D], C >= k, of which the first k are used. Without one the
    k most attended tokens are the queries: no training, and untested. `scale` multiplies the logits; by default 1 with
    learned queries, as in the paper, and D^-0.5 with tokens as queries. Latents have no order. Learned ones stand at even
    distances in raster order, others where their query was; every other token counts to the latent that weighs it most.
    """

    keep: float | int = 0.111
    queries: str | None = None
    scale: float | None = None
    paper: ClassVar[str] = "arXiv 2505.12728"
    merging: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries is not None and not isinstance(self.queries, str):
            raise TypeError(f"queries={self.queries!r}: give the path of a safetensors file, or None")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"scale={self.scale}: give a positive factor of the logits, or None")

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (("cls_attention", "received_attention"),) if self.queries is None else ()

    def select(self, visuals: Visuals) -> Selection:
        features, k = visuals.features, visuals.k
        if self.queries is None:
            keep = Selection.top(visuals["cls_attention", "received_attention"], k).keep
            queries, scale = gather(features, keep), features.shape[-1] ** -0.5
        else:
            steps = torch.arange(k, device=features.device)
            keep = (((2 * steps + 1) * visuals.n) // (2 * k)).expand(len(features), -1)
            queries, scale = self._learned(k, features), 1.0
        latents, weights = latent_pool(queries, features, scale if self.scale is None else self.scale)
        weights = weights.detach()
        place = torch.arange(k, device=features.device).expand_as(keep)
        assign = argmax_first(weights.transpose(1, 2)).scatter(1, keep, place)
        return Selection(keep, assign, rows=latents.to(features.dtype), scores=weights.sum(1))

    def _learned(self, k: int, features: Tensor) -> Tensor:
        """The first `k` learned queries [k, D]."""
        path, width = Path(str(self.queries)), features.shape[-1]
        if not path.is_file():
            raise ValueError(f"queries={self.queries!r}: there is no such file")
        tensors = load_file(path)
        if "queries" not in tensors:
            raise ValueError(
                f"queries={self.queries!r} holds {', '.join(tensors) or 'nothing'}, but no tensor 'queries'"
            )
        queries = tensors["queries"]
        if queries.dim() != 2 or queries.shape[0] < k or queries.shape[1] != width:
            raise ValueError(
                f"queries={self.queries!r} holds {tuple(queries.shape)}, but {k} queries of width {width} are needed"
            )
        return queries[:k].to(features.device, non_blocking=True)
