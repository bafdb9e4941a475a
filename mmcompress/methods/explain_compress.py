# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.explained import Depthwise
from ..plan import register
from ..selection import Selection
from ..stage import InputStage, Need
from ..visuals import Visuals
from ..weights import Learned, Saved, base_of, load_into

MODES = ("proxy", "learned", "oracle")
RELEVANCES = ("exact", "summed")
SCALINGS = ("zscore", "count")


class Compressor(nn.Module):
    """Predicts from the attention on the N tokens of a visual how much an answer will owe to each.

    Depthwise-separable convolutions over the token axis with these output `channels`, a GELU behind each, and a pointwise one to a
    single logit. scaling: attention enters with mean 0 and deviation 1 ("zscore"), or times N ("count").
    """

    def __init__(
        self, channels: Sequence[int] = (32, 64, 128, 256, 512), kernel: int = 3, scaling: str = "zscore"
    ) -> None:
        super().__init__()
        if scaling not in SCALINGS or kernel < 1 or kernel % 2 == 0 or not channels:
            raise ValueError(
                f"channels={channels!r}, kernel={kernel!r}, scaling={scaling!r}: give at least one width, an odd kernel, and "
                f"one of {', '.join(SCALINGS)}"
            )
        self.channels, self.kernel, self.scaling = tuple(channels), kernel, scaling
        widths = [(a, b) for a, b in zip((1, *channels), channels, strict=False)]
        self.depthwise = nn.ModuleList(Depthwise(a, kernel) for a, _ in widths)
        self.pointwise = nn.ModuleList(nn.Linear(a, b) for a, b in widths)
        self.head = nn.Linear(channels[-1], 1)

    def forward(self, attention: Tensor, valid: Tensor | None = None) -> Tensor:
        """Attention [U, N] as log-probabilities [U, N]; valid [U, N] bool: tokens that are there, others get -inf."""
        here = torch.ones_like(attention, dtype=torch.bool) if valid is None else valid
        x = self._scaled(attention.to(self.head.weight), here)[..., None]  # channels last: two thirds of the time
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = F.gelu(pointwise(depthwise(x))) * here[..., None]  # biases make padding non-zero
        return self.head(x)[..., 0].masked_fill(~here, float("-inf")).log_softmax(-1)

    def _scaled(self, x: Tensor, here: Tensor) -> Tensor:
        count = here.sum(1, keepdim=True).clamp_min(1)
        x = x * here
        if self.scaling == "count":
            return x * count
        apart = (x - x.sum(1, keepdim=True) / count) * here
        deviation = (apart.square().sum(1, keepdim=True) / count).sqrt()
        return apart / deviation.clamp_min(torch.finfo(x.dtype).tiny)

    def saved(self, model: Any, training: Mapping[str, Any] | None = None) -> Saved:
        """What goes on disk: weights, how they are built, and the model that they belong to."""
        options = {"channels": list(self.channels), "kernel": self.kernel, "scaling": self.scaling}
        return Saved("explain_compress", base_of(model), dict(self.state_dict()), options, training or {})

    def save_pretrained(self, folder: str | os.PathLike[str], model: Any) -> Path:
        """Write model.safetensors and config.json for `model`, whose visuals it was trained on; returns the folder."""
        return self.saved(model).save(folder)

    @staticmethod
    def from_pretrained(folder: str | os.PathLike[str]) -> Compressor:
        """Read a folder that `save_pretrained` or `mmcompress explain-train` wrote."""
        return Compressor.of(Saved.load(folder, "explain_compress"))

    @staticmethod
    def of(saved: Saved) -> Compressor:
        try:
            made = Compressor(**saved.options)
        except TypeError as error:
            raise ValueError(f"the weights for {saved.method!r} do not say how they are built: {error}") from error
        load_into(made, saved)
        return made


@register("explain_compress")
@dataclass(frozen=True, repr=False)
class ExplainCompress(Learned, InputStage):
    """Keep the k tokens of a visual that a small trained net takes for those that the answer will owe most to.

    Lei et al., "Task-Related Token Compression in Multimodal LLMs from an Explainability Perspective", ICLR 2026, arXiv
    2506.01097; no code is public. The net reads one number per token: the attention of the instruction on it in the first LLM
    layer, mean over heads and text, made from queries and keys alone. Each visual is ranked by itself, all its tiles or
    frames in a row. Kept tokens keep their position ids.

    weights: the folder that `mmcompress explain-train` wrote for this very model. mode: "learned" (the default with weights),
    "proxy" (the default without: ranks by that attention itself), or "oracle": lets the model answer first, at most
    `answer_tokens` greedily, and ranks by the gradient-weighted relevance of that answer, by `relevance` "exact" as published,
    or "summed" over hops (`runtime.relevance.answer_relevance`). Two passes and more: an upper bound, not a speed-up.

    Departs from the paper where that says nothing: kernel 3, GELU, no norm and z-scored input are chosen here. Cost N D^2 for
    the keys, T S D for the T rows, and 0.18 M multiplications per token in the net.
    """

    keep: float | int = 0.25
    mode: str | None = None
    weights: str | None = None
    answer_tokens: int = 16
    relevance: str = "exact"
    paper: ClassVar[str] = "arXiv 2506.01097"
    positions: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_weights()
        if self.mode not in (None, *MODES):
            raise ValueError(
                f"mode={self.mode!r}: choose one of {', '.join(MODES)}, or None for the one that fits weights"
            )
        if (self.mode == "learned" and self.weights is None) or (self.mode in ("proxy", "oracle") and self.weights):
            raise ValueError(
                f"mode={self.mode!r} with weights={self.weights!r}: 'learned' needs the folder that `mmcompress explain-train "
                f"MODEL` wrote, the other modes take none"
            )
        if isinstance(self.answer_tokens, bool) or not isinstance(self.answer_tokens, int) or self.answer_tokens < 1:
            raise ValueError(f"answer_tokens={self.answer_tokens!r}: give how long an answer may be, at least 1")
        if self.relevance not in RELEVANCES:
            raise ValueError(f"relevance={self.relevance!r}: choose one of {', '.join(RELEVANCES)}")

    @property
    def signal(self) -> str:
        """What the tokens are ranked by, or what the net reads."""
        return (
            f"answer_relevance:{self.answer_tokens}:{self.relevance}"
            if self.mode == "oracle"
            else "first_text_attention"
        )

    @property
    def needs(self) -> tuple[Need, ...]:  # type: ignore[override]
        return (self.signal,)

    def build(self, saved: Saved) -> nn.Module:
        return Compressor.of(saved)

    def select(self, visuals: Visuals) -> Selection:
        scores = visuals[self.signal]
        if self.mode != "oracle" and self.trained is not None:
            with torch.no_grad():
                scores = self.trained(scores)
        return Selection.top(scores, visuals.k)
