# SPDX-License-Identifier: Apache-2.0
"""Records on disk: each is there whole or not at all, whoever else writes, whatever ends the process.

A record is replaced in one step (`replacing`), or added to under a lock (`update`), or only ever appended to (`Lines`). What
cannot be written, or is no record, is said before any work (`check_output`, `read`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import Self

STALE = 10.0
"""Seconds after which a lock file is one that a dead process left: it is held for as long as a record takes to be written."""
NO_LOCKS = "files cannot be locked on this file system: start no second run with the same output"


class RecordError(ValueError):
    """A file that is no record of the kind that is wanted, or that another process is writing."""


# ---------------------------------------------------------------------- in one step
@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A file beside `path` to write into, which takes its place at the end of the block. After an error, or if the process dies,
    `path` is what it was. Devices and pipes are written themselves. Raises OSError, which names `path`."""
    path = Path(os.path.realpath(path))  # a link stays a link
    if path.exists() and not path.is_file() and not path.is_dir():
        yield path
        return
    part = path.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        yield part
        _to_disk(part)
        if path.is_file():
            os.chmod(part, path.stat().st_mode & 0o7777)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    with contextlib.suppress(OSError):  # not every file system can
        _to_disk(path.parent)


def _to_disk(path: Path) -> None:
    found = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(found)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):  # not every file system can
            raise
    finally:
        os.close(found)


def write_text(path: Path | str, text: str) -> Path:
    """Write `text` in one step; half a character (a lone surrogate) becomes its escape, as JSON has it. Returns the path."""
    with replacing(path) as part, part.open("wb") as file:
        file.write(text.encode("utf-8", "backslashreplace"))
    return Path(path)


def write_json(path: Path | str, value: Any) -> Path:
    """Write a value as indented JSON in one step; returns the path."""
    return write_text(path, json.dumps(value, indent=1) + "\n")


def read(path: Path | str, kind: str, fits: Callable[[Any], bool] = lambda value: True) -> Any:
    """The JSON value of a record, None if there is none (or an empty file, or a device). kind: what it should be a record of.
    Raises RecordError, which names the file, if it is something else."""
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        return None
    other = f"is no record of {kind}: move it away, or name another file"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path} {other} (not JSON: {error})") from error
    if not fits(value):
        raise RecordError(f"{path} {other}")
    return value


def update(
    path: Path | str,
    kind: str,
    change: Callable[[Any], Any],
    fits: Callable[[Any], bool] = lambda value: True,
    write: Callable[[Path | str, Any], Path] = write_json,
) -> Any:
    """Replace a record by `change(what is there now)`, None where nothing is, under a lock: what another process has added
    meanwhile is not lost. Returns the new record. Raises as `read` does, and OSError."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        value = change(read(path, kind, fits))
        write(path, value)
    return value


# ---------------------------------------------------------------------- locks
def _flock(file: int, wait: bool) -> bool:
    """Lock an open file for this process, as long as it is open; False where files cannot be locked. Raises BlockingIOError if
    another process has the lock, unless it is to be waited for."""
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:  # ENOSYS, ENOLCK, EOPNOTSUPP, EBADF, ...
        return False
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time between here and the end of the block: by a lock on the folder, or, where there are none, by a file
    that only one can make."""
    try:
        file = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        file = -1
    lock = folder / ".mmcompress.lock"
    by_file = file < 0 or not _flock(file, wait=True)
    try:
        if by_file:
            _make(lock)
        yield
    finally:
        if by_file:
            lock.unlink(missing_ok=True)
        if file >= 0:
            os.close(file)


def _make(lock: Path) -> None:
    """Make a file that is not there, as soon as it is not; one that stays the same for STALE seconds is taken away."""
    seen, since = None, time.monotonic()
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):
                there = lock.stat()
                if (there.st_ino, there.st_mtime_ns) != seen:
                    seen, since = (there.st_ino, there.st_mtime_ns), time.monotonic()
                elif time.monotonic() - since > STALE:
                    lock.unlink()
            time.sleep(0.02)


# ---------------------------------------------------------------------- lines
class Lines:
    """A file of JSON objects, one a line, only ever appended to, by one process at a time.

    Lines are written and forced to the disk whole, or not at all; if the process dies in one it is torn, and opening the file cuts
    it off. Raises RecordError for damage before that, and if another process has the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            try:
                if not _flock(self._file, wait=False):
                    warnings.warn(NO_LOCKS, stacklevel=3)
            except BlockingIOError as error:
                raise RecordError(f"{path}: another process is writing these lines") from error
            data = path.read_bytes()
            self.values, good = _whole(data, path)
            self.repaired = good != len(data)
            if self.repaired:
                os.ftruncate(self._file, good)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes have the file."""
        os.close(self._file)

    def append(self, values: Sequence[Mapping[str, Any]]) -> None:
        """Write values, and wait until they are on the disk. Raises OSError, after which the file is what it was."""
        text = "".join(json.dumps(dict(value), ensure_ascii=False) + "\n" for value in values)
        data, before = text.encode("utf-8", "backslashreplace"), os.fstat(self._file).st_size
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, before)
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    @staticmethod
    def peek(path: Path) -> list[dict[str, Any]]:
        """The values of a file, which is left as it is; none if it is not there."""
        return _whole(path.read_bytes(), path)[0] if path.exists() else []


def _whole(data: bytes, path: Path) -> tuple[list[dict[str, Any]], int]:
    """The values in the whole lines of a file, and how many bytes those are."""
    lines = data.split(b"\n")
    tail = lines.pop()  # what follows the last line break: nothing, or a torn line
    values, good = [_value(line) for line in lines], len(data) - len(tail)
    if values and values[-1] is None and not tail:  # a hole that a crash of the machine left
        good -= len(lines[-1]) + 1
        values.pop()
    if None in values:
        raise RecordError(f"{path}, line {values.index(None) + 1} is damaged: mend it or move the file away")
    return [value for value in values if value is not None], good


def _value(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ---------------------------------------------------------------------- before the work
def check_output(option: str, path: Path | str, folder: bool = False, kinds: Sequence[str] = ()) -> None:
    """Raise ValueError if a file (or folder) cannot be written: a folder where a file is due or the other way round, below a file,
    too long a name, read-only. Nothing is made. kinds: the endings that are allowed, such as "png"."""
    named, path = f"{option} {path}", Path(os.path.realpath(path))
    if kinds and path.suffix.lower().removeprefix(".") not in kinds:
        ending = f"no pictures end in {path.suffix!r}" if path.suffix else "the name has no ending"
        raise ValueError(f"{named}: {ending}; choose one of {', '.join(f'.{kind}' for kind in kinds)}")
    try:
        if path.is_dir() and not folder:
            raise ValueError(f"{named} is a folder: name a file in it")
        if path.exists() and not path.is_dir():
            if folder:
                raise ValueError(f"{named} is a file: name a folder")
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            if not path.is_file():  # a device or a pipe is written itself
                return
        there = path
        while not there.exists():
            there = there.parent
        if there != path and not there.is_dir():
            raise ValueError(f"{named}: {there} is a file, not a folder")
        for name in path.relative_to(there).parts:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(there / name)  # too long, or with letters that the file system does not take
        trial = (there if there.is_dir() else there.parent) / f".{secrets.token_hex(6)}.tmp"
        os.close(os.open(trial, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        trial.unlink()
    except OSError as error:
        raise ValueError(f"{named} cannot be written: {error.strerror}") from error
