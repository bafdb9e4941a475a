# SPDX-License-Identifier: Apache-2.0
"""Records on disk: whole after every end of a process, complete with several writers, on file systems without locks too."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mmcompress import records
from mmcompress.records import Lines, RecordError, check_output, locked, read, replacing, update, write_json, write_text

ALONE = f"""
import errno, fcntl, importlib.util, json, os, signal, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("records", {records.__file__!r})
records = sys.modules["records"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(records)
path = Path(sys.argv[2])
def refused(*_): raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
if sys.argv[1] == "without": fcntl.flock = refused
def add(name): records.update(path, "names", lambda known: (known or []) + [name], lambda value: isinstance(value, list))
"""
"""records.py by itself: a process starts in no time."""


def start(code: str, locks: str, path: Path, *more: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-W", "ignore", "-c", ALONE + code, locks, str(path), *more]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True)


LOCKS = pytest.mark.parametrize("locks", ["with", "without"])


@LOCKS
def test_nothing_that_several_processes_add_is_lost(locks: str, tmp_path: Path) -> None:
    code = "for i in range(25): add(f'{sys.argv[3]} {i}')"
    running = [start(code, locks, tmp_path / "r.json", str(number)) for number in range(4)]
    assert [process.wait() for process in running] == [0] * 4
    found = json.loads((tmp_path / "r.json").read_text())
    assert sorted(found) == sorted(f"{number} {i}" for number in range(4) for i in range(25))
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


DYING = """
records.STALE = 0.2
names, left = ("open", "close", "write", "fsync", "chmod", "replace", "unlink", "ftruncate"), int(sys.argv[3])
def dying(real):
    def call(*given, **named):
        global left
        if left == 0: os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*given, **named)
    return call
for name in names: setattr(os, name, dying(getattr(os, name)))
"""
"""The process is killed before its n-th call of the system that changes a file."""


@LOCKS
def test_killed_before_any_call_a_record_is_the_old_or_the_new_one(locks: str, tmp_path: Path) -> None:
    path, ends = tmp_path / "r.json", []
    for number in range(60):
        write_json(path, ["old"])
        ends.append(start(DYING + "add('new')", locks, path, str(number)).wait())
        assert json.loads(path.read_text()) in (["old"], ["old", "new"]), number
        if ends[-1] == 0:
            break
    assert len(ends) > 5 and ends[-1] == 0 and set(ends[:-1]) == {-signal.SIGKILL}
    assert start("records.STALE = 0.2\nadd('last')", locks, path).wait() == 0  # what the dead left behind stops nobody
    assert json.loads(path.read_text())[-1] == "last"


def test_killed_before_any_call_lines_are_whole(tmp_path: Path) -> None:
    code = DYING + "lines = records.Lines(path)\nfor i in (1, 2):\n    lines.append([{'n': i}]); print(i, flush=True)"
    ends = []
    for number in range(60):
        path = tmp_path / f"{number}.jsonl"
        process = start(code, "with", path, str(number))
        told = process.communicate()[0].split()
        ends.append(process.returncode)
        with Lines(path) as lines:
            found = [value["n"] for value in lines.values]
        assert found in ([], [1], [1, 2]) and len(found) >= len(told)
        if ends[-1] == 0:
            break
    assert len(ends) > 3 and ends[-1] == 0


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])  # fmt: skip  # noqa: E501
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_record_that_cannot_be_written_stays(
    error: BaseException, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json(tmp_path / "r.json", {"old": 1})

    def refuse(*_: Any) -> None:
        raise error

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(type(error)) as raised:
        update(path, "anything", lambda known: {**known, "new": 2})
    monkeypatch.undo()
    if isinstance(raised.value, OSError):
        assert raised.value.filename == str(path)
    assert read(path, "anything") == {"old": 1} and [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_full_disk_leaves_lines_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes 5 bytes of a line, then no more."""
    real, room = os.write, [5]

    def write(file: int, data: bytes) -> int:
        if not room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data[: room.pop()])

    with Lines(tmp_path / "a.jsonl") as lines:
        lines.append([{"n": 1}])
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(OSError, match=r"No space left on device: '.*a\.jsonl'"):
            lines.append([{"n": 2}])
        monkeypatch.undo()
        lines.append([{"n": 3}])
    assert (tmp_path / "a.jsonl").read_text() == '{"n": 1}\n{"n": 3}\n'


