# SPDX-License-Identifier: Apache-2.0
"""Predictions on disk: one file per set of settings, only ever appended to, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..records import Lines, RecordError

FORMAT = 1


def fingerprint(settings: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits of everything that changes answers."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def file_name(settings: Mapping[str, Any]) -> str:
    """task_protocol_plan_fingerprint, without suffix."""
    plan = re.sub(r"[^A-Za-z0-9.=,]+", "-", str(settings["plan"])).strip("-")[:60]
    return "_".join((settings["task"], settings["protocol"], plan, fingerprint(settings)))


class Journal(Lines):
    """The predictions file of one set of settings: a header line, then one line per answer.

    Raises RecordError as `Lines` does, and for a file of other settings or with two answers to one question.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        super().__init__(path)
        self.settings, self.records = dict(settings), dict[str, dict[str, Any]]()
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records, each with its "id", and wait until they are on the disk."""
        for record in records:
            if record["id"] in self.records:
                raise RecordError(f"{self.path} has the answer to {record['id']!r} already")
        super().append(records)
        self.records |= {record["id"]: dict(record) for record in records}

    def _check(self) -> None:
        mark = fingerprint(self.settings)
        if not self.values:
            header = {"mmcompress": "predictions", "format": FORMAT, "fingerprint": mark, "settings": self.settings}
            super().append([header])
            return
        header, *answers = self.values
        if header.get("mmcompress") != "predictions" or header.get("format") != FORMAT:
            raise RecordError(f"{self.path} is not a file of predictions of this version: move it away")
        if header["fingerprint"] != mark:
            theirs = header.get("settings", {})
            other = sorted(k for k in {*theirs, *self.settings} if theirs.get(k) != self.settings.get(k))
            raise RecordError(
                f"{self.path} has predictions made with other settings ({', '.join(other)}): use another folder"
            )
        for number, value in enumerate(answers, 2):
            if "id" not in value:
                raise RecordError(f"{self.path}, line {number} is damaged: mend it or move the file away")
            if value["id"] in self.records:
                raise RecordError(f"{self.path}, line {number}: a second answer to {value['id']!r}")
            self.records[value["id"]] = value


def answers_in(path: Path) -> dict[str, dict[str, Any]]:
    """The answers in a predictions file, which is left as it is; none if it is not there."""
    return {value["id"]: value for value in Lines.peek(path) if "id" in value}
