# SPDX-License-Identifier: Apache-2.0
"""A synthetic benchmark of moving scenes: things that go, come and turn another colour, a sign, a last picture."""

from .benchmark import VideoItem, video_items
from .content import Video, make_video
from .frames import contact_sheet, draw_video
from .questions import CHANCE, KINDS, ask

__all__ = [
    "CHANCE",
    "KINDS",
    "Video",
    "VideoItem",
    "ask",
    "contact_sheet",
    "draw_video",
    "make_video",
    "video_items",
]
