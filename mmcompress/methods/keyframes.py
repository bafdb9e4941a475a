# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..ops.keyframes import WAYS, keyframes
from ..plan import register
from ..stage import FrameStage


@register("keyframes")
@dataclass(frozen=True, repr=False)
class Keyframes(FrameStage):
    """Encode only some frames of a video: those that a CLIP finds near the question and that still cover it, or evenly spread ones.

    Tang et al., "Adaptive Keyframe Sampling for Long Video Understanding", CVPR 2025, arXiv 2502.21271 (AKS). Frames (temporal
    patches, where the encoder takes two pictures at a time) are scored by the cosine of picture and question; the video is halved
    until a stretch stands out by `peak`, `depth` times at most, and every stretch gives its share of best frames. `way="top"` takes
    the best of all, "bins" the best of equal stretches. Tokens of other frames are never made; those of chosen ones keep their
    places, and time stamps in the prompt stay. Everything behind sees the tokens that are left.

    keep    the share of the frames, a float; frames: their number instead (all, of a video with fewer).
    scorer  an open_clip folder, the name of an open_clip model ("ViT-B-32/openai"), or a CLIP on the hub or in a folder; None: no
            question is read, and frames are evenly spread, the baseline "fewer frames". tokenizer: that of the model, where it
            does not say.

    Pictures stay whole. Methods that compare neighbouring frames find larger changes behind this one. Cost: the scorer's, for all
    frames; the choice is made on the host, so that it waits for the device once. With a scorer the question has to be in the same
    call as the video.

    Departs from the reference in that there are always as many frames as were asked for: halving ends in time, and what is left
    over goes to the best frames that are not taken yet.
    """

    keep: float = 0.5
    frames: int | None = None
    scorer: str | None = None
    way: str = "aks"
    peak: float = 0.8
    depth: int = 5
    tokenizer: str | None = None
    paper: ClassVar[str] = "arXiv 2502.21271"
    positions: ClassVar[str] = "keep"

    def __post_init__(self) -> None:
        if not isinstance(self.keep, float) or not 0 < self.keep <= 1:
            raise ValueError(
                f"keep={self.keep!r}: give the share of the frames, a float in (0, 1]; a number by frames="
            )
        if self.frames is not None and (type(self.frames) is not int or self.frames < 1):
            raise ValueError(f"frames={self.frames!r}: give how many frames are encoded, an int of at least 1, or None")
        if self.way not in WAYS:
            raise ValueError(f"way={self.way!r}: choose one of {', '.join(map(repr, WAYS))}")
        if type(self.depth) is not int or self.depth < 0:
            raise ValueError(f"depth={self.depth!r}: give how often a video may be halved, an int of at least 0")
        for name in ("scorer", "tokenizer"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, (str, os.PathLike)) or not os.fspath(value)):
                raise ValueError(f"{name}={value!r}: give a name or a folder, or None")
            object.__setattr__(self, name, None if value is None else os.fspath(value))

    def count(self, frames: int) -> int:
        if self.frames is not None:
            return min(self.frames, frames)
        return max(1, round(self.keep * frames))

    def choose(self, scores: Sequence[float] | None, frames: int) -> list[int]:
        return keyframes(scores or [0.0] * frames, self.count(frames), self.way, self.peak, self.depth)
