# SPDX-License-Identifier: Apache-2.0
"""Reading videos: whatever a video comes as, the same frames with their true times at every entrance."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from PIL import Image

from .decoders import DECODERS, Decoder, NoVideo, installed
from .pictures import open_picture

VideoSource: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | np.ndarray | Sequence[Any]"
"""A path, the bytes of a file, a file opened for reading bytes, or frames: an array or tensor (uint8 [frames, height, width, 3] or
[frames, 3, height, width]) or a list of pictures."""
INSTALL = "pip install 'mmcompress[video]' brings PyAV; torchcodec and decord are taken too"


class VideoError(ValueError):
    """A video that cannot be read."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of a video, upright and in RGB.

    frames   uint8 [n, height, width, 3].
    times    when each is shown, float64 [n], in seconds from the first frame of the video on; None if nothing says so.
    indices  their numbers in the video.
    total    how many frames the video has.
    rate     frames per second of the video on average; None if nothing says so.
    """

    frames: np.ndarray
    times: np.ndarray | None
    indices: tuple[int, ...]
    total: int
    rate: float | None = None

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def pictures(self) -> list[Image.Image]:
        return [Image.fromarray(frame) for frame in self.frames]

    @property
    def span(self) -> str:
        """From when to when."""
        return (
            "at times that nothing tells"
            if self.times is None
            else f"from {self.times[0]:.1f} to {self.times[-1]:.1f} s"
        )

    def at_least(self, count: int) -> Clip:
        """With its last frame again until there are so many."""
        more = [len(self) - 1] * (count - len(self))
        if not more:
            return self
        rows = [*range(len(self)), *more]
        times = None if self.times is None else self.times[rows]
        return replace(self, frames=self.frames[rows], times=times, indices=tuple(self.indices[row] for row in rows))

    def metadata(self) -> dict[str, Any] | None:
        """What processors of transformers take as `video_metadata`, None without times. They know a time as index / fps: where the
        rate varies, indices are such that this is the true time, and no integers."""
        if self.times is None or not self.rate:
            return None
        places = self.times * self.rate
        steady = np.abs(places - np.array(self.indices)).max(initial=0.0) < 0.05
        return {
            "total_num_frames": self.total,
            "fps": self.rate,
            "duration": self.total / self.rate,
            "height": self.frames.shape[1],
            "width": self.frames.shape[2],
            "frames_indices": list(self.indices) if steady else places.tolist(),
        }


def read_video(
    source: VideoSource,
    frames: int | None = None,
    fps: float | None = None,
    *,
    most: int | None = None,
    start: float | None = None,
    end: float | None = None,
    decoder: str | None = None,
    name: str = "",
) -> Clip:
    """Frames of a video, evenly spread over its time; all of them unless told.

    frames      exactly so many, of the file or of the frames given.
    fps         as many as this rate makes of the length, at least one and at most all.
    most        at most so many, whatever `fps` says.
    start, end  only what is shown between these seconds; beyond the end it is the last frame.
    decoder     one of `decoders.DECODERS`; the first that is installed and loads by default.
    name        what errors call it; by default its path or what it is.

    The whole file is looked through, and only frames that are asked for are held. Raises VideoError (a ValueError) that names the
    video and says why it cannot be read; ValueError for more frames than there are and for counts that mean nothing; TypeError
    for what is no video; ImportError without a decoder.
    """
    name = name or _name(source)
    for what, value in (("frames", frames), ("most", most)):
        if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
            raise ValueError(f"{what}={value}: give a count of at least 1")
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"fps={fps}: give frames per second above 0")
    if frames is not None and (fps is not None or most is not None):
        raise ValueError(
            f"frames={frames} is an exact count: leave out fps and most, or give most={frames} for a limit"
        )
    if decoder is not None and decoder not in DECODERS:
        raise ValueError(f"decoder={decoder!r}: choose one of {', '.join(DECODERS)}")
    kept = _held(source, name)
    if kept is not None:
        if fps is not None or start is not None or end is not None:
            raise ValueError(
                f"{name}: frames without a file have no times: choose by frames= or most=, not fps, start or end"
            )
        chosen = choose(np.arange(len(kept), dtype=np.float64), frames, None, most, None, None, name)
        return Clip(kept[chosen], None, tuple(chosen.tolist()), len(kept))
    reader, times = _indexed(source, decoder, name)
    rate = (len(times) - 1) / times[-1] if len(times) > 1 and times[-1] > 0 else reader.rate or 1.0
    chosen = choose(times, frames, fps, most, start, end, name)
    read: list[np.ndarray] = []
    try:
        read.extend(reader.read(chosen.tolist()))
    except Exception as error:  # decoders meet foreign bytes: they raise whatever they stumble over
        raise VideoError(_damaged(name, times[chosen[len(read)]], error)) from error
    if len(read) < len(chosen):
        raise VideoError(_damaged(name, times[chosen[len(read)]], None))
    if len({frame.shape for frame in read}) > 1:
        raise VideoError(f"{name}: its frames change their size on the way; cut it into parts of one size")
    return Clip(np.stack(read), times[chosen], tuple(chosen.tolist()), len(times), float(rate))


def shown_times(
    source: VideoSource, *, most: int | None = None, start: float | None = None, end: float | None = None
) -> np.ndarray:
    """When the frames that `read_video` chooses are shown, float64 [n], in seconds; nothing is decoded. Raises as it does."""
    name = _name(source)
    _, times = _indexed(source, None, name)
    return times[choose(times, None, None, most, start, end, name)]


def video_arguments(processor: Any, clips: Sequence[Clip]) -> dict[str, Any]:
    """What a processor of transformers takes for videos whose frames are chosen: frames, not to be sampled again, and their times.

    An encoder that merges frames in pairs needs a pair: the frame of a video of one is shown twice. Raises NotImplementedError for
    a processor without videos.
    """
    if not clips:
        return {}
    videos = getattr(processor, "video_processor", None)
    if videos is None:
        raise NotImplementedError(f"{type(processor).__name__} takes no videos: choose another checkpoint")
    least = getattr(videos, "temporal_patch_size", None) or 1
    clips = [clip.at_least(least) for clip in clips]
    found: dict[str, Any] = {"videos": [clip.frames for clip in clips], "do_sample_frames": False}
    metadata = [clip.metadata() for clip in clips]
    return found | ({"video_metadata": metadata} if None not in metadata else {})


def check_frames(plan: Any, model: Any, inputs: Any) -> None:
    """Raises ValueError if what a plan keeps of a video before the LLM is less than a token for each frame as the encoder makes
    them. inputs: of one video; families that take frames as pictures give each a budget of its own."""
    grids, token = inputs.get("video_grid_thw"), getattr(model.config, "video_token_id", None)
    if "pixel_values_videos" not in inputs or token is None:
        return
    frames = int(grids[:, 0].sum()) if grids is not None else inputs["pixel_values_videos"].shape[1]
    tokens = left = int((inputs["input_ids"] == token).sum())
    for stage in plan.input_stages:
        if "video" in stage.modalities:
            left = stage.budget(left)
            if left < frames:
                raise ValueError(
                    f"{stage!r} leaves {left} of {tokens} tokens for {frames} frames: keep at least {frames} "
                    f"({100 * frames / tokens:.2g}%), or show fewer frames"
                )


def choose(
    times: np.ndarray,
    frames: int | None,
    fps: float | None,
    most: int | None,
    start: float | None,
    end: float | None,
    name: str = "the video",
) -> np.ndarray:
    """Numbers of the frames to read, int64, rising: evenly spread over time, as `read_video` says. times: of all frames."""
    after = len(times) - 1
    first = 0 if start is None else min(after, max(0, int(np.searchsorted(times, start + 1e-6)) - 1))
    if start is not None and first < after and times[first + 1] <= start + 1e-6:
        first += 1
    last = after if end is None else max(first, int(np.searchsorted(times, end + 1e-6)) - 1)
    there = last - first + 1
    if frames is not None and frames > there:
        raise ValueError(
            f"frames={frames}: {name} has {there}{' there' if there < len(times) else ''}; ask for at most so many"
        )
    count = frames if frames is not None else there
    if fps is not None:
        step = (times[-1] - times[0]) / max(1, after)
        count = min(there, max(1, round((times[last] - times[first] + step) * fps)))
    count = min(count, most or count)
    wanted = np.linspace(times[first], times[last], count)
    places = np.interp(wanted, times[first : last + 1], np.arange(first, last + 1))
    numbers = np.round(places.round(3)).astype(np.int64)
    steps = np.arange(count)  # each frame once, however close together they are
    numbers = np.maximum.accumulate(numbers - steps) + steps
    return np.minimum(numbers, last - steps[::-1])


def _indexed(source: Any, decoder: str | None, name: str) -> tuple[Decoder, np.ndarray]:
    """A file that is looked through, and when its frames are shown, from the first one on."""
    reader = _open(source, decoder, name)
    if not len(reader.times):
        raise VideoError(f"{name}: there is no frame in it")
    return reader, reader.times - reader.times[0]


def _open(source: Any, decoder: str | None, name: str) -> Decoder:
    """The file in the first decoder that loads."""
    there = installed()
    if decoder is not None and decoder not in there:
        raise ImportError(f"decoder={decoder!r} is not installed (pip install {decoder})")
    if not there:
        raise ImportError(f"{name}: no decoder of videos is installed; {INSTALL}")
    source = _file(source, name)
    missing: dict[str, str] = {}
    for one in [decoder] if decoder else there:
        try:
            return DECODERS[one](source)
        except NoVideo as error:
            raise VideoError(f"{name} has no video stream: {error}") from error
        except (ImportError, RuntimeError) as error:
            if not isinstance(error, ImportError) and "libtorchcodec" not in str(error):
                raise VideoError(_unreadable(name, error)) from error
            missing[one] = str(error).strip().splitlines()[0]
        except Exception as error:  # as above
            raise VideoError(_unreadable(name, error)) from error
    told = "; ".join(f"{one}: {why}" for one, why in missing.items())
    raise ImportError(f"{name}: no decoder of videos loads ({told}); {INSTALL}")


def _file(source: Any, name: str) -> str | bytes:
    """Path or bytes, if there is anything."""
    if hasattr(source, "read"):
        source = source.read()
    if isinstance(source, (bytes, bytearray, memoryview)):
        if not len(source):
            raise VideoError(f"{name} is not a readable video (it is empty)")
        return bytes(source)
    path = str(source)
    if re.match(r"\w+://", path):
        raise VideoError(f"{name} is an address: videos are not fetched; store it as a file, or give its bytes")
    if os.path.isdir(path):
        raise VideoError(f"{name}: a folder; give a video in it")
    if not os.path.exists(path):
        raise VideoError(f"{name}: no such file")
    if not os.path.getsize(path) and os.path.isfile(path):
        raise VideoError(f"{name} is not a readable video (the file is empty)")
    return str(Path(path))


def _held(source: Any, name: str) -> np.ndarray | None:
    """Frames that are there already, uint8 [frames, height, width, 3]; None for a file."""
    if isinstance(source, (str, os.PathLike, bytes, bytearray, memoryview)) or hasattr(source, "read"):
        return None
    if hasattr(source, "ndim"):
        values = np.asarray(source.detach().cpu() if hasattr(source, "detach") else source)
        if values.ndim == 4 and values.shape[1] == 3 and values.shape[3] != 3:
            values = values.transpose(0, 2, 3, 1)
        if values.ndim != 4 or values.shape[3] != 3 or not values.size or values.dtype != np.uint8:
            raise VideoError(
                f"{name} of shape {values.shape} and type {values.dtype}: give uint8 [frames, height, width, 3] or "
                f"[frames, 3, height, width]"
            )
        return values
    if not isinstance(source, Sequence):
        raise TypeError(f"a video of type {type(source).__name__}: give a path, bytes, an array or a list of pictures")
    pictures = [np.asarray(open_picture(one)) for one in source]
    if not pictures:
        raise VideoError(f"{name}: an empty list; give at least one frame")
    if len({picture.shape for picture in pictures}) > 1:
        sizes = sorted({f"{picture.shape[1]}x{picture.shape[0]}" for picture in pictures})
        raise VideoError(f"{name}: frames of different sizes ({', '.join(sizes)}); the frames of a video have one size")
    return np.stack(pictures)


def _name(source: Any) -> str:
    """What an error calls a video."""
    if isinstance(source, (str, os.PathLike)):
        return str(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"a video of {len(source)} bytes"
    return str(getattr(source, "name", "") or "a video")


def _unreadable(name: str, error: Exception) -> str:
    said = str(error).strip().splitlines()
    return f"{name} is not a readable video ({said[0][:200] if said else type(error).__name__})"


def _damaged(name: str, seconds: float, error: Exception | None) -> str:
    said = str(error).strip().splitlines() if error is not None else []
    return f"{name}: its frame at {seconds:.2f} s cannot be decoded{f' ({said[0][:200]})' if said else ''}; the file is damaged"
