# SPDX-License-Identifier: Apache-2.0
"""Predictions on disk: one file per set of settings, only ever appended to, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from typing_extensions import Self

FORMAT = 1


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of everything that changes answers."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def file_name(settings: Mapping[str, Any]) -> str:
    """task_protocol_plan_fingerprint, without suffix."""
    plan = re.sub(r"[^A-Za-z0-9.=,]+", "-", str(settings["plan"])).strip("-")[:60]
    return "_".join((settings["task"], settings["protocol"], plan, fingerprint(settings)))


class JournalError(ValueError):
    """A predictions file that cannot be gone on with."""


class Journal:
    """The predictions file of one set of settings: a header line, then one line per answer.

    A line is written and forced to the disk whole or, if the process dies in it, torn; opening the file cuts a torn last line
    off. Damage before that, another header and another process at work in the file raise JournalError.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        self.records: dict[str, dict[str, Any]] = {}
        self.repaired = False
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self._lock()
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records, each with its "id", and wait until they are on the disk."""
        for record in records:
            if record["id"] in self.records:
                raise JournalError(f"{self.path} has the answer to {record['id']!r} already")
        self._write([dict(record) for record in records])
        self.records |= {record["id"]: dict(record) for record in records}

    def _write(self, values: Sequence[dict[str, Any]]) -> None:
        data = "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values).encode(
            "utf-8", "surrogatepass"
        )
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise JournalError(f"{self.path}: another process is writing these predictions") from error

    def _read(self) -> None:
        data = self.path.read_bytes()
        lines = data.split(b"\n")
        tail = lines.pop()  # what follows the last line break: nothing, or a torn line
        values = [self._value(line) for line in lines]
        good = len(data) - len(tail)
        if values and values[-1] is None and not tail:  # a hole that a crash of the machine left
            good -= len(lines[len(values) - 1]) + 1
            values.pop()
        if good != len(data):
            os.ftruncate(self._file, good)
            self.repaired = True
        if not values:
            header = {"mmcompress": "predictions", "format": FORMAT, "fingerprint": fingerprint(self.settings)}
            self._write([{**header, "settings": self.settings}])
            return
        for number, value in enumerate(values, 1):
            if value is None or ("id" not in value and number > 1):
                raise JournalError(f"{self.path}, line {number} is damaged: mend it or move the file away")
        header_ = values[0] or {}
        if header_.get("mmcompress") != "predictions" or header_.get("format") != FORMAT:
            raise JournalError(f"{self.path} is not a file of predictions of this version: move it away")
        if header_["fingerprint"] != fingerprint(self.settings):
            theirs = header_.get("settings", {})
            other = sorted(k for k in {*theirs, *self.settings} if theirs.get(k) != self.settings.get(k))
            raise JournalError(
                f"{self.path} has predictions made with other settings ({', '.join(other)}): use another folder"
            )
        for number, value in enumerate(values[1:], 2):
            if value is not None:
                if value["id"] in self.records:
                    raise JournalError(f"{self.path}, line {number}: a second answer to {value['id']!r}")
                self.records[value["id"]] = value

    @staticmethod
    def peek(path: Path) -> dict[str, dict[str, Any]]:
        """The answers in a predictions file, which is left as it is; none if it is not there."""
        if not path.exists():
            return {}
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line break is nothing, or torn
        values = [Journal._value(line) for line in lines]
        if None in values[:-1]:
            raise JournalError(f"{path}, line {values.index(None) + 1} is damaged: mend it or move the file away")
        return {value["id"]: value for value in values if value is not None and "id" in value}

    @staticmethod
    def _value(line: bytes) -> dict[str, Any] | None:
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            return None
        return value if isinstance(value, dict) else None
