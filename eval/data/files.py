# SPDX-License-Identifier: Apache-2.0
"""Files and folders of a benchmark on disk: finding them, telling splits and shards apart, and saying what is missing."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import unquote

from .tables import TABLES, is_table

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_DEPTH = 5
_SHARD = re.compile(r"(.+?)[-_.](\d+)-of-(\d+)(?:-[0-9a-f]+)?")
_SIGNATURE = re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF|BM|II\*\0|MM\0\*|P[4-6]\s|.{4}(ftyp|jP  )", re.DOTALL)


def is_split(name: str, split: str) -> bool:
    """Whether a file's name says that it is of a split: the word itself, perhaps with a year (val2014), between other words;
    "test" is neither testdev nor test-dev."""
    return re.search(rf"(?:^|[_. ]){re.escape(split)}\d*(?:$|[_. ])", name, re.IGNORECASE) is not None


@dataclass(frozen=True)
class Part:
    """The files of one table, several if it comes in shards. name: the split, say."""

    name: str
    folder: Path
    paths: tuple[Path, ...]
    sharded: bool

    def of(self, split: str) -> bool:
        return self.name.lower() == split.lower() or (not self.sharded and is_split(self.name, split))


def parts(paths: Sequence[Path]) -> list[Part]:
    """Tables of which the files are shards (NAME-00000-of-00003, or 0000, 0001, ... in a folder NAME) or the whole. Raises
    ValueError if a shard is missing or there twice."""
    found: dict[tuple[Path, str, str], dict[int, list[Path]]] = {}
    sizes: dict[tuple[Path, str, str], set[int]] = {}
    for path in paths:
        shard = _SHARD.fullmatch(path.stem)
        number = path.stem.isdigit() and len(path.stem) > 3
        name = shard[1] if shard else path.parent.name if number else path.stem
        key = (path.parent, name, path.suffix.lower() if shard or number else path.name)
        found.setdefault(key, {}).setdefault(int(shard[2] if shard else path.stem if number else 0), []).append(path)
        sizes.setdefault(key, set()).add(int(shard[3]) if shard else 0)
    made = []
    for (folder, name, kind), shards in found.items():
        size = max(sizes[folder, name, kind])
        twice = [path.name for same in shards.values() for path in same[1:]]
        first = min(shards) if size and min(shards) == 1 and max(shards) == size else 0
        missing = sorted(set(range(first, first + (size or max(shards) + 1))) - set(shards))
        if twice or len(sizes[folder, name, kind]) > 1 or missing:
            extra = f"{twice[0]} is one too many" if twice else "the names tell of different numbers of shards"
            what = f"shard {missing[0]:05d} is missing" if missing else extra
            raise ValueError(
                f"{folder}: of {name}, {what} (there are {_names([p for same in shards.values() for p in same])}); a part would "
                "count as the whole. To ask a part on purpose, copy it under a name of its own"
            )
        made.append(Part(name, folder, tuple(shards[i][0] for i in sorted(shards)), bool(size)))
    return made


def choose(what: str, found: Sequence[Part], split: str | None, root: Path) -> Part:
    """The one table that is meant. Raises ValueError that lists them if several may be."""
    if split:
        exact = [part for part in found if part.name.lower() == split.lower()]
        matching = exact or [part for part in found if part.of(split)]
    else:
        matching = list(found)
    if not matching:
        there = ", ".join(dict.fromkeys(part.name for part in found)) or "no table"
        raise ValueError(f"{root}: no questions of {what} for --split {split}: there are {there}; or give --data FILE")
    if len(matching) > 1:
        named = ", ".join(str(part.paths[0].relative_to(root)) for part in matching[:8])
        raise ValueError(f"{root}: several tables of {what}, say which by --data FILE or --split: {named}")
    return matching[0]


class Folder:
    """A folder of a benchmark, or one file of it with what lies beside; walked once, five levels deep."""

    def __init__(self, data: Path) -> None:
        if not data.exists():
            raise ValueError(f"--data {data}: no such file or folder")
        self.file = data if data.is_file() else None
        self.root = data.parent if self.file else data
        self.files: list[Path] = []
        self.folders: list[Path] = [self.root]
        for here, folders, names in os.walk(self.root, followlinks=True):
            depth = len(Path(here).relative_to(self.root).parts)
            folders[:] = sorted(name for name in folders if not name.startswith(".")) if depth < _DEPTH else []
            self.folders += [Path(here) / name for name in folders]
            self.files += [Path(here) / name for name in sorted(names) if not name.lower().endswith(PICTURES)]

    def matching(self, *patterns: str) -> list[Path]:
        """Files whose name matches one of the patterns (whatever the case), in the order of the patterns."""
        return [path for pattern in patterns for path in self.files if fnmatch(path.name.lower(), pattern.lower())]

    def main(self, what: str, patterns: Sequence[str], split: str | None = None) -> Path:
        """The file with the questions: the one that was given, else the one that matches the first pattern that any does, with
        `split` in its name."""
        found: list[Path] = []
        for pattern in patterns:
            found = found or [
                path
                for path in self.matching(pattern)
                if path == (self.file or path) and (split is None or is_split(path.stem, split))
            ]
        if not found:
            wanted = " or ".join(patterns) + (f" with {split!r} in its name" if split else "")
            raise ValueError(
                f"{self.file or self.root}: no questions of {what}: looked for {wanted}, found {self.inventory()}. "
                "Other tables (.jsonl, .csv, .tsv, .parquet with columns question, answer, image) are given as --data FILE"
            )
        if len(found) > 1:
            raise ValueError(
                f"{self.root}: several files of {what}, say which by --data FILE or --split: {_names(found)}"
            )
        return found[0]

    def other(self, what: str, *patterns: str) -> Path:
        """Another file that the layout needs."""
        found = self.matching(*patterns)
        if not found:
            raise ValueError(f"{self.root}: {what} is missing: looked for {' or '.join(patterns)}")
        return found[0]

    def tables(self, what: str) -> list[Part]:
        """The file that was given; else Parquet files, wherever they are; else tables in the folder itself."""
        if self.file:
            beside = [path for path in self.files if path.parent == self.root and is_table(path)]
            if not is_table(self.file):
                raise ValueError(f"{self.file}: no table of questions of {what}: can read {', '.join(TABLES)}")
            own = next(part for part in parts([p for p in beside if _kin(p, self.file)]) if self.file in part.paths)
            if len(own.paths) > 1:
                raise ValueError(
                    f"{self.file} is one of {len(own.paths)} shards: give the folder (and --split {own.name}), or copy it under a "
                    "name of its own to ask this part alone"
                )
            return [own]
        hub = self.matching("*.parquet")
        return parts(hub or [path for path in self.files if path.parent == self.root and is_table(path)])

    def inventory(self) -> str:
        """A few names of what is there."""
        return _names(self.files) if self.files else "no files but pictures" if any(self.root.iterdir()) else "nothing"


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")


def _kin(path: Path, other: Path) -> bool:
    """Whether two files may be shards of one table."""
    shards = _SHARD.fullmatch(path.stem), _SHARD.fullmatch(other.stem)
    return path == other or (None not in shards and shards[0][1] == shards[1][1])  # type: ignore[index]


class Images:
    """Finds pictures by name in a few folders, and remembers those that are missing.

    Looks in `given` alone if the user names a folder; else in the folder of the data, in those below it that are called like
    one of `names`, and in the folder itself.
    """

    kind, option = "pictures", "--images"

    def __init__(self, folder: Folder, given: Path | None, *names: str) -> None:
        if given is not None and not given.is_dir():
            raise ValueError(f"{self.option} {given}: no such folder")
        below = [
            path
            for name in names
            for path in folder.folders
            if path.parts[-len(Path(name).parts) :] == Path(name).parts
        ]
        self.roots = [given] if given else list(dict.fromkeys([*below, folder.root]))
        self.missing: list[tuple[str, str]] = []
        self.wanted = 0
        self._known: dict[str, Path] = {}
        self._decoded: dict[str, bytes | None] = {}

    def find(self, *names: str, place: str = "") -> Path:
        """The first of the names (of one picture) that is in one of the folders. place: of the row that wants it."""
        if names[0] not in self._known:
            self.wanted += 1
            found = next((root / name for name in names for root in self.roots if self._is(root / name)), None)
            if found is None:
                self.missing.append((names[0], place))
            self._known[names[0]] = found or self.roots[0] / names[0]
        return self._known[names[0]]

    def _is(self, path: Path) -> bool:
        return _is_file(path)

    def decoded(self, text: str) -> bytes | None:
        """`from_base64`, once for each text."""
        if text not in self._decoded:
            self._decoded[text] = from_base64(text)
        return self._decoded[text]

    def check(self) -> None:
        """Raises ValueError if a picture was not found."""
        if self.missing:
            shown: Iterable[Path] = self.roots[:4]
            name, place = self.missing[0]
            raise ValueError(
                f"{len(self.missing)} of {self.wanted} {self.kind} are missing, the first is {name[:200]!r} ({place}): looked in "
                f"{', '.join(map(str, shown))}; say where they are by {self.option} FOLDER"
            )


class Videos(Images):
    """The same for videos: files, or folders of frames."""

    kind, option = "videos", "--videos"

    def _is(self, path: Path) -> bool:
        return _is_file(path) or os.path.isdir(path)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        return False


def is_picture(content: bytes) -> bool:
    """Whether bytes begin like a picture: PNG, JPEG, GIF, WebP, BMP, TIFF, PNM, AVIF, HEIF or JPEG 2000."""
    return _SIGNATURE.match(content) is not None


def from_base64(text: str) -> bytes | None:
    """The bytes of a picture in base64, plain or URL-safe, wrapped or without padding, or in a data URI; None for other texts.

    It is told from a path by what it decodes to: the first bytes of a picture.
    """
    uri = re.match(r"data:[^,]{0,100};base64,", text)
    if uri:
        text = unquote(text[uri.end() :])
    packed = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    if len(packed) < 16 or not re.fullmatch("[A-Za-z0-9+/]+", packed):
        return None
    try:
        found = base64.b64decode(packed + "=" * (-len(packed) % 4), validate=True)
    except binascii.Error:
        return None
    return found if uri or is_picture(found) else None
