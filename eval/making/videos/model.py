# SPDX-License-Identifier: Apache-2.0
"""The model that watches videos: a Qwen3-VL of the sizes of `qwen3-vl-shapes`, which it starts from."""

from __future__ import annotations

from typing import Any, ClassVar

from ...synthetic.videos.content import DIRECTIONS, LENGTHS, PARTS, SIDE
from ..families import Qwen3VL, take_over
from ..model import CHAT_TEMPLATE, WORDS, make_tokenizer

_ASKED = "which way go comes come first last turns turn another when"
_SECONDS = (*(f"<{second}" for second in range(10)), *map(str, range(10)), "seconds>")
"""Qwen3-VL writes the time before each pair of frames: <3.2 seconds>."""
_LIKE = {
    "up": "top",
    "down": "bottom",
    "first": "left",
    "last": "right",
    "turns": "color",
    "turn": "color",
    "go": "where",
}
"""Words of the model of shapes from whose vectors new ones start."""


class Watcher(Qwen3VL):
    """Qwen3-VL for videos of 12 or 16 frames of 48 x 48 pixels: 216 or 288 visual tokens."""

    name = "qwen3-vl-video"
    video: ClassVar = "<|video_pad|>"
    """The processor writes marks around every pair of frames; transformers 5.24 would keep others around the whole."""

    def make_tokenizer(self) -> Any:
        words = dict.fromkeys([*WORDS, *_ASKED.split(), *DIRECTIONS, *PARTS, *_SECONDS])
        return make_tokenizer(tuple(words), **self.special)

    def make_processor(self) -> Any:
        processor = super().make_processor()
        videos = processor.video_processor
        videos.size = {"shortest_edge": 32**2, "longest_edge": max(LENGTHS) * SIDE**2}
        videos.cap_pixels_per_frame = False
        videos.num_frames, videos.fps = None, 2
        return processor

    def chat_template(self) -> str:
        before = "{% else %}{{ part['text'] + ' ' }}"
        assert before in CHAT_TEMPLATE
        video = "{% elif part['type'] == 'video' %}{{ '" + self.video + " ' }}" + before
        return CHAT_TEMPLATE.replace("<image>", self.image).replace(before, video)

    def make_model(self, tokenizer: Any) -> Any:
        """A model with all that the embedded model of shapes knows, and vectors for the new words."""
        model = super().make_model(tokenizer)
        take_over(model, tokenizer, like=_LIKE)
        return model
