# SPDX-License-Identifier: Apache-2.0
"""Frames of the videos of a request."""

from __future__ import annotations

from typing import Any

_DECODERS = (("torchcodec", "torchcodec"), ("pyav", "av"), ("decord", "decord"), ("opencv", "cv2"))


def read_video(
    video: Any, frames: int, fps: float | None = None, start: float | None = None, end: float | None = None
) -> tuple[Any, Any]:
    """(frames, metadata) of a video file, at most `frames` of them, evenly spread from `start` to `end` in seconds; of frames
    that are there already: the same, without metadata."""
    if not isinstance(video, str):
        return video, None
    import importlib.util

    import numpy as np
    from transformers.video_utils import load_video

    usable = [backend for backend, module in _DECODERS if importlib.util.find_spec(module)]
    if not usable:
        raise ImportError(f"{video}: reading videos needs one of {', '.join(module for _, module in _DECODERS)}")

    def chosen(metadata: Any, **_: Any) -> Any:
        total, rate = metadata.total_num_frames, metadata.fps or 1.0
        first = min(total - 1, round((start or 0.0) * rate))
        last = total - 1 if end is None else max(first, min(total - 1, round(end * rate)))
        most = min(frames, last - first + 1)
        if fps is not None:
            most = min(most, max(1, round((last - first + 1) / rate * fps)))
        return np.linspace(first, last, most).round().astype(int)

    return load_video(video, backend=usable[0], sample_indices_fn=chosen)
