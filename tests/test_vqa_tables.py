# SPDX-License-Identifier: Apache-2.0
"""Strict tables: each fault is read right or refused with file, row and column; splits, shards and parts are told apart."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from mmcompress.eval.data import Question, digest, open_picture, read_questions
from mmcompress.eval.data.cells import parse_list
from mmcompress.eval.data.files import Folder, from_base64, parts
from mmcompress.eval.data.rows import short
from mmcompress.eval.data.tables import read_rows
from mmcompress.eval.tasks import task_of
from PIL import Image

Q = {"question": "q ?", "image": "0.png"}


def jsonl(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(
    folder: Path, files: dict[str, Any], task: str = "exact", main: str = "", split: str | None = None
) -> list[Question]:
    """The questions of files {name: text, bytes, or rows for Parquet}; pictures 0.png and 1.png lie beside them."""
    for number in range(2):
        Image.new("RGB", (4, 3), "red").save(folder / f"{number}.png")
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, list):
            parquet = pytest.importorskip("pyarrow.parquet")
            parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(content), path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_questions(task, folder / main, folder, split=split))


def csv(answers: str, column: str = "answer") -> str:
    return f"question,{column},image\nq ?,{answers},0.png\n"


@pytest.mark.parametrize(
    ("name", "content", "task", "answers"),
    [
        ("q.csv", csv("\"['nokia' 'nokia' 'Nokia']\"", "answers"), "soft", ("nokia", "nokia", "Nokia")),
        ("q.csv", csv("[1 2 3]", "answers"), "soft", ("1", "2", "3")),
        ("q.csv", csv('"[""a, b"", ""it\'s""]"', "answers"), "soft", ("a, b", "it's")),
        ("q.csv", csv("\"[{'answer': 'a'}\n {'answer': 'b'}]\"", "answers"), "soft", ("a", "b")),
        ("q.csv", csv("none"), "exact", ("none",)),
        ("q.csv", "\ufeff" + csv("red"), "exact", ("red",)),
        ("q.csv", "Question,ANSWER,Image\r\nq ?,red,0.png\r\n,,\r\n", "exact", ("red",)),
        ("q.csv", ",question,answer,image\n0,q ?,red,0.png\n", "exact", ("red",)),
        ("Q.TSV", "question\tanswer\timage\nq ?\tred\t0.png\n", "exact", ("red",)),
        ("q.csv", csv('5" pipe'), "exact", ('5" pipe',)),
        ("Q.JSONL", jsonl({**Q, "answer": "a\u2028b\u2029c\u0085d"}), "exact", ("a\u2028b\u2029c\u0085d",)),
        (
            "q.jsonl",
            json.dumps({**Q, "answer": "a\u2028b\x85c"}, ensure_ascii=False) + "\n\n",
            "exact",
            ("a\u2028b\x85c",),
        ),
        ("q.jsonl", jsonl({**Q, "answer": 3.0}), "exact", ("3",)),
        ("q.jsonl", jsonl({**Q, "answer": 10**400}), "exact", (str(10**400),)),
        ("q.jsonl", jsonl({**Q, "answer": None}), "exact", ()),
        ("q.jsonl", jsonl({**Q, "answers": ["none", "None", ""]}), "soft", ("none", "None", "")),
        ("q.jsonl", jsonl({**Q, "answer": True}), "yesno", ("yes",)),
        ("q.jsonl", jsonl({**Q, "label": ["No"]}), "pope", ("no",)),
        ("q.csv", csv("False"), "yesno", ("no",)),
        ("q.csv", csv("Yes "), "yesno", ("yes",)),
        ("q.jsonl", jsonl({**Q, "answer": "yes."}), "mme", ("yes",)),
        ("q.json", json.dumps({**Q, "answer": ["a"]}), "exact", ("a",)),
        ("q.jsonl", jsonl({**Q, "answers": ["nan", "naan"]}), "soft", ("nan", "naan")),
        ("q.csv", csv("[]"), "exact", ()),
        ("q.json", json.dumps({"version": 1, "rows": [{**Q, "answer": "a"}]}), "exact", ("a",)),
        ("q.parquet", [{**Q, "answer": 2.0, "options": ["x", "y", "z"]}], "ai2d", ("C",)),
        ("q.jsonl", jsonl({**Q, "answer": "B.", "options": {"A": "x", "B": "y"}}), "letter", ("B",)),
        ("q.jsonl", jsonl({**Q, "answer": "y", "options": "['x' 'y']"}), "letter", ("B",)),
        ("q.csv", "question,image,A,B,C,answer\nq ?,0.png,x,y,nan,y\n", "letter", ("B",)),
        ("q.jsonl", jsonl({**Q, "gt_answer": 1}), "hallusionbench", ("1",)),
        ("q.jsonl", jsonl({**Q, "question": "half \ud83d", "answer": "a"}), "exact", ("a",)),
    ],
)
def test_read_right(tmp_path: Path, name: str, content: Any, task: str, answers: tuple[str, ...]) -> None:
    (question,) = read(tmp_path, {name: content}, task)
    assert question.answers == answers and question.images
    assert len(digest([question])) == 16


@pytest.mark.parametrize(
    ("name", "content", "task", "said"),
    [
        (
            "q.csv",
            "image,question,answer\n0.png,Is it red\n1.png,Which?,blue\n",
            "exact",
            r"row 1 \(line 2\): 2 fields, but 3 col",
        ),
        (
            "q.csv",
            "question,answer,image\na,b,0.png\nq ?,a,b,0.png\n",
            "exact",
            r"row 2 \(line 3\): 4 fields, but 3 columns",
        ),
        (
            "q.csv",
            'question,answer,image\n"what ?,red,0.png\nwhich ?,blue,1.png\n',
            "exact",
            r"row 1 \(from line 2 on\): a quote is",
        ),
        (
            "q.csv",
            'question,answer,image\n"what, is",red,0.png\nis ""it?,a,0.png\n',
            "exact",
            r"row 2 \(line 3\): a quote inside",
        ),
        ("q.tsv", 'question\tanswer\timage\n"a" b\tc\t0.png\n', "exact", r"row 1 \(from line 2 on\)"),
        ("q.csv", "question,answer,Answer ,image\nq,a,b,0.png\n", "exact", "two columns are called 'Answer '"),
        ("q.csv", "question,answre,image\nq,a,0.png\n", "exact", None),
        (
            "q.csv",
            "question,answeq,image\nq,a,0.png\n",
            "exact",
            r"column answeq: there is no such column, only 'answer'",
        ),
        ("q.csv", "question;answer;image\nq;a;0.png\n", "exact", "no column one of question"),
        ("q.csv", csv("nan"), "exact", r"row 1 \(line 2\), column answer: got 'nan'"),
        ("q.csv", csv("None"), "exact", "column answer: got 'None'"),
        ("q.csv", csv("null"), "soft", "column answer: got 'null'"),
        ("q.csv", csv("\"['a', nan]\"", "answers"), "soft", "column answers: got nan"),
        ("q.csv", csv("\"['a', None]\"", "answers"), "soft", "column answers: got None"),
        ("q.csv", csv("\"['a' ... 'b']\"", "answers"), "soft", "a list that cannot be read"),
        ("q.csv", csv("\"['a', 'b' 'c']\"", "answers"), "soft", "some items have a comma"),
        ("q.csv", csv("\"['a' 'b'\"", "answers"), "soft", "a list that cannot be read"),
        ("q.csv", csv("\"array(['a'], dtype=object)\"", "answers"), "soft", "a list that cannot be read"),
        ("q.jsonl", jsonl({**Q, "answers": ["a", None]}), "soft", r"row 1, column answers: got None"),
        ("q.jsonl", '{"question": "q", "image": "0.png", "answer": NaN}\n', "exact", r"row 1, column answer: got nan"),
        (
            "q.jsonl",
            '{"question": "q", "image": "0.png", "answer": "a", "answer": "b"}\n',
            "exact",
            "row 1: 'answer' is there twice",
        ),
        ("q.jsonl", jsonl({**Q, "answer": "a"}) + "\n[1]\n", "exact", r"row 2 \(line 3\): expected an object"),
        ("q.jsonl", jsonl({**Q, "answer": "a", "Answer": "b"}), "exact", "row 1: two columns are called 'answer'"),
        ("q.jsonl", jsonl({**Q, "question": None}), "exact", r"row 1, column question: got None"),
        ("q.jsonl", jsonl({**Q, "question": ["a", "b"]}), "exact", r"row 1, column question: got"),
        ("q.jsonl", jsonl({**Q, "answer": True}), "exact", r"row 1, column answer: got True.*yes or no"),
        (
            "q.jsonl",
            jsonl({**Q, "answer": "maybe"}),
            "yesno",
            r"row 1, column answer: got 'maybe', yes or no is needed",
        ),
        ("q.jsonl", jsonl({**Q, "label": ["yes", "no"]}), "pope", r"row 1, column label: got"),
        (
            "q.jsonl",
            jsonl({**Q, "answer": "", "label": "x"}),
            "exact",
            "column answer: got '', but 'x' in column label",
        ),
        (
            "q.jsonl",
            jsonl({**Q, "options": ["red", None, "blue"], "answer": "A"}),
            "letter",
            "column options: got None",
        ),
        (
            "q.jsonl",
            jsonl({**Q, "options": "red, blue", "answer": "A"}),
            "letter",
            "column options: got 'red, blue', a list of sev",
        ),
        ("q.jsonl", jsonl({**Q, "options": {"A": "x", "C": "y"}, "answer": "A"}), "letter", "column options: got"),
        (
            "q.csv",
            "question,image,A,B,C,answer\nq ?,0.png,x,nan,y,A\n",
            "letter",
            "column B: got nothing, but there is something in",
        ),
        ("q.csv", "question,image,A,B,C,answer\nq ?,0.png,x,y,None,A\n", "letter", "column C: got 'None'"),
        ("q.csv", "question,image,A,B,D,answer\nq ?,0.png,x,y,z,A\n", "letter", "column c: got nothing"),
        (
            "q.jsonl",
            jsonl({**Q, "options": ["red", "blue"], "answer": "(B)"}),
            "letter",
            "column answer: got '\\(B\\)', none of the",
        ),
        (
            "q.jsonl",
            jsonl({**Q, "options": ["red", "blue"], "answer": 2}),
            "letter",
            "column answer: got '2', none of the options",
        ),
        (
            "q.jsonl",
            jsonl({**Q, "options": ["red", "red"], "answer": "red"}),
            "letter",
            "more than one of A: red, B: red",
        ),
        ("q.jsonl", jsonl({**Q, "options": ["b", "a"], "answer": "b"}), "letter", "more than one of A: b, B: a"),
        ("q.jsonl", jsonl({**Q, "options": [2, 1, 0], "answer": 2}), "letter", "more than one of A: 2, B: 1, C: 0"),
        ("q.jsonl", jsonl({**Q, "answer": "1"}), "ai2d", "row 1: no options"),
        ("q.jsonl", jsonl({"question": "q", "answer": "a"}), "exact", "row 1: no picture in any row"),
        ("q.jsonl", jsonl({"question": "q", "image": ["0.png", None]}), "exact", r"row 1, column image: got"),
        (
            "q.jsonl",
            jsonl({"question": "q", "image": "x" * 5000}),
            "exact",
            r"1 of 1 pictures are missing, .*row 1, column image",
        ),
        ("q.jsonl", jsonl({"question": "q", "image": "a\0b"}), "exact", r"row 1, column image: got"),
        (
            "q.jsonl",
            jsonl({"question": "q", "image": "data:image/png;base64,!"}),
            "exact",
            r"row 1, column image: got .*no data URI",
        ),
        (
            "q.jsonl",
            jsonl({**Q, "id": 1}, {**Q, "id": "1"}),
            "exact",
            r"row 2: the id '1' is there twice \(also in .*row 1\)",
        ),
        ("q.json", '[{"question": "q"}, {"question": "q"]', "exact", "q.json, row 2 is not JSON"),
        ("q.json", json.dumps({"x": 1}), "exact", "row 1: no column one of question"),
        ("q.json", "[]", "exact", "no rows in it"),
        ("q.json", "[" * 100_000, "exact", "is not JSON"),
        ("q.jsonl", b'{"question": "q", "image": "0.png", "answer": "\0"}\n', "exact", "line 1: a NUL byte"),
        ("q.csv", csv("red").encode("utf-16"), "exact", "q.csv is UTF-16 or UTF-32"),
        ("q.csv", csv("Café").encode("cp1252"), "exact", "q.csv, line 2 is not UTF-8"),
        ("q.csv", b"", "exact", "q.csv is empty"),
        ("q.csv", "question,answer,image\n", "exact", "q.csv: no rows in it"),
        ("q.csv", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "exact", "pointer of Git LFS"),
        ("q.parquet", b"PAR1 cut", "exact", "q.parquet is no whole Parquet file"),
        ("a.parquet/q.csv", csv("a"), "mme", "no questions of MME"),
        (
            "HallusionBench.json",
            json.dumps(
                [
                    {
                        "category": "VD",
                        "subcategory": "x",
                        "set_id": 0,
                        "figure_id": 1,
                        "question_id": 0,
                        "question": "q",
                        "filename": "./0.png",
                        "gt_answer": None,
                    }
                ]
            ),
            "hallusionbench",
            r"row 1, column gt_answer: got None",
        ),
        (
            "testdev_balanced_questions.json",
            json.dumps({"1": {"imageId": "0", "question": "q"}}),
            "gqa",
            r"row 1 \('1'\): no column 'ans",
        ),
        (
            "val.json",
            json.dumps([{"image": "0.png", "answers": [{"answer": "a"}]}]),
            "vizwiz",
            "val.json, row 1: no column 'question'",
        ),
        (
            "val_v1.0.json",
            json.dumps({"data": [{"questionId": 1, "question": "q", "image": "0.png", "answers": None}]}),
            "docvqa",
            r"row 1, column answers: got None",
        ),
        (
            "MMBench_DEV_EN.tsv",
            "index\tquestion\tA\tB\tanswer\n0\tq ?\tx\ty\tA\n",
            "mmbench",
            r"row 1 \(line 2\): no column 'image'",
        ),
        (
            "SEED-Bench.json",
            json.dumps({"questions": [{"question": "q", "data_type": "imagf"}]}),
            "seedbench",
            r"row 1, column data_type",
        ),
        ("color/0.txt", "Is it ?\tYes\nIs it ?\tNo\n", "mme", "0.txt: its picture is missing"),
    ],
)
def test_refused_with_a_place(tmp_path: Path, name: str, content: Any, task: str, said: str | None) -> None:
    if said is None:  # an unknown column is one more, if it is not nearly another
        assert read(tmp_path, {name: content}, task)[0].answers == ()
        return
    with pytest.raises(ValueError, match=said) as caught:
        read(tmp_path, {name: content}, task)
    assert name.split("/")[-1] in str(caught.value) or task == "mme"


@pytest.mark.parametrize(
    "second", ["Is it red ?\tYes\t\nIs it blue ?\tNo \n", "Is it red ?\tyes\r\n\r\nIs it blue ?\tNO"]
)
def test_mme_lines_as_people_write_them(tmp_path: Path, second: str) -> None:
    files = {"color/0.txt": "Is it red ?\tYes\nIs it blue ?\tNo\n", "color/1.txt": second, "color/read.me.txt": "hello"}
    for number in range(2):
        (tmp_path / "color").mkdir(exist_ok=True)
        Image.new("RGB", (4, 3)).save(tmp_path / f"color/{number}.png")
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode())
    found = read_questions("mme", tmp_path)
    assert [(q.text, q.answers) for q in found] == [("Is it red ?", ("Yes",)), ("Is it blue ?", ("No",))] * 2
    for bad, said in (
        ("a ?\tYes\n", "1 lines, but there are two"),
        ("a ?\tYes\nb ? No\n", r"row 2 \(line 2\), column answer: got ''"),
        ("a ?\tYes\nb ?\tnone\n", r"row 2 \(line 2\), column answer: got 'none'"),
    ):
        (tmp_path / "color/1.txt").write_text(bad)
        with pytest.raises(ValueError, match=rf"1\.txt.*{said}"):
            read_questions("mme", tmp_path)


def test_splits_and_shards(tmp_path: Path) -> None:
    rows = {name: [{**Q, "answer": name}] for name in "abc"}
    shard = "data/{}-0000{}-of-0000{}.parquet"
    files = {
        shard.format("test", 0, 1): rows["a"],
        shard.format("testdev", 0, 1): rows["b"],
        shard.format("val", 1, 2): rows["c"],
    }
    with pytest.raises(ValueError, match=r"of val, shard 00000 is missing"):
        read(tmp_path, files, split="test")
    (tmp_path / shard.format("val", 1, 2)).unlink()
    files.popitem()
    with pytest.raises(
        ValueError, match=r"several tables of exact, say which by --data FILE or --split: data/test-.*testdev"
    ):
        read(tmp_path, files)
    assert [q.answers for q in read(tmp_path, files, split="test")] == [("a",)]
    assert [q.answers for q in read(tmp_path, files, split="TestDev")] == [("b",)]
    with pytest.raises(ValueError, match=r"for --split val: there are test, testdev"):
        read(tmp_path, files, split="val")
    many = tmp_path / "many"
    many.mkdir()
    files = {shard.format("test", i, 3): rows["abc"[i]] for i in (1, 0, 2)}
    assert [q.answers[0] for q in read(many, files)] == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"is one of 3 shards: give the folder"):
        read(many, files, main=shard.format("test", 1, 3))
    (many / shard.format("test", 0, 9)).write_bytes((many / shard.format("test", 0, 3)).read_bytes())
    with pytest.raises(ValueError, match=r"of test, shard 00003 is missing"):
        read(many, files)
    eleven = tmp_path / "eleven"
    eleven.mkdir()
    bare = {
        f"test-{i}-of-11.jsonl": jsonl({**Q, "answer": str(i)}) for i in range(1, 12)
    }  # from 1 on, without leading zeros
    assert [q.answers[0] for q in read(eleven, bare)] == [str(i) for i in range(1, 12)]
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    with pytest.raises(ValueError, match="of test, the names tell of different numbers of shards"):
        read(mixed, {shard.format("test", 0, 1): rows["a"], shard.format("test", 1, 2): rows["b"]})
    twice = {shard.format("test", 0, 1): rows["a"], "data/test-00000-of-00001-abc.parquet": rows["b"]}
    double = tmp_path / "double"
    double.mkdir()
    with pytest.raises(ValueError, match=r"of test, .* is one too many"):
        read(double, twice)
    text = tmp_path / "text"
    text.mkdir()
    files = {
        "mine_test.jsonl": jsonl({**Q, "answer": "a"}),
        "mine_test-dev.jsonl": jsonl(Q),
        "mine_testdev.csv": csv("x"),
    }
    assert read(text, files, split="test")[0].answers == ("a",)
    with pytest.raises(ValueError, match=r"several tables"):
        read(text, files)
    gqa = tmp_path / "gqa"
    gqa.mkdir()
    with pytest.raises(ValueError, match=r"no questions of GQA.*with 'test' in its name"):
        read(gqa, {"testdev_balanced_questions.json": "{}"}, "gqa", split="test")


def test_checksums_of_parquet_are_compared(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([{**Q, "answer": "scarlet"}])
    parquet.write_table(
        table, tmp_path / "whole.parquet", write_page_checksum=True, compression=None, write_statistics=False
    )
    whole = (tmp_path / "whole.parquet").read_bytes()
    assert whole.count(b"scarlet") == 1
    assert read(tmp_path, {"q.parquet": whole}, main="q.parquet")[0].answers == ("scarlet",)
    with pytest.raises(ValueError, match=r"q\.parquet is no whole Parquet file"):
        read(tmp_path, {"q.parquet": whole.replace(b"scarlet", b"starlet")}, main="q.parquet")


def test_parts_of_a_benchmark(tmp_path: Path) -> None:
    line = jsonl({"question_id": 1, "image": "0.png", "text": "Is it?", "label": "yes"})
    files = {f"coco_pope_{part}.json": line + line.replace("1", "2", 1) for part in ("random", "popular")}
    with pytest.raises(ValueError, match=r"POPE has the parts .* and adversarial is missing"):
        read(tmp_path, files, "pope")
    assert len(read(tmp_path, files, "pope", split="random")) == 2
    assert len(read(tmp_path, files, "pope", main="coco_pope_popular.json")) == 2
    assert len(read(tmp_path, {"coco_pope_adversarial.json": files["coco_pope_random.json"]}, "pope")) == 6
    with pytest.raises(ValueError, match=r"POPE has the parts .*, and mine is none"):
        read(tmp_path, {"coco_pope_mine.json": files["coco_pope_random.json"]}, "pope")
    chart = tmp_path / "chart"
    chart.mkdir()
    with pytest.raises(ValueError, match=r"ChartQA has the parts .* and test_augmented\.json is missing"):
        read(chart, {"test_human.json": json.dumps([{"imgname": "0.png", "query": "q", "label": "1"}])}, "chartqa")
    subjects = tmp_path / "mmmu"
    subjects.mkdir()
    one = [{**Q, "answer": "A", "options": "['x', 'y']"}]
    files = {f"{name}/validation-00000-of-00001.parquet": [{**one[0], "id": name}] for name in ("Art", "Law")}
    assert [q.id for q in read(subjects, files, "mmmu")] == ["Art", "Law"]
    with pytest.raises(ValueError, match=r"several tables of exact"):
        read(subjects, files, "exact")


def test_pictures_in_base64(tmp_path: Path) -> None:
    colors = b"\0\0\xff" + b"\xbe\xef\xfb" * 7 + b"\xff" * 24
    Image.frombytes("RGB", (4, 4), colors).save(tmp_path / "blue.bmp")
    bits = (tmp_path / "blue.bmp").read_bytes()
    plain, safe = base64.b64encode(bits).decode(), base64.urlsafe_b64encode(bits).decode()
    assert len(plain) < 200 and {"+", "/"} <= set(plain) and {"-", "_"} <= set(safe)
    wrapped = "\n".join(plain[i : i + 60] for i in range(0, len(plain), 60))
    uri = "data:image/png;base64,"
    forms = [
        plain,
        plain.rstrip("="),
        safe,
        wrapped,
        uri + plain,
        uri + wrapped,
        uri + plain.replace("=", "%3D").replace("+", "%2B"),
    ]
    found = read(tmp_path, {"q.jsonl": jsonl(*({"question": "q", "image": form} for form in forms))})
    assert [q.images for q in found] == [(bits,)] * len(forms)
    assert open_picture(found[0].images[0]).getpixel((0, 0)) == (0, 0, 255)
    shortest = b"GIF8" + b"\1" * 8  # no picture is shorter, but names are
    assert from_base64(base64.b64encode(shortest).decode()) == shortest
    assert from_base64(base64.b64encode(shortest[:-1]).decode()) is None
    (tmp_path / "abcdefghijklmnopqrst").write_bytes(bits)  # a name of letters alone is a name
    (named,) = read(tmp_path, {"q.jsonl": jsonl({"question": "q", "image": "abcdefghijklmnopqrst"})})
    assert named.images == (tmp_path / "abcdefghijklmnopqrst",)


def test_numbers_of_four_digits_are_shards_of_their_folder() -> None:
    """As the hub converts data sets; shorter numbers are names."""
    here = Path("default/test")
    (one,) = parts([here / "0000.parquet", here / "0001.parquet"])
    assert (
        one.name == "test" and one.of("test") and [path.name for path in one.paths] == ["0000.parquet", "0001.parquet"]
    )
    with pytest.raises(ValueError, match="of test, shard 00000 is missing"):
        parts([here / "0001.parquet"])
    assert [one.name for one in parts([here / "000.parquet", here / "001.parquet"])] == ["000", "001"]


def test_an_object_with_two_lists_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"boxes": [{"x": 1}], "answers": [{"answer": "a"}, {"answer": "b"}]}))
    (row,) = read_rows(tmp_path / "q.json")
    assert row.texts("answers") == ("a", "b")


def test_folders_are_walked_five_levels_deep(tmp_path: Path) -> None:
    for depth in range(8):
        here = tmp_path.joinpath(*"abcdefgh"[:depth])
        here.mkdir(exist_ok=True)
        (here / f"q{depth}.jsonl").touch()
    assert [path.stem for path in Folder(tmp_path).matching("*.jsonl")] == ["q0", "q1", "q2", "q3", "q4", "q5"]


def test_values_are_shown_whole_or_in_sixty_characters() -> None:
    for length in (10, 57, 58, 59, 100):
        text = repr("x" * length)
        assert short("x" * length) == (text if length <= 58 else text[:57] + "...")


def test_official_names_of_columns(tmp_path: Path) -> None:
    """MMBench writes l2-category, its later versions and MMStar l2_category; hub tables of SEED-Bench hold videos too."""
    bits = base64.b64encode(b"\x89PNG" * 200).decode()
    for i, name in enumerate(("l2-category", "L2-category", "l2_category")):
        text = f"index\tquestion\tA\tB\tanswer\tcategory\t{name}\timage\n{i}\tq\tx\ty\tB\tc\tlogic\t{bits}\n"
        (question,) = read(tmp_path, {"mmbench_dev.tsv": text}, "mmbench")
        assert question.extra["l2_category"] == "logic" and question.kind == "c" and question.answers == ("B",)
    seed = {**Q, "choice_a": "x", "choice_b": "y", "answer": "A", "question_type_id": 3}
    science = {"question": "q", "choices": ["x", "y"], "answer": 1}
    (only,) = read(
        tmp_path, {"s.jsonl": jsonl({**science, "image": None}, {**science, "image": "0.png"})}, "scienceqa", "s.jsonl"
    )
    assert only.images == (tmp_path / "0.png",) and only.answers == ("B",)
    other = tmp_path / "seed"
    other.mkdir()
    found = read(other, {"q.jsonl": jsonl({**seed, "data_type": "image"}, {**seed, "data_type": "video"})}, "seedbench")
    assert [(q.kind, q.options) for q in found] == [("3", (("A", "x"), ("B", "y")))]


def test_lists_as_text() -> None:
    assert parse_list("[['a', 1.5], {\"b\": None}, -3]") == [["a", 1.5], {"b": None}, -3]
    assert parse_list(r"['it\'s', '\frac{1}{2}', 'a\nb',]") == ["it's", "\frac{1}{2}", "a\nb"]
    assert parse_list("['a'\n 'b']") == ["a", "b"] and parse_list("[]") == [] and parse_list("[1. 2.]") == [1.0, 2.0]
    for bad in (
        "['a''b']",
        "['a' b]",
        "['a'",
        "['a']]",
        "[,]",
        "['a' 'b', 'c']",
        "{'a': 1, 'a': 2}",
        "{'a' 'b'}",
        "[red]",
        "['a\\']",
    ):
        with pytest.raises(ValueError, match=r".+"):
            parse_list(bad)


HUB: dict[str, tuple[dict[str, Any], tuple[str, ...], str]] = {
    "vqav2": (
        {
            "question_id": 1,
            "question_type": "what is",
            "multiple_choice_answer": "a",
            "answer_type": "other",
            "image_id": 3,
            "answers": [{"answer": "a", "answer_confidence": "yes", "answer_id": i} for i in range(10)],
        },
        ("a",) * 10,
        "other",
    ),
    "textvqa": (
        {"question_id": 1, "question_tokens": ["what"], "answers": ["a"] * 10, "ocr_tokens": ["x"], "set_name": "val"},
        ("a",) * 10,
        "",
    ),
    "vizwiz": ({"question_id": "VizWiz_val_0.jpg", "answers": ["a"] * 10, "category": "other"}, ("a",) * 10, "other"),
    "pope": (
        {"id": "0", "question_id": "1", "answer": "yes", "image_source": "COCO_1", "category": "popular"},
        ("yes",),
        "popular",
    ),
    "mme": (
        {"question_id": "code_reasoning/0020.png", "answer": "Yes", "category": "code_reasoning"},
        ("yes",),
        "code_reasoning",
    ),
    "scienceqa": (
        {"choices": ["x", "y"], "answer": 1, "hint": "", "task": "closed choice", "subject": "s", "category": "c"},
        ("B",),
        "c",
    ),
    "seedbench": (
        {
            "choice_a": "x",
            "choice_b": "y",
            "choice_c": "z",
            "choice_d": "w",
            "answer": "D",
            "data_type": "image",
            "data_id": "1",
            "question_id": "7",
            "question_type_id": 2,
            "segment": None,
        },
        ("D",),
        "2",
    ),
    "mmstar": (
        {"index": 0, "answer": "A", "category": "coarse", "l2_category": "fine", "meta_info": {"a": 1}},
        ("A",),
        "fine",
    ),
    "ai2d": ({"options": ["a", "b", "0", "d"], "answer": "2"}, ("C",), ""),
    "mmmu": (
        {
            "id": "validation_Art_1",
            "options": "['a', \"b's\"]",
            "answer": "B",
            "question_type": "multiple-choice",
            "explanation": "",
            "image_2": None,
            "topic_difficulty": "Easy",
            "img_type": "['Photo']",
        },
        ("B",),
        "multiple-choice",
    ),
    "chartqa": ({"type": "human_test", "answer": "14"}, ("14",), "human_test"),
    "docvqa": (
        {
            "questionId": "49153",
            "question_types": ["handwritten", "form"],
            "docId": 1,
            "answers": ["0.28", ".28"],
            "data_split": "val",
        },
        ("0.28", ".28"),
        "handwritten",
    ),
    "ocrbench": ({"dataset": "HME100k", "question_type": "Formula", "answer": ["x ^ 2"]}, ("x ^ 2",), "Formula"),
    "realworldqa": ({"answer": "C"}, ("C",), ""),
    "hallusionbench": (
        {
            "category": "VD",
            "subcategory": "figure",
            "visual_input": "1",
            "set_id": "0",
            "figure_id": "1",
            "sample_note": "x",
            "question_id": "2",
            "gt_answer": "1",
            "gt_answer_details": "y",
            "filename": "./x.png",
        },
        ("1",),
        "VD",
    ),
}
"""Columns of the tables on the hub, as ../eval/vqa_metrics.md has them: row, gold answers, kind."""


@pytest.mark.parametrize("task", HUB)
def test_columns_of_the_hub(tmp_path: Path, task: str) -> None:
    row, answers, kind = HUB[task]
    shown = io.BytesIO()
    Image.new("RGB", (2, 2)).save(shown, "PNG")
    image = {"bytes": shown.getvalue(), "path": None}
    key = "image_1" if task == "mmmu" else "image"
    (question,) = read(tmp_path, {"test-00000-of-00001.parquet": [{"question": "q ?", **row, key: image}]}, task)
    assert question.answers == answers and question.kind == kind and question.images == (shown.getvalue(),)
    gold = (
        {"yes": "Yes", "1": "Yes"}.get(answers[0], answers[0])
        if task in ("pope", "mme", "hallusionbench")
        else answers[0]
    )
    assert task_of(task).row(question, gold, task_of(task).protocols[0]).value == pytest.approx(1.0)
