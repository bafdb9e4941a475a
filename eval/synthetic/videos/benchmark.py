# SPDX-License-Identifier: Apache-2.0
"""Videos of the dev or test split, one question each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ....videos import Clip
from ..pages.content import SPLITS, Split
from ..questions import Question
from .content import FPS, Video, make_video
from .frames import draw_video
from .questions import KINDS, ask


def clip_of(frames: np.ndarray) -> Clip:
    """Frames [n, SIDE, SIDE, 3] at `FPS`."""
    return Clip(frames, np.arange(len(frames)) / FPS, tuple(range(len(frames))), len(frames), FPS)


@dataclass(frozen=True)
class VideoItem:
    """One question about one video."""

    video: Video
    question: Question

    @property
    def seed(self) -> int:
        return self.video.seed

    def clip(self) -> Clip:
        """The frames, drawn now."""
        return clip_of(draw_video(self.video))


def video_items(count: int, start: int = 1_000_000, split: Split = "test") -> list[VideoItem]:
    """`count` questions on videos of `split` from seed `start` on, the types in turn, one question per video.

    Splits share nothing that is asked about (`Video.atoms`): no thing that goes a way, comes or stands in a place or turns a
    colour, and no code.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: choose one of {', '.join(SPLITS)}")
    kinds = list(KINDS)
    found: list[VideoItem] = []
    while len(found) < count:
        video = make_video(start, split)
        question = ask(video, kinds[len(found) % len(kinds)], np.random.default_rng((9005, SPLITS.index(split), start)))
        if question is not None:
            found.append(VideoItem(video, question))
        start += 1
    return found
