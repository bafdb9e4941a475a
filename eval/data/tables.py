# SPDX-License-Identifier: Apache-2.0
"""Files of rows, read strictly: what is not well-formed raises ValueError that names file and row."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .rows import Row, Twice, canonical

TABLES = (".jsonl", ".csv", ".tsv", ".parquet", ".json")


def is_table(path: Path) -> bool:
    return path.suffix.lower() in TABLES


def check_file(path: Path) -> None:
    """Raises ValueError for no file, an empty one, one that may not be read, and a pointer of Git LFS."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(128)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not head:
        raise ValueError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of Git LFS, not the file: fetch it by 'git lfs pull'")


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises ValueError that names the encoding it seems to have, and the line."""
    check_file(path)
    content = path.read_bytes()
    if not content.strip():
        raise ValueError(f"{path} is empty")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} is UTF-16 or UTF-32 (Excel's 'Unicode text'): save it as UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line} is not UTF-8 (byte 0x{error.object[error.start]:02x}; Windows' own encoding?): save it as UTF-8"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line}: a NUL byte: the file is damaged, or not UTF-8")
    return text


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    twice = Twice(found)
    names = [name for name, _ in pairs]
    twice.key = next(name for name in names if names.count(name) > 1)
    return twice


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _parse(text: str, where: str, whole: bool = False) -> Any:
    try:
        return _decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}{_broken(text) if whole else ''} is not JSON: {error}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; a list if each line is one value."""
    text = read_text(path)
    values = _lines(path, text) if path.suffix.lower() == ".jsonl" or _many(text) else None
    return [value for _, value in values] if values is not None else _parse(text, str(path), whole=True)


def _many(text: str) -> bool:
    """Whether a text is objects on lines of their own rather than one value."""
    first, _, rest = text.strip().partition("\n")
    try:
        return bool(rest) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _broken(text: str) -> str:
    """Which entry of the first list in a text cannot be read, as ", row N"."""
    at, number = text.find("[") + 1, 0
    try:
        while at:
            number += 1
            _, end = _decoder.raw_decode(text, _space(text, at))
            at = _space(text, end) + 1
            if text[at - 1 : at] != ",":
                return "" if text[at - 1 : at] == "]" else f", row {number}"
    except (ValueError, RecursionError):
        return f", row {number}"
    return ""


def _space(text: str, at: int) -> int:
    while text[at : at + 1].isspace():
        at += 1
    return at


def _lines(path: Path, text: str) -> list[tuple[str, Any]]:
    """(place, value) of each line that has one. Lines end at line feeds alone: other separators may stand in texts."""
    found: list[tuple[str, Any]] = []
    for line, content in enumerate(text.split("\n"), 1):
        if content.strip():
            number = len(found) + 1
            place = f"{path}, row {number}" + (f" (line {line})" if line != number else "")
            found.append((place, _parse(content, f"{path}, line {line}")))
    return found


def document(path: Path) -> Row:
    """A JSON file that is one object."""
    return Row(str(path), read_json(path))


def objects(path: Path) -> list[tuple[str, Row]]:
    """A JSON file that is an object with one object for each question: key, row."""
    content = read_json(path)
    if not isinstance(content, dict) or not content or isinstance(content, Twice):
        raise ValueError(
            f"{path}: expected an object with an object for each question"
            + (f"; {content.key!r} is there twice" if isinstance(content, Twice) else "")
        )
    return [(key, Row(f"{path}, row {i} ({key!r})", value)) for i, (key, value) in enumerate(content.items(), 1)]


