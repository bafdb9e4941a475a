# SPDX-License-Identifier: Apache-2.0
"""The video of a question: a file or a folder of frames, a part of it perhaps, and what is said in it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ...videos import Clip, VideoError, choose, read_video, shown_times
from .files import PICTURES
from .tables import read_json, read_text

FRAMES = 32
"""Frames of a video where nobody says how many; lmms-eval has the same."""


@dataclass(frozen=True)
class Showing:
    """How videos are shown. frames: at most so many, evenly spread over time; subtitles: what is said while they are shown is put
    before the question, where a benchmark has subtitles."""

    frames: int = FRAMES
    subtitles: bool = False

    def __post_init__(self) -> None:
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: at least 1")


@dataclass(frozen=True)
class Film:
    """A video that is read when its turn comes.

    path: a file, or a folder of pictures that are `rate` frames per second; start, end: the part that is asked about, in seconds;
    subtitles: their file (.srt, or .json of LongVideoBench), in which the video begins at `offset` seconds.
    """

    path: Path
    frames: int = FRAMES
    start: float | None = None
    end: float | None = None
    rate: float = 3.0
    subtitles: Path | None = None
    offset: float = 0.0

    def __call__(self) -> Clip:
        """Its frames. Raises VideoError as `read_video`."""
        if not self.path.is_dir():
            return read_video(self.path, most=self.frames, start=self.start, end=self.end)
        pictures, times, chosen = self._folder()
        clip = read_video([pictures[i] for i in chosen], name=str(self.path))
        return replace(clip, times=times[chosen], indices=tuple(chosen.tolist()), total=len(pictures), rate=self.rate)

    def _folder(self) -> tuple[list[Path], np.ndarray, np.ndarray]:
        pictures = sorted(path for path in self.path.iterdir() if path.suffix.lower() in PICTURES)
        if not pictures:
            raise VideoError(f"{self.path}: a folder without pictures; its frames are needed, or a file of the video")
        times = np.arange(len(pictures)) / self.rate
        return pictures, times, choose(times, None, None, self.frames, self.start, self.end, str(self.path))

    def said(self) -> str:
        """The lines of its subtitles that are to be read while a frame is shown, each once. Looks through the file for the times
        of its frames. Raises VideoError as `read_video`, ValueError for subtitles that cannot be read."""
        if self.subtitles is None:
            return ""
        times = _times(self) + self.offset
        return "\n".join(
            text for start, end, text in spoken(self.subtitles) if ((times >= start) & (times <= end)).any()
        )

    @property
    def words(self) -> list[str]:
        """What changes if the video or how it is shown does, without where it lies."""
        sizes = [
            self.path.stat().st_size if self.path.is_file() else "",
            self.frames,
            self.start,
            self.end,
            self.offset,
        ]
        return [self.path.name, *map(str, sizes), self.subtitles.name if self.subtitles else ""]


@lru_cache(4096)
def _times(film: Film) -> np.ndarray:
    if film.path.is_dir():
        _, times, chosen = film._folder()
        return times[chosen]
    return shown_times(film.path, most=film.frames, start=film.start, end=film.end)


@lru_cache(256)
def spoken(path: Path) -> tuple[tuple[float, float, str], ...]:
    """(start, end, text) of each line of a file of subtitles, in seconds. Raises ValueError that names file and line."""
    return tuple(_objects(path) if path.suffix.lower() == ".json" else _srt(path))


def _srt(path: Path) -> list[tuple[float, float, str]]:
    found = []
    for block in re.split(r"\n\s*\n", read_text(path).replace("\r\n", "\n").strip()):
        lines = block.split("\n")
        at = next((i for i, line in enumerate(lines) if "-->" in line), None)
        if at is None:
            raise ValueError(f"{path}: subtitles without a line 'START --> END': {block[:60]!r}")
        start, end = (_seconds(time.split()[0] if time.strip() else "", path) for time in lines[at].split("-->")[:2])
        if text := re.sub("<[^>]+>", "", " ".join(lines[at + 1 :])).strip():
            found.append((start, end, text))
    return found


def _objects(path: Path) -> list[tuple[float, float, str]]:
    entries, found = read_json(path), []
    for number, entry in enumerate(entries if isinstance(entries, list) else [None], 1):
        times: Any = entry.get("timestamp", (entry.get("start"), entry.get("end"))) if isinstance(entry, dict) else None
        if not isinstance(times, Sequence) or len(times) != 2 or None in times[:1]:
            raise ValueError(
                f"{path}, row {number}: start, end, line or timestamp, text is needed, got {json.dumps(entry)[:60]}"
            )
        start = _seconds(times[0], path)
        end = start + 1 if times[1] is None else _seconds(times[1], path)  # the last line may be open
        if text := str(entry.get("text", entry.get("line", ""))).strip():
            found.append((start, end, text))
    return found


def _seconds(value: Any, path: Path) -> float:
    """Seconds, or HOURS:MINUTES:SECONDS with a point or a comma."""
    try:
        parts = [float(part) for part in str(value).replace(",", ".").split(":")]
    except ValueError:
        raise ValueError(f"{path}: {value!r} is no time: 00:01:02.5 or seconds are needed") from None
    return sum(part * 60**i for i, part in enumerate(reversed(parts)))
