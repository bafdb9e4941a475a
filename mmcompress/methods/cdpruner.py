# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels.diverse import greedy_map
from ..ops.relevance import mean_cosine
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need, check_clip
from ..visuals import Visuals


@register("cdpruner")
@dataclass(frozen=True, repr=False)
class CDPruner(InputStage):
    """Keep k tokens that are unlike each other and relevant to the instruction (greedy MAP of a conditional DPP).

    Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", NeurIPS
    2025, arXiv 2506.10967. The kernel is the cosine of projected tokens, scaled on both sides by their relevance r in
    (0, 1]. `theta` in [0, 1), optional, weighs relevance as in the paper: exp(theta / (2 (1 - theta)) r) instead of r;
    0 is diversity alone.

    With `clip`, the name or folder of the CLIP whose image tower the model has (LLaVA-1.5: "openai/clip-vit-large-patch14-336";
    also an open_clip folder), relevance is MINUS the cosine of patch and question in CLIP's joint space, as in the reference:
    CLIP's patches were never trained to match text and tend to say the opposite. `tokenizer`, with which the question is read
    from the prompt, is that of the model if not given. Without `clip` it is PLUS the mean cosine of the projected token to the
    instruction's LLM input embeddings, as in a port to another engine (a weaker signal, but there for all families).

    Cost k N (D + k) at most, N k float32 of memory, on a GPU also a table of N^2 up to 4,096 tokens. Departs from the
    reference: relevance is scaled to (0, 1] per visual, not over all that share a batch (`compat="reference"` does that),
    all cosines are float32, equal tokens follow by relevance instead of breaking the factorisation, the tiles of one
    picture share its budget, and each segment of a question that is too long for CLIP is a text of its own with an end
    token (the mean over segments counts in both).
    """

    keep: float | int = 0.111
    theta: float | None = None
    compat: str | None = None
    clip: str | None = None
    tokenizer: str | None = None
    paper: ClassVar[str] = "arXiv 2506.10967"
    needs: ClassVar[tuple[Need, ...]] = (("clip_text", "text_embeddings"), ("clip_patches", None))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_clip(self)
        if self.theta is not None and not 0 <= self.theta < 1:
            raise ValueError(f"theta={self.theta}: give a weight of relevance in [0, 1), or None for r itself")
        if self.compat not in (None, "reference"):
            raise ValueError(f"compat={self.compat!r}: choose None or 'reference' (relevance scaled over the batch)")

    @torch.no_grad()
    def select(self, visuals: Visuals) -> Selection:
        relevance = self.relevance(visuals)
        return Selection.of(greedy_map(visuals.features, self.log_quality(relevance), visuals.k), relevance)

    def log_quality(self, relevance: Tensor) -> Tensor:
        """Logarithm of what the kernel is scaled by."""
        return relevance.log() if self.theta is None else self.theta / (2 * (1 - self.theta)) * relevance

    def relevance(self, visuals: Visuals) -> Tensor:
        """Relevance of each token to the instruction, [U, N] float32 in (0, 1]; 1 where all are the same."""
        text = visuals["clip_text", "text_embeddings"]
        if "clip_text" in visuals.signals:
            raw = -mean_cosine(visuals["clip_patches"], text[:, None])
        else:
            raw = mean_cosine(visuals.features, text)
        over = 1 if self.compat is None else (0, 1)
        low, high = raw.amin(over, keepdim=True), raw.amax(over, keepdim=True)
        return (raw - low + 1e-6) / (high - low).clamp_min(1e-6)
