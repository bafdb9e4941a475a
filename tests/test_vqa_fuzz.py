# SPDX-License-Identifier: Apache-2.0
"""Tables with one byte or one field changed: read as before, read with another value in that field alone, or refused with a place.

Every benchmark's own layout and every format of plain tables is written with a few rows. After a change, the reader either
raises ValueError that names a file and a row or line of it (or says what is wrong with the file as a whole), or gives the
same number of questions, of which at most one differs, in one of its parts. Nothing else may happen.
"""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from mmcompress.eval.data import Question, read_questions

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63680000008200816ad46a430000000049454e44ae426082"
)
ASKED = [
    "What is it?",
    'Is it 5" wide, or "more"?',
    "Wie heißt\ndas hier?",
    "图里 有 几 只 猫?",
    "Which one, [a] or {b}?",
]
SAID = ["red", "a dog", "12", "São Paulo", "U-turn"]
TEN = [[word] * 6 + ["none"] * 4 for word in SAID]
PARTS = ("text", "answers", "options", "hint", "kind", "images")
N = len(ASKED)

Files = dict[str, Any]
"""Name -> rows (a list of dicts, written by the suffix), a JSON value, or bytes."""


def rows(**columns: Any) -> list[dict[str, Any]]:
    return [
        {name: values[i] if isinstance(values, list) else values for name, values in columns.items()} for i in range(N)
    ]


def names(form: str = "{}.png") -> list[str]:
    return [form.format(i) for i in range(N)]


def plain(suffix: str, **columns: Any) -> Files:
    return {f"q.{suffix}": rows(question=ASKED, image=names(), **columns)}