def test_links_modes_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    real, link = tmp_path / "there" / "r.json", tmp_path / "link.json"
    write_json(real, 1)
    real.chmod(0o640)
    link.symlink_to(real)
    update(link, "a number", lambda known: known + 1)
    assert link.is_symlink() and read(real, "a number") == 2 and real.stat().st_mode & 0o777 == 0o640
    write_text("/dev/null", "gone")
    assert not Path("/dev/null").is_file()
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "new.json") as part:
        part.write_text("half")
        raise ZeroDivisionError
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link.json", "there"]


def test_half_a_character_is_written_as_json_has_it(tmp_path: Path) -> None:
    text = 'half \ud83d, \\ud83d, a whole one 😀 and a quote "'
    path = write_text(tmp_path / "r.json", json.dumps([text], ensure_ascii=False))
    assert read(path, "text") == [text]
    with Lines(tmp_path / "a.jsonl") as lines:
        lines.append([{"text": text}])
    assert Lines.peek(tmp_path / "a.jsonl") == [{"text": text}]


@pytest.mark.parametrize(
    "content",
    [b"hello", b"[1]", b'{"families": ', "{}".encode("utf-16"), b"\xff\xfe{}", b'{"other": {}}', b"[" * 100_000, b"null"],
    ids=["text", "list", "torn", "utf-16", "bytes", "other", "deep", "null"],
)  # fmt: skip
def test_what_is_no_record_is_named_and_left(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    fits = {"kind": "`mmcompress bench`", "fits": lambda value: isinstance(value, dict) and "families" in value}
    with pytest.raises(RecordError, match=r"r\.json is no record of `mmcompress bench`: move it away"):
        read(path, **fits)
    with pytest.raises(RecordError, match=r"r\.json is no record"):
        update(path, change=lambda known: {}, **fits)
    assert path.read_bytes() == content


def test_nothing_there_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert read(tmp_path / "empty", "x") is None and read(tmp_path / "none", "x") is None
    assert read("/dev/null", "x") is None


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_files_cannot_be_locked(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="cannot be locked"), Lines(tmp_path / "a.jsonl") as lines:
        lines.append([{"n": 1}])
    assert Lines.peek(tmp_path / "a.jsonl") == [{"n": 1}]
    monkeypatch.setattr(records, "STALE", 0.2)
    with locked(tmp_path):
        assert (tmp_path / ".mmcompress.lock").exists()
    assert not (tmp_path / ".mmcompress.lock").exists()
    (tmp_path / ".mmcompress.lock").touch()  # of a process that died
    with locked(tmp_path):
        pass
    assert not (tmp_path / ".mmcompress.lock").exists()


def test_another_process_has_the_lines(tmp_path: Path) -> None:
    with Lines(tmp_path / "a.jsonl"), pytest.raises(RecordError, match="another process"):
        Lines(tmp_path / "a.jsonl")
    with Lines(tmp_path / "a.jsonl"):
        pass


LONG = "x" * 300


@pytest.mark.parametrize(
    ("path", "folder", "message"),
    [
        ("file", True, "is a file: name a folder"),
        ("file/below", True, "file is a file, not a folder"),
        ("file/below/r.json", False, "file is a file, not a folder"),
        ("folder", False, "is a folder: name a file in it"),
        (LONG, True, "cannot be written: File name too long"),
        (f"new/{LONG}/r.json", False, "cannot be written: File name too long"),
        ("/".join(["y" * 200] * 25), True, "cannot be written: File name too long"),
        ("/proc/r.json", False, "cannot be written: "),
        ("/sys/new/folder", True, "cannot be written: "),
        ("kept", "png", "the name has no ending; choose one of .png"),
        ("kept.xyz", "png", "no pictures end in '.xyz'; choose one of .png"),
    ],
)
def test_what_cannot_be_written_is_said_before_the_work(
    path: str, folder: bool | str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    kinds, folder = ((folder,), False) if isinstance(folder, str) else ((), folder)
    with pytest.raises(ValueError, match=f"^--out .*{message}"):
        check_output("--out", tmp_path / path, folder, kinds)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_what_can_be_written_is_not_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    check_output("--out", tmp_path / "file")
    check_output("--out", tmp_path / "a" / "b" / "r.json")
    check_output("--out", tmp_path / "a" / "b", folder=True)
    check_output("--out", tmp_path, folder=True)
    check_output("--out", tmp_path / "k.PNG", kinds=("png",))
    check_output("--out", "/dev/null")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "x"
    if os.geteuid():  # root may write everything
        (tmp_path / "file").chmod(0o400)
        with pytest.raises(ValueError, match="Permission denied"):
            check_output("--out", tmp_path / "file")
