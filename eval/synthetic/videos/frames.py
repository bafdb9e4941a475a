# SPDX-License-Identifier: Apache-2.0
"""How the frames of a video are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image, ImageDraw

from ..scenes import SCALE, Thing, background, draw_sign, draw_thing
from .content import SIDE, Actor, Video

NOISE = 2.5
"""Standard deviation of what changes from frame to frame without a meaning, of 255."""


def seen(video: Video, actor: Actor, frame: int) -> Thing | None:
    """The thing as it is in a frame, or None where it is not there."""
    if (actor.does == "last") != (frame >= video.cut) or (actor.does == "comes" and frame < actor.at):
        return None
    if actor.does == "turns" and frame >= actor.at:
        return replace(actor.thing, color=actor.goal)
    (x, y), part = actor.thing.center, frame / max(1, video.cut - 1)
    return replace(actor.thing, center=(x + part * actor.travel[0], y + part * actor.travel[1]))


def sign_seen(video: Video, frame: int) -> bool:
    return video.sign is not None and video.shown[0] <= frame < video.shown[1]


def draw_video(video: Video, only: Sequence[int] | None = None) -> np.ndarray:
    """All frames, or some only, uint8 [frames, SIDE, SIDE, 3]."""
    rng = np.random.default_rng((9002, video.seed))
    grounds = [background(rng, SIDE * SCALE, SIDE * SCALE) for _ in range(1 + (video.cut < video.frames))]
    frames = []
    for number in range(video.frames) if only is None else only:
        frame = grounds[number >= video.cut].copy()
        pen = ImageDraw.Draw(frame)
        for i, actor in enumerate(video.actors):
            thing = seen(video, actor, number)
            if thing is not None:
                draw_thing(pen, thing, np.random.default_rng((9003, video.seed, i)))
        if video.sign is not None and sign_seen(video, number):
            draw_sign(pen, video.sign, np.random.default_rng((9004, video.seed)))
        frames.append(np.asarray(frame.reduce(SCALE)))
    noise = rng.standard_normal((len(frames), SIDE, SIDE, 1), dtype=np.float32) * NOISE
    return (np.stack(frames) + noise).round().clip(0, 255).astype(np.uint8)


def contact_sheet(video: Video, larger: int = 3) -> Image.Image:
    """All frames beside one another, each `larger` times as large."""
    row = np.concatenate(list(draw_video(video)), 1)
    return Image.fromarray(row.repeat(larger, 0).repeat(larger, 1))