def layouts() -> dict[str, tuple[str, Files]]:
    """Name of a case -> (task, files)."""
    ids = [str(1000 + 37 * i) for i in range(N)]
    line = [text.replace("\n", " ") for text in ASKED]
    letters = ["A", "B", "C", "A", "B"]
    options = [[f"{word} {i}" for word in ("cat", "dog, or", "it's")] for i in range(N)]
    lettered = {
        letter: [f"{word}, {i}" for i in range(N)] for letter, word in zip("ABC", ("cat", "dog", "cow"), strict=True)
    }
    listed = {"image_id": [262148 + i for i in range(N)], "question": ASKED, "question_id": [int(key) for key in ids]}
    told = [
        {
            "question_id": int(key),
            "answer_type": "other",
            "answers": [{"answer": word, "answer_id": n} for n, word in enumerate(ten)],
        }
        for key, ten in zip(ids, TEN, strict=True)
    ]
    coco = {"data_subtype": "val2014", "questions": rows(**listed)}
    problem = rows(
        question=ASKED,
        choices=options,
        answer=[0, 1, 2, 0, 1],
        hint=["", "A map.", "x", "", "y"],
        image="image.png",
        subject="s",
    )
    turns = [[{"from": "human", "value": f"<image>\n{text}"}] for text in ASKED]
    pope = rows(
        question_id=[1, 2, 3, 4, 5], image="COCO_val2014_000000262148.jpg", text=ASKED, label=["yes", "no"] * 2 + ["no"]
    )
    shown = base64.b64encode(PNG).decode()
    seed = rows(
        question_id=ids,
        data_id=names("{}_x"),
        data_type="image",
        question=ASKED,
        question_type_id=[1, 2, 1, 2, 1],
        answer=letters,
        **{f"choice_{letter.lower()}": texts for letter, texts in lettered.items()},
    )
    figures = rows(
        category="VD",
        subcategory="figure",
        set_id="0",
        figure_id=["0", "1", "2", "3", "4"],
        question_id="7",
        question=ASKED,
        gt_answer=["1", "0", "1", "0", "1"],
        filename=names("./hallusion_bench/VD/{}.png"),
    )
    found: dict[str, tuple[str, Files]] = {
        "vqav2": (
            "vqav2",
            {
                "v2_OpenEnded_mscoco_val2014_questions.json": coco,
                "v2_mscoco_val2014_annotations.json": {"annotations": told},
            },
        ),
        "okvqa": (
            "okvqa",
            {"OpenEnded_mscoco_val2014_questions.json": coco, "mscoco_val2014_annotations.json": {"annotations": told}},
        ),
        "vizwiz": (
            "vizwiz",
            {
                "val.json": rows(
                    image=names("v{}.jpg"), question=ASKED, answers=[e["answers"] for e in told], answer_type="other"
                )
            },
        ),
        "gqa": (
            "gqa",
            {
                "testdev_balanced_questions.json": dict(
                    zip(
                        ids,
                        rows(imageId=names("n{}"), question=ASKED, answer=SAID, types={"structural": "query"}),
                        strict=True,
                    )
                )
            },
        ),
        "textvqa": (
            "textvqa",
            {
                "TextVQA_0.5.1_val.json": {
                    "dataset_type": "val",
                    "data": rows(
                        question_id=[int(key) for key in ids], question=line, image_id=names("t{}"), answers=TEN
                    ),
                },
                "llava_textvqa_val_v051_ocr.jsonl": rows(
                    question_id=names("t{}"),
                    text=[f"{text}\nReference OCR token: X, {i}" for i, text in enumerate(line)],
                ),
            },
        ),
        "pope": (
            "pope",
            {
                f"coco_pope_{part}.json": "".join(json.dumps(row) + "\n" for row in pope).encode()
                for part in ("random", "popular", "adversarial")
            },
        ),
        "scienceqa": (
            "scienceqa",
            {
                "problems.json": dict(zip(ids, problem, strict=True)),
                "pid_splits.json": {"test": ids, "val": []},
                "llava_test_CQM-A.json": rows(id=ids, conversations=turns),
            },
        ),
        "mme": (
            "mme",
            {
                f"{part}/{i}.txt": f"{ASKED[0]} {i}\tYes\nIs it {part}?\tNo\n".encode()
                for part in ("color", "OCR")
                for i in range(2)
            },
        ),
        "mmbench": (
            "mmbench",
            {
                "mmbench_dev.tsv": rows(
                    index=[1, 2, 3, 1000001, 1000002],
                    question=ASKED,
                    hint=["", "A map,", "nan", "", ""],
                    **lettered,
                    answer=letters,
                    category="attribute",
                    image=[shown, shown, shown, "1", "2"],
                    **{"l2-category": "logic"},
                )
            },
        ),
        "seedbench": ("seedbench", {"SEED-Bench.json": {"questions": seed, "question_type": {"Scene": 1, "Count": 2}}}),
        "chartqa": (
            "chartqa",
            {f"test_{part}.json": rows(imgname=names(), query=ASKED, label=SAID) for part in ("human", "augmented")},
        ),
        "docvqa": (
            "docvqa",
            {
                "val_v1.0.json": {
                    "data": rows(
                        questionId=[int(key) for key in ids],
                        question=ASKED,
                        image=names("documents/{}.png"),
                        answers=[[word, "x"] for word in SAID],
                        question_types=[["layout"]] * N,
                    )
                }
            },
        ),
        "infovqa": (
            "infovqa",
            {
                "infographicsVQA_val_v1.0.json": {
                    "data": rows(
                        questionId=[int(key) for key in ids],
                        question=ASKED,
                        image_local_name=names(),
                        answers=[[word] for word in SAID],
                    )
                }
            },
        ),
        "ocrbench": (
            "ocrbench",
            {
                "OCRBench.json": rows(
                    dataset_name="HME100k",
                    type="Formula",
                    id=[int(key) for key in ids],
                    question=ASKED,
                    image_path=names("a/{}.jpg"),
                    answers=[[word] for word in SAID],
                )
            },
        ),
        "hallusionbench": ("hallusionbench", {"HallusionBench.json": figures}),
    }
    for kind in ("jsonl", "json", "csv", "tsv", "parquet"):
        text = kind in ("csv", "tsv")
        found |= {
            f"exact.{kind}": (
                "exact",
                plain(kind, answer=SAID, id=ids, kind="color", hint=["", "A map.", "x", "y", ""]),
            ),
            f"soft.{kind}": ("soft", plain(kind, answers=[str(ten) for ten in TEN] if text else TEN)),
            f"numpy.{kind}": ("soft", plain(kind, answers=[f"['{word}'\n 'b, c']" for word in SAID])),
            f"letter.{kind}": (
                "letter",
                plain(kind, options=[json.dumps(o) for o in options] if text else options, answer=letters),
            ),
            f"letters.{kind}": ("letter", plain(kind, **lettered, answer=letters, index=ids)),
            f"choices.{kind}": (
                "letter",
                plain(kind, **{f"choice_{k.lower()}": v for k, v in lettered.items()}, answer=letters),
            ),
            f"yesno.{kind}": ("yesno", plain(kind, answer=["yes", "No", "yes", "NO", "Yes"], category="random")),
            f"mmmu.{kind}": (
                "mmmu",
                {
                    f"q.{kind}": rows(
                        id=ids,
                        question=ASKED,
                        options=[str(o) for o in options],
                        answer=letters,
                        image_1=names(),
                        image_2=names(),
                    )
                },
            ),
            f"ai2d.{kind}": (
                "ai2d",
                plain(
                    kind,
                    options=[json.dumps(o) for o in options] if text else options,
                    answer=["0", "1", "2", "0", "1"],
                ),
            ),
            f"mmstar.{kind}": ("mmstar", plain(kind, answer=letters, category="coarse", l2_category="fine")),
            f"base64.{kind}": ("anls", {f"q.{kind}": rows(question=ASKED, image=shown, answers=SAID)}),
        }
    return {
        name: (task, {k: v if isinstance(v, bytes) else copied(v) for k, v in files.items()})
        for name, (task, files) in found.items()
    }


