# SPDX-License-Identifier: Apache-2.0
"""The files in which benchmarks come, as their sites and LLaVA's evaluation folder have them."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeAlias

from .files import PICTURES, Folder, Images
from .plain import golds, is_video, letter_of, options_of, table_questions
from .question import Question
from .rows import COLUMNS, Row, blank
from .tables import document, objects, read_json, read_rows, read_text

Reader: TypeAlias = Callable[[Folder, "Path | None", "str | None"], list[Question]]
LAYOUTS: dict[str, tuple[tuple[str, ...], Reader]] = {}
"""Benchmark -> (names that its file of questions may have, reader)."""
HALLUSION_KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")
POPE_PARTS = ("adversarial", "popular", "random")


def layout(name: str, *patterns: str) -> Callable[[Reader], Reader]:
    def add(reader: Reader) -> Reader:
        LAYOUTS[name] = (patterns, reader)
        return reader

    return add


def all_parts(what: str, wanted: Iterable[str], found: Iterable[str], root: Path) -> None:
    """Raises ValueError if parts of a benchmark are missing, or others are there too: its score is over all of them."""
    wanted, found = list(wanted), list(found)
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(
            f"{root}: {what} has the parts {', '.join(wanted)}, and {', '.join(missing)} is missing; one part alone is asked by "
            "--data FILE"
        )
    if others := [name for name in found if name not in wanted]:
        raise ValueError(
            f"{root}: {what} has the parts {', '.join(wanted)}, and {', '.join(others)} is none; say --data FILE"
        )


def _coco(what: str) -> Reader:
    """VQAv2 and OK-VQA: a file of questions, one of annotations, pictures of COCO."""

    def read(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
        path = folder.main(what, LAYOUTS[what][0], split)
        part = re.sub("(?i)^.*mscoco_|_questions.json$", "", path.name)
        prefix = "v2_" if what == "vqav2" else ""
        annotations = f"{prefix}mscoco_{part}_annotations.json"
        if not folder.matching(annotations):
            raise ValueError(
                f"{folder.root}: {annotations} is missing; sets without public answers (test) can only be asked as a plain "
                "table, for the agreement with the uncompressed model"
            )
        asked, known = document(path), document(folder.other("the answers", annotations))
        gold: dict[str, Row] = {}
        for row in known.rows("annotations"):
            if (first := gold.setdefault(row.text("question_id"), row)) is not row:
                raise row.wrong("question_id", row.text("question_id"), f"which {first.place} has already")
        subtype = asked.maybe("data_subtype") or part
        finder = Images(folder, images, subtype, "images")
        found = []
        for row in asked.rows("questions"):
            key, image = row.text("question_id"), row.integer("image_id")
            if key not in gold:
                raise row.wrong("question_id", key, f"which has no annotation in {annotations}")
            names = (f"COCO_{subtype}_{image:012d}.jpg", f"{image:012d}.jpg")
            found.append(
                Question(
                    id=key,
                    text=row.text("question"),
                    images=(finder.find(*names, place=row.place),),
                    answers=gold[key].texts("answers"),
                    kind=gold[key].label("answer_type"),
                    place=row.place,
                )
            )
        finder.check()
        return found

    return read


layout("vqav2", "v2_OpenEnded_mscoco_*_questions.json")(_coco("vqav2"))
layout("okvqa", "OpenEnded_mscoco_*_questions.json")(_coco("okvqa"))


@layout("vizwiz", "val.json", "train.json")
def _vizwiz(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    path = folder.main("VizWiz", LAYOUTS["vizwiz"][0], split)
    finder = Images(folder, images, path.stem, "images")
    found = [
        Question(
            id=Path(row.text("image")).stem,
            text=row.text("question"),
            images=(finder.find(row.text("image"), place=row.place),),
            answers=row.texts("answers"),
            kind=row.label("answer_type"),
            place=row.place,
        )
        for row in read_rows(path)
    ]
    finder.check()
    return found


@layout("gqa", "testdev_balanced_questions.json", "val_balanced_questions.json")
def _gqa(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    path = folder.main("GQA", LAYOUTS["gqa"][0], split)
    finder = Images(folder, images, "images")
    found = [
        Question(
            id=key,
            text=row.text("question"),
            images=(finder.find(f"{row.text('imageid')}.jpg", place=row.place),),
            answers=(row.text("answer"),),
            kind=row.label("types"),
            place=row.place,
        )
        for key, row in objects(path)
    ]
    finder.check()
    return found


@layout("textvqa", "TextVQA_[0-9]*_val.json", "TextVQA_[0-9]*_train.json")
def _textvqa(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """With `llava_textvqa_val_v051_ocr.jsonl` of LLaVA beside it, the words that its prompt shows are known too."""
    path = folder.main("TextVQA", LAYOUTS["textvqa"][0], split)
    finder = Images(folder, images, "train_images", "train_val_images", "images")
    words: dict[tuple[str, str], str] = {}
    for shown in folder.matching("llava_textvqa_*ocr.jsonl"):
        for row in read_rows(shown):
            text, *lines = row.text("text").split("\n")
            tokens = [
                line.removeprefix("Reference OCR token:").strip() for line in lines if line.startswith("Reference")
            ]
            words[row.text("question_id"), text.lower()] = tokens[0] if tokens else ""
    found = []
    for number, row in enumerate(document(path).rows("data")):
        name, text = row.text("image_id"), row.text("question")
        extra = {"ocr": words[name, text.lower()]} if (name, text.lower()) in words else {}
        found.append(
            Question(
                id=row.text("question_id") if row.column("question_id") else str(number),
                text=text,
                images=(finder.find(f"{name}.jpg", f"{name}.png", place=row.place),),
                answers=row.texts("answers"),
                extra=extra,
                place=row.place,
            )
        )
    without = [question for question in found if "ocr" not in question.extra]
    if 0 < len(without) < len(found):
        raise ValueError(
            f"{without[0].place}: LLaVA's file of OCR words beside it does not have this question, but others"
        )
    finder.check()
    return found


@layout("pope", "coco_pope_*.json", "coco_pope_*.jsonl")
def _pope(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """All three files (adversarial, popular, random), or one of them by split or as the file; kind is the split."""
    paths = [folder.file] if folder.file else folder.matching(*LAYOUTS["pope"][0])
    of = {path: path.stem.lower().removeprefix("coco_pope_") for path in paths}
    if split:
        paths = [path for path in paths if of[path] == split]
    if not paths:
        folder.main("POPE", LAYOUTS["pope"][0], split)  # raises
    elif not split and not folder.file:
        all_parts("POPE", POPE_PARTS, of.values(), folder.root)
    finder = Images(folder, images, "val2014", "images")
    found = [
        Question(
            id=f"{of[path]}/{row.text('question_id')}",
            text=row.text("text"),
            images=(finder.find(row.text("image"), place=row.place),),
            answers=(row.yesno(*row.need("label")),),
            kind=of[path],
            place=row.place,
        )
        for path in paths
        for row in read_rows(path)
    ]
    finder.check()
    return found


@layout("scienceqa", "problems.json")
def _scienceqa(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """Questions with a picture of a split (test by default). The text of `llava_test_CQM-A.json`, if it is there, is used with
    protocol llava."""
    path = folder.main("ScienceQA", LAYOUTS["scienceqa"][0])
    split = split or "test"
    listed = folder.other("the splits", "pid_splits.json")
    splits = read_json(listed)
    if not isinstance(splits, dict) or not isinstance(splits.get(split), list):
        there = ", ".join(splits) if isinstance(splits, dict) else "no splits"
        raise ValueError(f"--split {split}: {listed.name} has {there} ({listed}, for {path})")
    problems = dict(objects(path))
    shown = {}
    for file in folder.matching(f"llava_{split}_CQM-A.json"):
        for row in read_rows(file):
            turn = row.rows("conversations")[0]
            shown[row.text("id")] = turn.text("value").replace("<image>", "").strip()
    finder = Images(folder, images, f"images/{split}", split, "images")
    found = []
    for number, key in enumerate(map(str, splits[split]), 1):
        if key not in problems:
            raise ValueError(f"{listed}, {split}, entry {number}: got {key!r}, but {path} has no such problem")
        row = problems[key]
        image = row.maybe("image")
        if not image:
            continue
        options = tuple(zip(string.ascii_uppercase, row.texts("choices"), strict=False))
        answer = row.integer("answer")
        if not 0 <= answer < len(options):
            raise row.wrong("answer", answer, f"the number of a choice from 0 to {len(options) - 1} is needed")
        found.append(
            Question(
                id=key,
                text=row.text("question"),
                images=(finder.find(f"{key}/{image}", f"{split}/{key}/{image}", place=row.place),),
                answers=(string.ascii_uppercase[answer],),
                options=options,
                hint=row.maybe("hint"),
                kind=row.label("subject"),
                extra={"llava_text": shown[key]} if key in shown else {},
                place=row.place,
            )
        )
    without = [question for question in found if not question.extra]
    if 0 < len(without) < len(found):
        raise ValueError(f"{without[0].place}: llava_{split}_CQM-A.json does not have this question, but others")
    finder.check()
    return found


@layout("mme", "*.txt")
def _mme(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """A folder per category with pictures and a text file for each: two lines `question<tab>Yes`. Both may lie in folders of
    their own, images and questions_answers_YN. Other text files (a read-me) have no picture of their name."""
    found = []
    for path in folder.matching("*.txt"):
        home = path.parent.parent if path.parent.name == "questions_answers_YN" else path.parent
        places = [images / home.name] if images else [path.parent, home / "images", home]
        picture = _beside(path.stem, places)
        lines = [(i, line) for i, line in enumerate(read_text(path).split("\n"), 1) if line.strip()] if picture else []
        if picture is None:
            if path.parent != home or re.search(rb"(?i)\t[ \t]*(yes|no)\s*$", path.read_bytes()):
                raise ValueError(
                    f"{path}: its picture is missing: looked for {path.stem}.jpg, .png, ... in {', '.join(map(str, places))}"
                )
            continue
        if len(lines) != 2:
            raise ValueError(f"{path}: {len(lines)} lines, but there are two questions about each picture of MME")
        for i, (line, content) in enumerate(lines):
            text, _, answer = content.rstrip().partition("\t")
            row = Row(
                f"{path}, row {i + 1} (line {line})", {"question": text.strip(), "answer": answer.strip()}, typed=False
            )
            found.append(
                Question(
                    id=f"{home.name}/{picture.name}/{i}",
                    text=row.text("question"),
                    images=(picture,),
                    answers=(row.yesno(*row.need("answer")).capitalize(),),
                    kind=home.name,
                    group=f"{home.name}/{picture.name}",
                    place=row.place,
                )
            )
    if not found:
        raise ValueError(
            f"{folder.root}: no questions of MME: looked for CATEGORY/PICTURE.txt with lines 'question<tab>Yes', found "
            f"{folder.inventory()}"
        )
    return found


def _beside(stem: str, places: list[Path]) -> Path | None:
    paths = (place / f"{stem}{kind}" for place in places for kind in PICTURES)
    return next((path for path in paths if path.is_file()), None)


@layout("mmbench", "mmbench_*.tsv")
def _mmbench(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    path = folder.main("MMBench", LAYOUTS["mmbench"][0], split)
    rows = read_rows(path)
    for row in rows:
        if "image" not in row.fields:
            raise ValueError(
                f"{row.place}: no column 'image' with pictures in base64; it has {', '.join(row.names.values())}. A table with "
                "paths is read under a name of its own, not mmbench_*.tsv"
            )
    pictures = {row.text("index"): row.text("image") for row in rows}
    for row in rows:
        shown = row.text("image")
        if len(shown) < 64 and shown in pictures:  # the picture of another row
            row.fields["image"] = pictures[shown]
    return table_questions(rows, Images(folder, images, "images"), "mmbench")


@layout("seedbench", "SEED-Bench.json")
def _seedbench(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """The questions about single images."""
    content = document(folder.main("SEED-Bench", LAYOUTS["seedbench"][0]))
    named = content.row("question_type") if content.column("question_type") else Row(content.place, {})
    kinds = {str(number): named.names[name] for name, number in named.fields.items()}
    finder = Images(folder, images, "SEED-Bench-image", "images")
    found = []
    for row in content.rows("questions"):
        if is_video(row):
            continue
        options = options_of(row)
        name = row.text("data_id")
        found.append(
            Question(
                id=row.text("question_id"),
                text=row.text("question"),
                images=(finder.find(name, f"{name}.jpg", place=row.place),),
                answers=(letter_of(row, "answer", row.text("answer"), options),),
                options=options,
                kind=kinds.get(row.maybe("question_type_id"), ""),
                place=row.place,
            )
        )
    finder.check()
    return found


@layout("chartqa", "test_human.json", "test_augmented.json")
def _chartqa(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """Both parts of a split (test by default); kind is human or augmented."""
    split = split or "test"
    names = (f"{split}_human.json", f"{split}_augmented.json")
    paths = [folder.file] if folder.file else folder.matching(*names)
    if not paths:
        folder.main("ChartQA", names)  # raises
    if not folder.file:
        all_parts("ChartQA", names, (path.name.lower() for path in paths), folder.root)
    finder = Images(folder, images, f"{split}/png", "png", "images")
    found = []
    for path in paths:
        part = path.stem.removeprefix(f"{split}_")
        for number, row in enumerate(read_rows(path)):
            found.append(
                Question(
                    id=f"{part}/{number}",
                    text=row.text("query"),
                    images=(finder.find(row.text("imgname"), place=row.place),),
                    answers=(row.text("label"),),
                    kind=part,
                    place=row.place,
                )
            )
    finder.check()
    return found


def _documents(what: str, title: str, *folders: str) -> Reader:
    """DocVQA and InfoVQA."""

    def read(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
        finder = Images(folder, images, *folders)
        found = []
        for row in document(folder.main(title, LAYOUTS[what][0], split)).rows("data"):
            given = row.text("image_local_name", "image")
            found.append(
                Question(
                    id=row.text("questionid"),
                    text=row.text("question"),
                    images=(finder.find(given, Path(given).name, place=row.place),),
                    answers=row.texts("answers"),
                    kind=row.label("question_types"),
                    place=row.place,
                )
            )
        finder.check()
        return found

    return read


layout("docvqa", "val_v1.0*.json")(_documents("docvqa", "DocVQA", "documents", "images"))
layout("infovqa", "infographicsVQA_val_*.json")(
    _documents("infovqa", "InfoVQA", "infographicsVQA_val_v1.0_images", "images")
)


@layout("ocrbench", "OCRBench.json")
def _ocrbench(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    finder = Images(folder, images, "OCRBench_Images", "images")
    found = []
    for number, row in enumerate(read_rows(folder.main("OCRBench", LAYOUTS["ocrbench"][0]))):
        found.append(
            Question(
                id=row.text("id") if row.column("id") else str(number),
                text=row.text("question"),
                images=(finder.find(row.text("image_path", "image"), place=row.place),),
                answers=row.texts("answers", "answer"),
                kind=row.label("type", "question_type"),
                extra={"dataset": row.text(*COLUMNS["dataset"])},
                place=row.place,
            )
        )
    finder.check()
    return found


@layout("hallusionbench", "HallusionBench.json")
def _hallusionbench(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """The questions with a picture."""
    finder = Images(folder, images, "hallusion_bench", "images")
    found = []
    for row in read_rows(folder.main("HallusionBench", LAYOUTS["hallusionbench"][0])):
        if blank(row.fields.get(row.column("filename") or "")):
            continue
        file = re.sub(r"^\./", "", row.text("filename"))
        extra = {name: row.text(name) for name in HALLUSION_KEY}
        found.append(
            Question(
                id="/".join(extra.values()),
                text=row.text("question"),
                images=(finder.find(file, file.removeprefix("hallusion_bench/"), place=row.place),),
                answers=golds(row, (), "hallusionbench") or (row.text("gt_answer"),),
                kind=row.text("subcategory"),
                extra=extra,
                place=row.place,
            )
        )
    finder.check()
    return found
