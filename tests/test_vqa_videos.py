# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of videos in the layouts of their sites, with videos that PyAV writes, and their scores by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmcompress.eval.data import Film, Question, Showing, digest, read_questions
from mmcompress.eval.data.film import spoken
from mmcompress.eval.data.films import MVBENCH
from mmcompress.eval.data.question import open_clip
from mmcompress.eval.metrics import longvideobench_letter
from mmcompress.eval.prompts import LETTER, new_tokens, question_text
from mmcompress.eval.tasks import task_of
from PIL import Image

from mmcompress.cli import main
from mmcompress.videos import VideoError

av = pytest.importorskip("av", reason="PyAV is not installed (pip install 'mmcompress[video]')")
RATE = 5


def video(path: Path, frames: int = 10) -> Path:
    """Frames whose brightness tells their number, five a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, RATE)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 64, 3), 20 * number + 20, np.uint8), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pa = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pa.Table.from_pylist(content), path)
    elif path.suffix == ".csv":
        lines = [",".join(content[0]), *(",".join(map(str, row.values())) for row in content)]
        path.write_text("\n".join(lines) + "\n")
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def ask(task: str, question: Question, protocol: Any = "official") -> str:
    return question_text(task_of(task), question, protocol)


def mvbench(root: Path) -> Path:
    choices = {"candidates": ["left", "right", "right"], "answer": "right"}
    asked = [{"video": "a.mp4", "question": "Where?", **choices, "start": 0.5, "end": 1.1}]
    write(root / "json" / "action_sequence.json", asked)
    write(root / "json" / "moving_count.json", [{"video": "b.mp4", "question": "How?", **choices}] * 2)
    shown = {"video": "x", "question": "Who?", **choices, "start": 1, "end": 2, "fps": 3}
    write(root / "json" / "episodic_reasoning.json", [shown])
    video(root / "video" / "star" / "Charades_v1_480" / "a.mp4")
    video(root / "video" / "clevrer" / "video_validation" / "b.mp4", 3)
    for number in range(9):
        path = root / "video" / "tvqa" / "frames_fps3_hq" / "x" / f"{number + 1:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number * 20,) * 3).save(path)
    return root


def test_mvbench(tmp_path: Path) -> None:
    found = read_questions("mvbench", mvbench(tmp_path), showing=Showing(3))
    assert [q.id for q in found] == ["action_sequence/0", "moving_count/0", "moving_count/1", "episodic_reasoning/0"]
    first = found[0]
    assert first.answers == ("B", "C") and first.kind == "action_sequence"  # two options of one text
    clip = open_clip(first.videos[0])
    assert clip.times is not None and clip.times.round(3).tolist() == [0.4, 0.8, 1.0] and clip.total == 10
    frames = open_clip(found[-1].videos[0])
    assert frames.indices in ((3, 4, 6), (3, 5, 6)) and frames.frames[0, 0, 0, 0] == 60 and frames.rate == 3
    assert len(open_clip(found[1].videos[0])) == 3
    listed = "(A) left\n(B) right\n(C) right"
    assert ask("mvbench", first) == f"Question: Where?\nOption:\n{listed}\nOnly give the best option."
    assert new_tokens(task_of("mvbench"), "lmms") == 16 and new_tokens(task_of("longvideobench"), "lmms") == 32
    assert digest(found) != digest(read_questions("mvbench", tmp_path, showing=Showing(4)))
    assert len(read_questions("mvbench", tmp_path, split="moving_count")) == 2
    place = tmp_path / "video" / "clevrer" / "video_validation"
    assert len(read_questions("mvbench", tmp_path / "json" / "moving_count.json", place)) == 2
    with pytest.warns(UserWarning, match=r"mean over 20 tasks; missing: action_prediction, .*counterfactual"):
        task_of("mvbench").check(found, "official")
    with pytest.raises(ValueError, match="no questions of MVBench: looked for --split nothing"):
        read_questions("mvbench", tmp_path, split="nothing")


def test_scores_of_mvbench_and_mlvu() -> None:
    """By hand: kinds of 1 of 2 and 1 of 1 right make 3/4, over all questions 2/3; an empty reply does not count in lmms."""
    options = (("A", "x"), ("B", "y"))
    asked = [Question(str(i), "?", (), ("B",), options, kind=kind) for i, kind in enumerate("aab")]
    task = task_of("mvbench")
    rows = [task.row(q, reply, "official") for q, reply in zip(asked, ["(B) y", "(A) x", "b."], strict=True)]
    assert [row.parsed for row in rows] == ["B", "A", "B"]
    assert task.scores(rows, "official") == {"task_mean": 0.75, "accuracy": pytest.approx(2 / 3)}
    assert task.guess(rows) == 0.5
    rows[1] = replace(rows[1], reply="", parsed="", value=0.0)
    assert task.scores(rows, "official")["task_mean"] == 0.75 and task.scores(rows, "lmms")["task_mean"] == 1.0
    mlvu = task_of("mlvu")
    rows = [mlvu.row(q, reply, "lmms") for q, reply in zip(asked, ["A) x", "A", "B"], strict=True)]
    assert mlvu.scores(rows, "lmms")["m_avg"] == 0.5  # 0 of 2 and 1 of 1
    assert len(MVBENCH) == len(set(MVBENCH)) == 20


def videomme(root: Path) -> Path:
    same = {"video_id": "001", "sub_category": "x", "task_type": "Counting", "question": "What?", "answer": "C"}
    shown = [("abc", "short", "Art"), ("abc", "short", "Art"), ("d-e", "long", "Sport")]
    rows = [
        {**same, "videoID": name, "duration": kind, "domain": domain, "question_id": f"001-{i}",
         "options": ["A. one.", "B. two.", "C. three.", "D. four."]}
        for i, (name, kind, domain) in enumerate(shown)
    ]  # fmt: skip
    write(root / "videomme" / "test-00000-of-00001.parquet", rows)
    video(root / "data" / "abc.mp4")
    video(root / "data" / "d-e.mp4")
    lines = ["1\n00:00:00,000 --> 00:00:00,300\n<i>hello</i>\nthere", "2\n00:00:00,700 --> 00:00:00,750\nunseen"]
    write(root / "subtitle" / "abc.srt", "\n\n".join([*lines, "3\n00:00:01,700 --> 00:00:09,000\nbye"]))
    return root


def test_videomme(tmp_path: Path) -> None:
    found = read_questions("videomme", videomme(tmp_path))
    assert found[0].options[2] == ("C", "three.") and found[0].answers == ("C",)
    listed = "A. one.\nB. two.\nC. three.\nD. four."
    assert ask("videomme", found[0]).endswith(f"option.\nWhat?\n{listed}\nThe best answer is:")
    assert ask("videomme", found[0], "lmms").endswith(f"{listed}\n{LETTER}")
    with pytest.warns(UserWarning, match="1 of 3 questions have no subtitles"):
        said = read_questions("videomme", tmp_path, showing=Showing(2, subtitles=True))
    text = ask("videomme", said[0])
    assert text.startswith("This video's subtitles are listed below:\nhello there\nbye\nSelect the best answer")
    assert "video and the subtitles. Respond" in text and "subtitles" not in ask("videomme", said[2])
    task = task_of("videomme")
    rows = [task.row(q, reply, "official") for q, reply in zip(found, ["C", "B", "The answer is C"], strict=True)]
    assert task.scores(rows, "official") == {
        "accuracy": pytest.approx(2 / 3), "domain/Art": 0.5, "domain/Sport": 1.0, "kind/long": 1.0, "kind/short": 0.5,
    }  # fmt: skip
    (tmp_path / "subtitle" / "abc.srt").write_text("hello\n")
    spoken.cache_clear()
    with pytest.raises(ValueError, match=r"abc.srt: subtitles without a line"):
        said[0].videos[0].said()  # type: ignore[union-attr]
    (tmp_path / "subtitle" / "abc.srt").unlink()
    with pytest.raises(ValueError, match=r"no subtitles in it .*leave --subtitles out"):
        read_questions("videomme", tmp_path, showing=Showing(subtitles=True))


def test_mlvu(tmp_path: Path) -> None:
    asked = {
        "video": "m.mp4",
        "question": "Why?",
        "candidates": ["x", "y", "z"],
        "answer": "z",
        "question_type": "plotQA",
    }
    write(tmp_path / "json" / "1_plotQA.json", [asked])
    write(tmp_path / "json" / "9_summary.json", [{"video": "m.mp4", "question": "Sum up", "answer": "long"}])
    path = video(tmp_path / "video" / "1_plotQA" / "m.mp4")
    (one,) = read_questions("mlvu", tmp_path)
    assert one.kind == "plotQA" and one.answers == ("C",) and one.videos == (Film(path),)
    assert ask("mlvu", one) == "Why?\n(A) x\n(B) y\n(C) z\nOnly give the best option.\nBest option: ("
    hub = tmp_path / "hub"
    row = {"video_name": "m.mp4", "question": "Why?\n(A) x\n(B) y\n(C) z", "answer": "C", "task_type": "findNeedle"}
    write(hub / "data" / "test-00000-of-00001.parquet", [row])
    video(hub / "video" / "m.mp4")
    (other,) = read_questions("mlvu", hub)
    assert (other.text, other.options, other.answers) == (one.text, one.options, one.answers)
    assert other.kind == "needle" and ask("mlvu", other) == ask("mlvu", one)
    write(hub / "data" / "test-00000-of-00001.parquet", [{**row, "question": "Why?"}])
    with pytest.raises(ValueError, match=r"row 1, column question.*as \(A\) text"):
        read_questions("mlvu", hub)


def test_longvideobench(tmp_path: Path) -> None:
    same = {"video_path": "v.mp4", "subtitle_path": "v_en.json", "question": "Who?", "candidates": list("xyz")}
    same |= {"question_category": "S2E", "starting_timestamp_for_subtitles": 10}
    rows = [{"id": f"v_{i}", **same, "correct_choice": i, "duration_group": group} for i, group in enumerate([15, 600])]
    write(tmp_path / "lvb_val.json", rows)
    video(tmp_path / "videos" / "v.mp4")
    lines = [{"start": "00:00:10.1", "end": "00:00:10.9", "line": "early"}, {"timestamp": [11.7, None], "text": "late"}]
    write(tmp_path / "subtitles" / "v_en.json", lines)
    found = read_questions("longvideobench", tmp_path, showing=Showing(2, subtitles=True))
    assert [q.answers for q in found] == [("A",), ("B",)] and [q.kind for q in found] == ["15", "600"]
    text = ask("longvideobench", found[0])
    assert text == f"This video's subtitles are listed below:\nlate\nWho?\nA. x\nB. y\nC. z\n{LETTER}"
    options = {f"option{i}": text for i, text in enumerate([*"xyz", "N/A", "N/A"])}
    hub = [{name: value for name, value in row.items() if name != "candidates"} | options for row in rows]
    path = write(tmp_path / "validation-00000-of-00001.parquet", hub)
    assert [q.options for q in read_questions("longvideobench", path)] == [q.options for q in found]
    task = task_of("longvideobench")
    done = [task.row(q, reply, "official") for q, reply in zip(found, ["The answer is A.", "no idea"], strict=True)]
    assert task.scores(done, "official") == {"accuracy": 0.5, "domain/S2E": 0.5, "kind/15": 1.0, "kind/600": 0.0}
    assert [longvideobench_letter(r) for r in ("The best answer is B", "Answer: C. cat", "(D)", "none")] == [*"BCD", ""]
    rows[1]["correct_choice"] = 3
    write(tmp_path / "lvb_val.json", rows)
    with pytest.raises(ValueError, match=r"row 2, column correct_choice: got 3, the number of an option from 0 to 2"):
        read_questions("longvideobench", tmp_path)


def test_egoschema(tmp_path: Path) -> None:
    ids = ("0074f737-11cb", "00aa7247-9a4b")
    options = {f"option {i}": f"o{i}" for i in range(5)}
    asked = [{"q_uid": name, "google_drive_id": "g", "question": "Why?", **options} for name in ids]
    write(tmp_path / "questions.json", asked)
    for name in ids:
        video(tmp_path / "videos" / f"{name}.mp4", 2)
    with pytest.raises(ValueError, match=r"subset_answers.json is missing"):
        read_questions("egoschema", tmp_path)
    write(tmp_path / "subset_answers.json", {ids[1]: 3})
    (one,) = read_questions("egoschema", tmp_path)
    assert one.id == ids[1] and one.answers == ("D",) and len(one.options) == 5
    assert [q.answers for q in read_questions("egoschema", tmp_path, split="full")] == [(), ("D",)]
    row = {
        "question_idx": "7",
        "question": "Why?",
        "video_idx": ids[0],
        "option": [f"{a}. o" for a in "ABCDE"],
        "answer": "1",
    }
    for part in ("MC", "Subset"):
        write(tmp_path / "hub" / part / "test-00000-of-00001.parquet", [row])
    (two,) = read_questions("egoschema", tmp_path / "hub", tmp_path / "videos")
    assert two.answers == ("B",) and two.options[0] == ("A", "o") and "Subset" in two.place


def test_nextqa(tmp_path: Path) -> None:
    rows = [
        {"video": 4010069381, "frame_count": 10, "width": 64, "height": 32, "question": "how many dogs", "answer": 4, "qid": qid,
         "type": kind, **{f"a{i}": word for i, word in enumerate(("one", "two", "three", "four", "five"))}}
        for qid, kind in ((0, "DC"), (1, "CW"))
    ]  # fmt: skip
    path = write(tmp_path / "val.csv", rows)
    write(tmp_path / "map_vid_vidorID.json", {"4010069381": "1164/4010069381"})
    video(tmp_path / "NExTVideo" / "1164" / "4010069381.mp4")
    found = read_questions("nextqa", tmp_path)
    assert found[0].answers == ("E",) and found[0].id == "4010069381/0" and ask("nextqa", found[0]).endswith(LETTER)
    task = task_of("nextqa")
    done = [task.row(q, reply, "lmms") for q, reply in zip(found, ["E.", "A"], strict=True)]
    assert task.scores(done, "lmms") == {
        "accuracy": 0.5, "domain/causal": 0.0, "domain/descriptive": 1.0, "kind/CW": 0.0, "kind/DC": 1.0,
    }  # fmt: skip
    write(path, [{name: value for name, value in row.items() if name[0] != "a" or name == "answer"} for row in rows])
    with pytest.raises(ValueError, match=r"val.csv, row 1 .*no columns a0 ... a4: .*WordNet"):
        read_questions("nextqa", tmp_path)


def test_what_is_missing_or_broken(tmp_path: Path) -> None:
    root = mvbench(tmp_path)
    (root / "video" / "clevrer" / "video_validation" / "b.mp4").unlink()
    with pytest.raises(ValueError, match=r"1 of 1 videos are missing, the first is 'b.mp4' \(.*moving_count.json, row 1\)"
                                         r": looked in .*clevrer.*--videos FOLDER"):  # fmt: skip
        read_questions("mvbench", root)
    with pytest.raises(ValueError, match=r"--videos .*nowhere: no such folder"):
        read_questions("mvbench", root, root / "nowhere")
    with pytest.raises(ValueError, match="no such file or folder"):
        read_questions("mlvu", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no questions of Video-MME: looked for"):
        read_questions("videomme", root / "video")
    with pytest.raises(ValueError, match="mvbench has no subtitles"):
        read_questions("mvbench", root, showing=Showing(subtitles=True))
    for change, said in (
        ({"question": None}, "column question"), ({"answer": "up"}, "none of the options"),
        ({"candidates": ["left"]}, "at least two options"), ({"start": 2, "end": 1}, "but it starts at 2 s"),
        ({"start": "soon"}, "column start: got 'soon', seconds are needed"),
    ):  # fmt: skip
        row = {"video": "a.mp4", "question": "Where?", "candidates": ["left", "right"], "answer": "left", **change}
        write(root / "json" / "action_sequence.json", [row])
        with pytest.raises(ValueError, match=rf"action_sequence.json, row 1.*{said}"):
            read_questions("mvbench", root, split="action_sequence")
    (root / "empty").mkdir()
    with pytest.raises(VideoError, match="a folder without pictures"):
        Film(root / "empty")()
    with pytest.raises(ValueError, match="frames=0: at least 1"):
        Showing(0)


@pytest.mark.slow
def test_eval_and_sweep(watcher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a folder to a record and a plot; a broken video is left out and named."""
    root = mvbench(tmp_path / "mvbench")
    (root / "video" / "clevrer" / "video_validation" / "b.mp4").write_text("no video")
    line = ["eval", str(watcher), "--task", f"mvbench={root}", "--frames", "4", "--plan", "uniform(keep=0.5)"]
    assert main([*line, "--max-new-tokens", "2", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "left out: question moving_count/0" in shown and "b.mp4 is not a readable video" in shown
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert len(records) == 2 and all(record["settings"]["frames"] == 4 for record in records)
    assert all(record["answered"] == 2 and len(record["failed"]) == 2 for record in records)
    fewer = {record["settings"]["plan"]: record["visual_tokens"]["entering"]["mean"] for record in records}
    assert fewer["uniform(keep=0.5)"] == fewer["stock"] / 2
    assert main([*line, "--subtitles"]) == 2 and "mvbench has no subtitles" in capsys.readouterr().err
    assert main(["eval", str(watcher), "--frames", "4"]) == 2
    assert "--frames belongs to benchmarks of videos: --task mvbench" in capsys.readouterr().err
    out = tmp_path / "sweep"
    assert main(["sweep", str(watcher), "--task", f"mvbench={root}", "--frames", "4", "--plan", "uniform", "--keep", "50%",
                 "--repeats", "1", "--out", str(out)]) == 0  # fmt: skip
    content = json.loads((out / "sweep.json").read_text())
    assert (
        content["tasks"]["mvbench"]["frames"] == 4 and (out / "pareto.png").exists() and (out / "report.html").exists()
    )