def read_rows(path: Path) -> list[Row]:
    """The rows of a .jsonl, .json (a list of objects, an object with one such list, or one row), .csv, .tsv or .parquet file."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        rows = _parquet(path)
    elif kind in (".csv", ".tsv"):
        rows = _delimited(path, "\t" if kind == ".tsv" else ",")
    elif kind in (".json", ".jsonl"):
        rows = _json(path)
    else:
        raise ValueError(f"{path}: can read {', '.join(TABLES)}")
    if not rows:
        raise ValueError(f"{path}: no rows in it")
    return rows


def _json(path: Path) -> list[Row]:
    text = read_text(path)
    if path.suffix.lower() == ".jsonl" or _many(text):
        values = _lines(path, text)
    else:
        content = _parse(text, str(path), whole=True)
        if isinstance(content, Twice):
            raise ValueError(f"{path}: {content.key!r} is there twice")
        if isinstance(content, dict):
            lists = [v for v in content.values() if isinstance(v, list) and all(isinstance(entry, dict) for entry in v)]
            content = lists[0] if len(lists) == 1 else [content]  # the one object is a row itself
        if not isinstance(content, list):
            raise ValueError(f"{path}: expected a list of objects, one for each question, found {content!r:.40}")
        values = [(f"{path}, row {i}", value) for i, value in enumerate(content, 1)]
    return [Row(place, value) for place, value in values]


def _delimited(path: Path, delimiter: str) -> list[Row]:
    names: list[str] | None = None
    rows: list[Row] = []
    for line, cells in _records(path, delimiter):
        place = f"{path}, row {len(rows) + 1} (line {line})"
        if not any(cell.strip() for cell in cells):
            continue
        if names is None:
            names = cells
            _once(path, (name for name in names if name.strip()))
            continue
        if len(cells) != len(names):
            raise ValueError(f"{place}: {len(cells)} fields, but {len(names)} columns ({', '.join(names)})")
        for name, cell in [*zip(names, cells, strict=True)][1:]:  # the first may be the row numbers of pandas
            if not name.strip() and cell.strip():
                raise ValueError(f"{place}: {cell[:40]!r} stands in a column without a name")
        rows.append(Row(place, {name: cell for name, cell in zip(names, cells, strict=True) if name.strip()}, False))
    return rows


def _records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """(first line, fields) of each record.

    Raises ValueError for a quote that never closes, text behind a closing quote, and, in a file that quotes fields, a quote in
    a field that does not begin with one: there two rows may have become one.
    """
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # pictures in base64
    fields = re.compile(rf'(?:^|(?<={delimiter}))"(?:[^"]|"")*"(?={delimiter}|[\r\n]|$)')
    raw: list[str] = []

    def lines() -> Iterator[str]:
        for text in io.StringIO(read_text(path), newline=""):
            raw.append(text)
            yield text

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    line, number, quoted, loose = 1, 0, 0, ""
    try:
        for cells in reader:
            if '"' in (text := "".join(raw)):
                rest, count = fields.subn("", text)
                quoted += count
                loose = loose or (f"row {number} (line {line})" if '"' in rest else "")
            yield line, cells
            raw.clear()
            line, number = reader.line_num + 1, number + bool(cells)
    except csv.Error as error:
        what = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
        raise ValueError(f"{path}, row {number} (from line {line} on): {what}") from error
    if quoted and loose:
        raise ValueError(
            f"{path}, {loose}: a quote inside a field that does not begin with one, in a file that quotes fields: two rows may "
            'have become one. Quote that field and double the quotes in it, "5"" pipe"'
        )


def _once(path: Path, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if canonical(name) in seen:
            raise ValueError(f"{path}: two columns are called {name!r}; give one of them another name")
        seen.add(canonical(name))


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"{path}: reading Parquet needs pyarrow: pip install 'mmcompress[eval]'") from error
    check_file(path)
    try:
        with ParquetFile(path, page_checksum_verification=True) as file:
            expected = file.metadata.num_rows
            table = file.read()
        table.validate(full=True)
        _once(path, table.column_names)
        rows = table.to_pylist()
    except (ArrowException, OSError, MemoryError, OverflowError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no whole Parquet file, row unknown: {str(error)[:200]}") from error
    if len(rows) != expected:
        raise ValueError(f"{path}: {len(rows)} rows, but it says that it has {expected}")
    return [Row(f"{path}, row {i}", row) for i, row in enumerate(rows, 1)]