def copied(value: Any) -> Any:
    """A deep copy in which no object stands in two places."""
    return json.loads(json.dumps(value))


PICTURES = [
    *names(),
    *names("v{}.jpg"),
    *names("n{}.jpg"),
    *names("t{}.jpg"),
    *names("{}_x"),
    *names("documents/{}.png"),
    *names("a/{}.jpg"),
    *names("hallusion_bench/VD/{}.png"),
    *(f"COCO_val2014_{262148 + i:012d}.jpg" for i in range(N)),
    *(f"images/test/{1000 + 37 * i}/image.png" for i in range(N)),
    *(f"{part}/{i}.png" for part in ("color", "OCR") for i in range(2)),
]


def dump(name: str, content: Any, checksum: bool = True) -> bytes:
    """A file as its suffix has it."""
    kind = name.rsplit(".", 1)[1]
    if isinstance(content, bytes):
        return content
    if kind == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content).encode("utf-8", "surrogatepass")
    if kind == "json":
        return json.dumps(content, indent=random.choice((None, 1))).encode()
    if kind == "parquet":
        import pyarrow
        from pyarrow import parquet

        file = io.BytesIO()
        columns = dict.fromkeys(column for row in content for column in row)
        table = pyarrow.table({column: [row.get(column) for row in content] for column in columns})
        parquet.write_table(table, file, write_page_checksum=checksum)
        return file.getvalue()
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",", lineterminator=random.choice(("\n", "\r\n")))
    columns = list(dict.fromkeys(column for row in content for column in row))
    writer.writerow(columns)
    writer.writerows([[row.get(column, "") for column in columns] for row in content])
    return text.getvalue().encode("utf-8", "surrogatepass")


