# SPDX-License-Identifier: Apache-2.0
"""Files and folders of a benchmark on disk: finding them, reading tables, and saying what is missing."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".json")
_DEPTH = 5


def load_json(path: Path) -> Any:
    """The content of a JSON file; a list if each line is one value. Raises ValueError that names the file and the line."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise ValueError(f"{path} is empty")
    if path.suffix != ".jsonl":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise ValueError(f"{path} is not JSON: {error}") from error
    values = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
    return values


def load_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl, .json (a list of objects), .csv, .tsv or .parquet file."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install 'mmcompress[eval]'") from error
        rows = parquet.read_table(path).to_pylist()
    elif path.suffix in (".csv", ".tsv"):
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # pictures in base64
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
    elif path.suffix in (".json", ".jsonl"):
        rows = load_json(path)
        if isinstance(rows, dict):
            lists = [value for value in rows.values() if isinstance(value, list)]
            if len(lists) != 1:
                raise ValueError(
                    f"{path}: expected a list of questions, found an object with {', '.join(list(rows)[:8])}"
                )
            rows = lists[0]
    else:
        raise ValueError(f"{path}: can read {', '.join(TABLES)}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: expected a list of objects, one for each question")
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def need(row: dict[str, Any], key: str, path: Path, number: int) -> Any:
    """row[key], or an error that says what the row has instead."""
    if row.get(key) is None:
        raise ValueError(f"{path}, row {number}: no {key!r} in it; it has {', '.join(row)}")
    return row[key]


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
        """Files whose name matches one of the patterns, in the order of the patterns."""
        return [path for pattern in patterns for path in self.files if fnmatch(path.name, pattern)]

    def main(self, what: str, patterns: Sequence[str], split: str | None = None) -> Path:
        """The file with the questions: the one that was given, else the one that matches the first pattern that any does, with
        `split` in its name."""
        found: list[Path] = []
        for pattern in patterns:
            found = found or [
                path
                for path in self.matching(pattern)
                if path == (self.file or path) and (split is None or split in path.name)
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

    def inventory(self) -> str:
        """A few names of what is there."""
        return _names(self.files) if self.files else "no files but pictures" if any(self.root.iterdir()) else "nothing"


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths[:6]) + (f" and {len(paths) - 6} more" if len(paths) > 6 else "")


class Images:
    """Finds pictures by name in a few folders, and remembers those that are missing.

    Looks in `given` alone if the user names a folder; else in the folder of the data, in those below it that are called like
    one of `names`, and in the folder itself.
    """

    def __init__(self, folder: Folder, given: Path | None, *names: str) -> None:
        if given is not None and not given.is_dir():
            raise ValueError(f"--images {given}: no such folder")
        below = [
            path
            for name in names
            for path in folder.folders
            if path.parts[-len(Path(name).parts) :] == Path(name).parts
        ]
        self.roots = [given] if given else list(dict.fromkeys([*below, folder.root]))
        self.missing: list[str] = []
        self.wanted = 0
        self._known: dict[str, Path] = {}

    def find(self, *names: str) -> Path:
        """The first of the names (of one picture) that is in one of the folders."""
        if names[0] not in self._known:
            self.wanted += 1
            found = next((root / name for name in names for root in self.roots if (root / name).is_file()), None)
            if found is None:
                self.missing.append(names[0])
            self._known[names[0]] = found or self.roots[0] / names[0]
        return self._known[names[0]]

    def check(self) -> None:
        """Raises ValueError if a picture was not found."""
        if self.missing:
            shown: Iterable[Path] = self.roots[:4]
            raise ValueError(
                f"{len(self.missing)} of {self.wanted} pictures are missing, the first is {self.missing[0]!r}: looked in "
                f"{', '.join(map(str, shown))}; say where they are by --images FOLDER"
            )
