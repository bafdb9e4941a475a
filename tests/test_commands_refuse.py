# SPDX-License-Identifier: Apache-2.0
"""The commands where users, files, devices and screens are not as they should be: one line, before any work; nothing is lost."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mmcompress.eval import evaluator
from PIL import Image

from mmcompress.cli import bench, common, main
from mmcompress.cli import methods as methods_command

Said = pytest.CaptureFixture[str]


def refused(arguments: list[str], said: Said) -> str:
    """The one line that a command ends with."""
    said.readouterr()
    assert main(arguments) == 2, arguments
    err = said.readouterr().err
    assert err.startswith("mmcompress: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.fixture()
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def load(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(common, "load", load)


@pytest.fixture()
def table(tmp_path: Path) -> Path:
    """Four questions about drawn pictures."""
    rows = []
    for i, color in enumerate(("red", "green", "blue", "white")):
        Image.new("RGB", (96, 96), color).save(tmp_path / f"{i}.png")
        rows.append({"id": str(i), "question": "what color is the star ?", "answer": color, "image": f"{i}.png"})
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluated(table: Path, out: Path, *more: str) -> list[str]:
    line = ["eval", "llava-shapes", "--task", "exact", "--data", str(table), "--suffix", "", "--max-new-tokens", "4"]
    return [*line, "--batch-size", "1", "--out", str(out), *more]


PICTURE = ["run", "llava-shapes", "--question", "what ?", "--image", "0.png", "--out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "llava-shapes", "--out", "file"], "--out file is a file: name a folder"),
        (["sweep", "llava-shapes", "--plan", "uniform", "--out", "file/x"], "file is a file, not a folder"),
        (["explain", "llava-shapes", "--image", "0.png", "--question", "?", "--out", "file"], "is a file: name a folder"),
        (["demo", "--out", "file"], "--out file is a file: name a folder"),
        (["train", "llava-shapes", "--out", "file/x"], "file is a file, not a folder"),
        (["learn", "dyvte", "llava-shapes", "--out", "file"], "is a file: name a folder"),
        (["explain-train", "llava-shapes", "--out", "y" * 300], "cannot be written: File name too long"),
        (["tune", "llava-shapes", "--out", "folder"], "--out folder is a folder: name a file in it"),
        (["compare", "a.json", "b.json", "--out", "/proc/c.json"], "--out /proc/c.json cannot be written"),
        (["bench", "llava", "--out", "folder"], "--out folder is a folder"),
        (["bench", "kernels", "--csv", "file/k.csv"], "--csv file/k.csv: "),
        (["bench", "kernels", "--plot", "k.xyz"], "--plot k.xyz: no pictures end in '.xyz'"),
        ([*PICTURE, "folder"], "--out folder: the name has no ending"),
        ([*PICTURE, "folder.png"], "--out folder.png is a folder"),
        ([*PICTURE, "/proc/kept.png"], "--out /proc/kept.png cannot be written"),
        ([*PICTURE, "kept.xyz"], "no pictures end in '.xyz'; choose one of"),
        (["run", "llava-shapes", "--question", "?", "--device", "cuda:99"], "--device cuda:99 cannot be used: "),
        (["eval", "llava-shapes", "--device", "meta"], "--device meta cannot be used: "),
        (["bench", "llava-shapes", "--device", "abacus"], "--device abacus cannot be used: "),
        (["bench", "llava-shapes", "--new-tokens", "1"], "--new-tokens 1: at least 2"),
        (["bench", "llava", "--plan", "visionzap"], "unknown method 'visionzap'"),
        (["bench", "llava-shapes", "--plan", "visionzap"], "unknown method 'visionzap'"),
        (["bench", "selection", "--repeats", "0"], "--repeats 0: at least 1"),
        (["explain-train", "llava-shapes", "--compare", "visionzap"], "unknown method 'visionzap'"),
        (["sweep", "llava-shapes", "--plan", "uniform", "--examples", "-1"], "--examples -1: at least 0"),
        (["run", "llava-shapes", "--question", "?", "--image", "huge.png"], "huge.png is not a readable picture"),
    ],
)  # fmt: skip
def test_before_any_work(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, unloaded: None
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    Path("folder").mkdir()
    Path("folder.png").mkdir()
    Image.new("RGB", (8, 8)).save("0.png")
    if "huge.png" in arguments:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        Path("huge.png").write_bytes(Path("0.png").read_bytes())
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(arguments, capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "content"),
    [
        (["bench", "selection"], "[1]"), (["bench", "selection"], "hello"), (["bench", "llava-shapes"], '{"families": {}}'),
        (["bench", "kernels"], '{"families": {}}'), (["bench", "kernels"], '[{"op": "match"}]'),
        (["tune", "llava-shapes"], "[]"), (["compare", "a.json", "b.json"], "{}"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_named_before_any_work(
    command: list[str], content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, unloaded: None
) -> None:
    monkeypatch.setattr(bench, "_selection", lambda *_: pytest.fail("measured"))
    path = tmp_path / "r.json"
    path.write_text(content)
    assert "r.json is no record of `mmcompress" in refused([*command, "--out", str(path)], capsys)
    assert path.read_text() == content


def test_a_sweep_in_a_folder_with_another_file_of_that_name(
    table: Path, tmp_path: Path, capsys: Said, unloaded: None
) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "sweep.json").write_text('{"mine": 1}')
    line = ["sweep", "llava-shapes", "--task", f"exact={table}", "--plan", "uniform(keep=0.5)", "--repeats", "0"]
    assert "sweep.json is no record of `mmcompress sweep`" in refused([*line, "--out", str(tmp_path / "s")], capsys)
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["sweep.json"]


def test_what_another_process_adds_while_bench_measures_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said
) -> None:
    path = tmp_path / "r.json"

    def measure(*_: Any) -> dict[str, Any]:
        path.write_text(json.dumps({"families": {"llava": {"rows": ["meanwhile"]}}, "memory": {"rows": [1]}}))
        return {"rows": ["mine"]}

    monkeypatch.setattr(bench, "_selection", measure)
    assert main(["bench", "selection", "--repeats", "1", "--out", str(path)]) == 0
    expected = {
        "families": {"llava": {"rows": ["meanwhile"]}},
        "memory": {"rows": [1]},
        "selection": {"rows": ["mine"]},
    }
    assert json.loads(path.read_text()) == expected
    monkeypatch.setattr(bench, "_selection", lambda *_: {"rows": ["newer"]})
    monkeypatch.setattr(os, "fsync", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    err = refused(["bench", "selection", "--out", str(path)], capsys)
    assert "r.json: No space left on device" in err and json.loads(path.read_text()) == expected


def test_one_repeat_is_enough(capsys: Said) -> None:
    from mmcompress.eval.cost.selection import Sizes, selection_times

    (row,) = selection_times(["uniform"], repeats=1, sizes=Sizes(16, 8, 4, 2, 3), side=4)
    assert row.milliseconds > 0 and row.iqr == 0


@pytest.mark.parametrize("raised", ["interrupt", "SIGTERM", "SIGHUP"])
def test_a_run_that_is_stopped_says_how_to_go_on(
    raised: str,
    table: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Said,
    request: pytest.FixtureRequest,
) -> None:
    real, asked = evaluator._generate, []

    def generate(*given: Any) -> Any:
        asked.append(1)
        if len(asked) == 3:
            if raised == "interrupt":
                raise KeyboardInterrupt
            signal.raise_signal(getattr(signal, raised))
        return real(*given)

    monkeypatch.setattr(evaluator, "_generate", generate)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # below nohup it is ignored, and stays so
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, before))
    handler = signal.getsignal(signal.SIGTERM)
    out = tmp_path / "out"
    expected = 130 if raised == "interrupt" else 128 + getattr(signal, raised)
    assert main(evaluated(table, out)) == expected
    err = capsys.readouterr().err
    assert err.endswith(
        f"mmcompress: stopped; every answer so far is in {out}; the same command goes on where it was\n"
    )
    (journal,) = out.glob("*.jsonl")
    assert journal.read_text().count("\n") == 3 and signal.getsignal(signal.SIGTERM) is handler
    assert main(evaluated(table, out)) == 0 and len(asked) == 5
    (record,) = out.glob("*.json")
    assert json.loads(record.read_text())["answered"] == 4


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    for error in (KeyError("x"), AttributeError("x"), AssertionError("x"), RuntimeError("x"), IndexError("x")):

        def broken(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(methods_command, "run", broken)
        with pytest.raises(type(error)):
            main(["methods"])
    for error, text in (
        (OSError(errno.ENOSPC, "No space left on device", "a.json"), "a.json: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "b"), "b: Permission denied"),
        (Image.DecompressionBombError("too large"), "too large"),
        (MemoryError("of 4 GiB"), "out of memory of 4 GiB"),
    ):

        def foreign(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(methods_command, "run", foreign)
        assert refused(["methods"], capsys) == f"mmcompress: {text}\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_letters_that_a_screen_lacks_end_no_run(
    encoding: str, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows[0] |= {"id": "\ud83d 图", "image": "gone \ud83d.png"}
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    out = tmp_path / "ünï 图"
    monkeypatch.setattr(sys, "stdout", shown)
    assert main(evaluated(table, out)) == 0
    text = shown.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]
    assert "record: " in text and "?" in text and len(list(out.glob("*.json"))) == 1


def test_without_matplotlib(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said, request: pytest.FixtureRequest
) -> None:
    """A sweep goes on without its plot and says so; a picture that was asked for by name is missed before the work."""
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    line = ["sweep", "llava-shapes", "--task", f"exact={table}", "--plan", "uniform(keep=0.5)", "--repeats", "1"]
    assert main([*line, "--examples", "1", "--out", str(tmp_path / "s")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no plot: these pictures need matplotlib: pip install 'mmcompress[viz]'" in out and "report: " in out
    assert (tmp_path / "s" / "report.html").is_file() and (tmp_path / "s" / "sweep.json").is_file()
    request.getfixturevalue("unloaded")
    picture = [*PICTURE, str(tmp_path / "k.png")]
    assert "need matplotlib" in refused(picture, capsys)


@pytest.mark.parametrize("plan", [[], ["--no-stock", "--plan", "uniform(keep=0.5)"]])
def test_where_nothing_can_be_asked_the_reason_is_the_pictures(
    plan: list[str], table: Path, tmp_path: Path, capsys: Said
) -> None:
    for path in table.parent.glob("*.png"):
        path.write_bytes(path.read_bytes()[:50])
    reason = "none of the 4 questions"
    err = refused(evaluated(table, tmp_path / "out", *plan), capsys)
    assert reason in err and "0.png is not a readable picture" in err
    line = ["sweep", "llava-shapes", "--task", f"exact={table}", "--plan", "uniform(keep=0.5)", "--repeats", "0"]
    err = refused([*line, "--out", str(tmp_path / "s")], capsys)
    assert reason in err and "0.png is not a readable picture" in err


@pytest.mark.slow
def test_a_demo_without_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    """Everything is measured and kept; what could not be drawn is said at the end."""
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "demo.json").write_text('{"other": {"rows": []}}')
    line = ["demo", "--questions", "7", "--keep", "0.5", "--out", str(tmp_path)]
    assert main([*line, "--model", "llava-shapes", "--model", "internvl-shapes"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "no pictures: these pictures need matplotlib: pip install 'mmcompress[viz]'" in out
    assert set(json.loads((tmp_path / "demo.json").read_text())) == {"other", "llava-shapes", "internvl-shapes"}
    assert not list(tmp_path.glob("*.png")) and (tmp_path / "explain.html").is_file()


@pytest.mark.slow
def test_what_reads_us_may_end(tmp_path: Path) -> None:
    """As `| head -1` does, or a closed output: no traceback, and no complaint when the interpreter ends."""
    for tail in ("| head -c 10", ">&-", "| true"):
        line = f"{sys.executable} -m mmcompress methods {tail}; echo ${{PIPESTATUS[0]}} >&2"
        done = subprocess.run(
            ["bash", "-c", line], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert done.stderr == "0\n", (tail, done.stderr)