BYTES = b",\t\n\r\"'[]{}:;\\ .0179aAzZ_-/\x00\x01\x7f\x80\xc3\xe2\xff"
VALUES = [
    None,
    "",
    " ",
    "nan",
    "None",
    "null",
    "NaN",
    float("nan"),
    float("inf"),
    True,
    False,
    0,
    1,
    2,
    -1,
    7,
    99,
    1.0,
    2.5,
    10**30,
    [],
    [None],
    ["red"],
    ["red", 3],
    [float("nan")],
    [[]],
    {},
    {"a": 1},
    {"answer": "red"},
    [{"answer": None}],
    "A",
    "(B)",
    "b",
    " B",
    "D.",
    "E",
    "yes",
    "no ",
    "TRUE",
    "red",
    "['a' 'b']",
    "['a', 'b'",
    "[1 2 3]",
    "['a', nan]",
    "['a' ... 'b']",
    "[",
    "{",
    "array(['a'], dtype=object)",
    "('a', 'b')",
    "a\tb",
    "a\nb",
    'a"b',
    '"',
    "a,b",
    "a\u2028b",
    "a\u0085b",
    "x\0y",
    "\ud83d",
    "../0.png",
    "0.png",
    "/",
    ".",
    "x" * 300,
    "data:image/png;base64,!!",
    "iVBORw0KGgo=",
]


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths to all values of a file, objects and lists as well."""
    found = [path] if path else []
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [leaf for key, one in inner for leaf in leaves(one, (*path, key))]


def changed_field(content: Any, rng: random.Random) -> tuple[Any, tuple[Any, ...]]:
    """Another value in one place of a file, or none there, or another name for it."""
    path = rng.choice(leaves(content))
    made = copy.deepcopy(content)
    here = made
    for key in path[:-1]:
        here = here[key]
    how = rng.random()
    if how < 0.1:
        del here[path[-1]]
    elif how < 0.2 and isinstance(here, dict) and isinstance(path[-1], str):
        at = rng.randrange(len(path[-1]))
        name = path[-1][:at] + rng.choice("aexyz_0 -") + path[-1][at + 1 :]
        items = [(name if key == path[-1] else key, value) for key, value in here.items()]
        here.clear()
        here.update(items)
    else:
        here[path[-1]] = rng.choice(VALUES)
    return made, path


def changed_byte(content: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(content))
    new = bytes([rng.choice(BYTES) if rng.random() < 0.7 else rng.randrange(256)])
    how = rng.random()
    return content[:at] + (new if how < 0.8 else new + content[at : at + 1] if how < 0.9 else b"") + content[at + 1 :]


def told(question: Question) -> tuple[Any, ...]:
    return tuple(getattr(question, part) for part in PARTS)


PLACE = re.compile(
    r"(row|line|entry|lines) \d|\(line|pid_splits|two columns are called|is empty|no whole Parquet|expected an? "
    r"|no rows|lines, but|but it says"
    r"|\.json: no column|\.json, column|\.json, (questions|data|annotations), column|\.json, question_type"
)
"""What names a row, or a fault of a file as a whole."""


def leaves_out(field: tuple[Any, ...] | None) -> bool:
    """Whether a question goes with a field: a whole row, its picture or its entry in the split (ScienceQA and such)."""
    return field is not None and (len(field) <= 2 or bool({"image", "filename", "data_type", "test"} & set(field)))


def verdict(before: list[Question], after: Any, files: Files, task: str, field: tuple[Any, ...] | None) -> str:
    """same, value or refused; or what is wrong."""
    if isinstance(after, BaseException):
        message = str(after)
        if type(after) is not ValueError:
            return f"WRONG: {type(after).__name__}: {message[:200]}"
        if not any(Path(name).name in message for name in files):
            return f"WRONG: no file in {message[:300]!r}"
        return "refused" if re.search(PLACE, message) else f"WRONG: no row in {message[:300]!r}"
    if len(after) != len(before):
        left_out = (
            field is not None and len(before) - len(after) == 1 and all(told(q) in map(told, before) for q in after)
        )
        return "row" if left_out and leaves_out(field) else f"WRONG: {len(after)} questions of {len(before)}"
    differ = [
        (i, part)
        for i, (one, other) in enumerate(zip(map(told, before), map(told, after), strict=True))
        for part, x, y in zip(PARTS, one, other, strict=True)
        if x != y
    ]
    if not differ:
        return "same"
    parts = {part for _, part in differ}
    places = {i for i, _ in differ}
    at = next((key for key in (field or ())[:2] if isinstance(key, int)), None)
    one = len(places) == 1 and len(parts) == 1 and (at is None or places == {at} or {i % N for i in places} == {at})
    shared = (parts == {"kind"} and task == "seedbench") or (parts == {"images"} and task == "mmbench")
    moved = field is not None and at is None and len(places) == 1 and (len(field) <= 2 or "test" in field)
    return "value" if one or shared or moved else f"WRONG: {differ[:6]}"


def run(folder: Path, count: int, seed: int, only: str = "") -> tuple[Counter[str], list[str]]:
    """Counts of verdicts over `count` changed files, and what went wrong."""
    rng = random.Random(seed)
    random.seed(seed)
    cases = {name: case for name, case in layouts().items() if only in name}
    homes: dict[str, tuple[Path, list[Question], dict[str, bytes]]] = {}
    for name, (task, files) in cases.items():
        home = folder / name.replace(".", "_")
        for picture in PICTURES:
            (home / picture).parent.mkdir(parents=True, exist_ok=True)
            (home / picture).write_bytes(PNG)
        dumped = {file: dump(file, content) for file, content in files.items()}
        for file, content in dumped.items():
            (home / file).parent.mkdir(parents=True, exist_ok=True)
            (home / file).write_bytes(content)
        homes[name] = home, list(read_questions(task, home)), dumped
        assert len(homes[name][1]) == {"mme": 8, "pope": 15, "chartqa": 10}.get(name, N), name
    found: Counter[str] = Counter()
    wrong: list[str] = []
    for _ in range(count):
        name = rng.choice(list(cases))
        task, files = cases[name]
        home, before, dumped = homes[name]
        file = rng.choice(list(files))
        field = None
        if isinstance(files[file], bytes) or rng.random() < 0.5:
            content = changed_byte(dumped[file], rng)
        else:
            made, field = changed_field(files[file], rng)
            try:
                content = dump(file, made)
            except Exception:  # what Parquet or CSV cannot hold, and rows that are none
                continue
        (home / file).write_bytes(content)
        try:
            after: Any = read_questions(task, home)
        except BaseException as error:
            after = error
        result = verdict(before, after, files, task, field)
        found[result.split(":")[0]] += 1
        if result.startswith("WRONG"):
            at = next((i for i, (a, b) in enumerate(zip(content, dumped[file], strict=False)) if a != b), -1)
            wrong.append(f"{name} {file} field={field} byte={at} {content[max(0, at - 30) : at + 30]!r}: {result}")
        (home / file).write_bytes(dumped[file])
    return found, wrong


def test_some_hundreds_of_changed_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    found, wrong = run(tmp_path, 600, seed=1)
    assert not wrong, "\n".join(wrong[:5])
    assert min(found["same"], found["value"], found["refused"]) > 20  # the changes reach every outcome


@pytest.mark.slow
def test_twenty_thousand_changed_tables(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    found, wrong = run(tmp_path, 22_000, seed=2)
    assert sum(found.values()) >= 20_000 and not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:5]])
