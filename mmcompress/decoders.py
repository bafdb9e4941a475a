# SPDX-License-Identifier: Apache-2.0
"""Three libraries that decode video files, behind one form: the time of every frame, and some frames upright in RGB.

PyAV is asked first: it has wheels for every platform, carries FFmpeg with it and names what is wrong with a file. torchcodec
needs FFmpeg on the system; decord has wheels for x86-64 (Linux, Windows, older macOS). All three give the same bits (a test), but
for the last column and row of odd sizes.
"""

from __future__ import annotations

import importlib.util
import io
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

import numpy as np

Source: TypeAlias = "str | bytes"
"""A path, or the bytes of a file."""


class Decoder(Protocol):
    """times: when each frame is shown, float64 [frames], in seconds, in order; rate: frames per second as the file says, or 0."""

    times: np.ndarray
    rate: float

    def __init__(self, source: Source) -> None:
        """Raises NoVideo where the file has no video, and whatever the library raises where it cannot be read."""

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames of these numbers, which rise, uint8 [height, width, 3] each; one is held at a time."""
        ...


class NoVideo(Exception):
    """A file that can be read and has no video in it."""


class PyAV:
    """Looks through the file once without decoding, for times and key frames; then decodes from the key frame before each frame
    that is asked for. Where packets have no times, frames are decoded and counted from the first one on, both times."""

    def __init__(self, source: Source) -> None:
        self.source = source
        with self._open() as container:
            stream = _video_of(container)
            self.rate = float(stream.average_rate or 0)
            packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
            unit = float(stream.time_base or 0)
            pts = [packet.pts for packet in packets]
            keys = [packet.pts for packet in packets if packet.is_keyframe]
        self.counted = not unit or None in pts or len({*pts}) < len(pts)
        if self.counted:
            with self._open() as container:
                times = [frame.time for frame in container.decode(_video_of(container))]
            ordered = None not in times and times == sorted({*times})
            self.times = np.array(times if ordered else np.arange(len(times)) / (self.rate or 1.0), dtype=np.float64)
        else:
            self.pts: list[int] = sorted(pts)
            self.keys: list[int] = sorted(keys)
            self.times = np.array(self.pts, dtype=np.float64) * unit

    def _open(self) -> AbstractContextManager[Any]:
        import av

        return av.open(io.BytesIO(self.source) if isinstance(self.source, bytes) else self.source)  # type: ignore[no-any-return]

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        if self.counted:
            wanted = {*indices}
            with self._open() as container:
                for number, frame in enumerate(container.decode(_video_of(container))):
                    if number in wanted:
                        yield _upright(frame)
            return
        with self._open() as container:
            stream = _video_of(container)
            stream.thread_type = "AUTO"
            frames, at = container.decode(stream), -1 << 62
            for index in indices:
                wanted_pts = self.pts[index]
                place = bisect_right(self.keys, wanted_pts)
                if place and self.keys[place - 1] > at > -1 << 62:
                    container.seek(self.keys[place - 1], stream=stream)
                    frames = container.decode(stream)
                for frame in frames:
                    if frame.pts is not None and frame.pts >= wanted_pts:
                        break
                else:
                    return
                if frame.pts != wanted_pts:
                    return
                at = frame.pts
                yield _upright(frame)


def _video_of(container: Any) -> Any:
    """The first video stream that is not the cover of a piece of music."""
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:
            return stream
    kinds = sorted({stream.type for stream in container.streams})
    raise NoVideo(f"there is only {', '.join(kinds)} in it" if kinds else "there is no stream in it")


def _upright(frame: Any) -> np.ndarray:
    turned = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
    return np.ascontiguousarray(turned)


class TorchCodec:
    """torchcodec in its exact mode. It tells the time of a frame with the frame only, so all are decoded once, a few at a time."""

    AT_ONCE = 16

    def __init__(self, source: Source) -> None:
        from torchcodec.decoders import VideoDecoder

        try:
            self.decoder = VideoDecoder(source, dimension_order="NHWC", seek_mode="exact")
        except ValueError as error:
            raise NoVideo("it finds none") if "video stream" in str(error) else error from error
        self.rate = float(self.decoder.metadata.average_fps or 0)
        count = len(self.decoder)
        parts = [
            self.decoder.get_frames_in_range(first, min(first + self.AT_ONCE, count)).pts_seconds.numpy()
            for first in range(0, count, self.AT_ONCE)
        ]
        self.times = np.concatenate([np.zeros(0), *parts])

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            yield self.decoder.get_frame_at(index).data.numpy()


class Decord:
    """decord, which goes to the key frame before each frame that is asked for."""

    def __init__(self, source: Source) -> None:
        import decord

        try:
            self.reader = decord.VideoReader(io.BytesIO(source) if isinstance(source, bytes) else source)
        except decord.DECORDError as error:
            raise NoVideo("it finds none") if "cannot find video stream" in str(error) else error from error
        self.rate = float(self.reader.get_avg_fps())
        self.times = np.array(self.reader.get_frame_timestamp(range(len(self.reader))), dtype=np.float64)[:, 0].round(6)

    def read(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        for index in indices:
            yield self.reader[index].asnumpy()


DECODERS: dict[str, type[Decoder]] = {"av": PyAV, "torchcodec": TorchCodec, "decord": Decord}
"""By the name of the module, in the order in which they are tried."""


def installed() -> list[str]:
    """Decoders whose module is installed."""
    return [name for name in DECODERS if importlib.util.find_spec(name) is not None]
