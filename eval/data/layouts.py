# SPDX-License-Identifier: Apache-2.0
"""The files in which benchmarks come, as their sites and LLaVA's evaluation folder have them."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from .files import PICTURES, Folder, Images, load_json, load_table, need
from .plain import table_questions
from .question import Question

Reader: TypeAlias = Callable[[Folder, "Path | None", "str | None"], list[Question]]
LAYOUTS: dict[str, tuple[tuple[str, ...], Reader]] = {}
"""Benchmark -> (names that its file of questions may have, reader)."""


def layout(name: str, *patterns: str) -> Callable[[Reader], Reader]:
    def add(reader: Reader) -> Reader:
        LAYOUTS[name] = (patterns, reader)
        return reader

    return add


def _coco(what: str) -> Reader:
    """VQAv2 and OK-VQA: a file of questions, one of annotations, pictures of COCO."""

    def read(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
        path = folder.main(what, LAYOUTS[what][0], split)
        part = path.name.split("mscoco_")[1].removesuffix("_questions.json")
        prefix = "v2_" if what == "vqav2" else ""
        annotations = f"{prefix}mscoco_{part}_annotations.json"
        if not folder.matching(annotations):
            raise ValueError(
                f"{folder.root}: {annotations} is missing; sets without public answers (test) can only be asked as a plain "
                "table, for the agreement with the uncompressed model"
            )
        asked, known = load_json(path), load_json(folder.other("the answers", annotations))
        gold = {row["question_id"]: row for row in known["annotations"]}
        subtype = asked.get("data_subtype", part)
        finder = Images(folder, images, subtype, "images")
        found = []
        for number, row in enumerate(asked["questions"]):
            answer = gold.get(need(row, "question_id", path, number))
            if answer is None:
                raise ValueError(f"{path}: question {row['question_id']} has no annotation in {annotations}")
            found.append(
                Question(
                    id=str(row["question_id"]),
                    text=row["question"],
                    images=(finder.find(f"COCO_{subtype}_{row['image_id']:012d}.jpg", f"{row['image_id']:012d}.jpg"),),
                    answers=tuple(entry["answer"] for entry in answer["answers"]),
                    kind=answer.get("answer_type", ""),
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
            id=Path(need(row, "image", path, i)).stem,
            text=row["question"],
            images=(finder.find(row["image"]),),
            answers=tuple(entry["answer"] for entry in need(row, "answers", path, i)),
            kind=row.get("answer_type", ""),
        )
        for i, row in enumerate(load_table(path))
    ]
    finder.check()
    return found


@layout("gqa", "testdev_balanced_questions.json", "val_balanced_questions.json")
def _gqa(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    path = folder.main("GQA", LAYOUTS["gqa"][0], split)
    rows: dict[str, Any] = load_json(path)
    finder = Images(folder, images, "images")
    found = [
        Question(
            id=key,
            text=row["question"],
            images=(finder.find(f"{row['imageId']}.jpg"),),
            answers=(row["answer"],),
            kind=(row.get("types") or {}).get("structural") or "",
        )
        for key, row in rows.items()
    ]
    finder.check()
    return found


@layout("textvqa", "TextVQA_*_val.json", "TextVQA_*_train.json")
def _textvqa(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """With `llava_textvqa_val_v051_ocr.jsonl` of LLaVA beside it, the words that its prompt shows are known too."""
    path = folder.main("TextVQA", LAYOUTS["textvqa"][0], split)
    finder = Images(folder, images, "train_images", "train_val_images", "images")
    words: dict[tuple[str, str], str] = {}
    for shown in folder.matching("llava_textvqa_*ocr.jsonl"):
        for row in load_table(shown):
            text, *lines = row["text"].split("\n")
            tokens = [
                line.removeprefix("Reference OCR token:").strip() for line in lines if line.startswith("Reference")
            ]
            words[str(row["question_id"]), text.lower()] = tokens[0] if tokens else ""
    found = []
    for number, row in enumerate(load_json(path)["data"]):
        name = need(row, "image_id", path, number)
        extra = {"ocr": words[name, row["question"].lower()]} if (name, row["question"].lower()) in words else {}
        found.append(
            Question(
                id=str(row.get("question_id", number)),
                text=row["question"],
                images=(finder.find(f"{name}.jpg", f"{name}.png"),),
                answers=tuple(row.get("answers", ())),
                extra=extra,
            )
        )
    finder.check()
    return found


@layout("pope", "coco_pope_*.json", "coco_pope_*.jsonl")
def _pope(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """All files that are there (random, popular, adversarial); kind is the split."""
    paths = folder.matching(*LAYOUTS["pope"][0])
    if folder.file:
        paths = [folder.file]
    if split:
        paths = [path for path in paths if split in path.stem]
    if not paths:
        folder.main("POPE", LAYOUTS["pope"][0], split)  # raises
    finder = Images(folder, images, "val2014", "images")
    found = []
    for path in paths:
        part = path.stem.removeprefix("coco_pope_")
        for number, row in enumerate(load_table(path)):
            found.append(
                Question(
                    id=f"{part}/{need(row, 'question_id', path, number)}",
                    text=need(row, "text", path, number),
                    images=(finder.find(need(row, "image", path, number)),),
                    answers=(need(row, "label", path, number),),
                    kind=part,
                )
            )
    finder.check()
    return found


@layout("scienceqa", "problems.json")
def _scienceqa(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """Questions with a picture of a split (test by default). The text of `llava_test_CQM-A.json`, if it is there, is used with
    protocol llava."""
    path = folder.main("ScienceQA", LAYOUTS["scienceqa"][0])
    split = split or "test"
    splits = load_json(folder.other("the splits", "pid_splits.json"))
    if split not in splits:
        raise ValueError(f"--split {split}: pid_splits.json has {', '.join(splits)}")
    problems = load_json(path)
    shown = {
        str(row["id"]): row["conversations"][0]["value"].replace("<image>", "").strip()
        for file in folder.matching(f"llava_{split}_CQM-A.json")
        for row in load_json(file)
    }
    finder = Images(folder, images, f"images/{split}", split, "images")
    found = []
    for key in splits[split]:
        row = problems[key]
        if not row.get("image"):
            continue
        found.append(
            Question(
                id=str(key),
                text=row["question"],
                images=(finder.find(f"{key}/{row['image']}", f"{split}/{key}/{row['image']}"),),
                answers=(string.ascii_uppercase[row["answer"]],),
                options=tuple(zip(string.ascii_uppercase, row["choices"], strict=False)),
                hint=row.get("hint", ""),
                kind=row.get("subject", ""),
                extra={"llava_text": shown[str(key)]} if str(key) in shown else {},
            )
        )
    finder.check()
    return found


@layout("mme", "*.txt")
def _mme(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """A folder per category with pictures and a text file for each: two lines `question<tab>Yes`. Both may lie in folders of
    their own, images and questions_answers_YN."""
    found = []
    for path in folder.matching("*.txt"):
        lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        parts = [line.split("\t") for line in lines]
        if not parts or any(len(part) != 2 or part[1].strip() not in ("Yes", "No") for part in parts):
            continue  # a read-me
        home = path.parent.parent if path.parent.name == "questions_answers_YN" else path.parent
        places = [images / home.name] if images else [path.parent, home / "images", home]
        picture = _beside(path.stem, places)
        if picture is None:
            raise ValueError(
                f"{path}: its picture is missing: looked for {path.stem}.jpg, .png, ... in {', '.join(map(str, places))}"
            )
        for i, (text, answer) in enumerate(parts):
            found.append(
                Question(
                    id=f"{home.name}/{picture.name}/{i}",
                    text=text.strip(),
                    images=(picture,),
                    answers=(answer.strip(),),
                    kind=home.name,
                    group=f"{home.name}/{picture.name}",
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


@layout("mmbench", "mmbench_*.tsv", "MMBench_*.tsv")
def _mmbench(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    path = folder.main("MMBench", LAYOUTS["mmbench"][0], split)
    rows = load_table(path)
    pictures = {row["index"]: row["image"] for row in rows}
    for number, row in enumerate(rows):
        need(row, "index", path, number)
        if row["image"] in pictures and len(row["image"]) < 64:  # the picture of another row
            row["image"] = pictures[row["image"]]
    return table_questions(rows, path, Images(folder, images, "images"))


@layout("seedbench", "SEED-Bench.json")
def _seedbench(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """The questions about single images."""
    path = folder.main("SEED-Bench", LAYOUTS["seedbench"][0])
    content = load_json(path)
    kinds = {str(number): name for name, number in content.get("question_type", {}).items()}
    finder = Images(folder, images, "SEED-Bench-image", "images")
    found = [
        Question(
            id=str(need(row, "question_id", path, i)),
            text=row["question"],
            images=(finder.find(row["data_id"], f"{row['data_id']}.jpg"),),
            answers=(row["answer"],),
            options=tuple(
                (letter.upper(), row[f"choice_{letter}"]) for letter in "abcd" if row.get(f"choice_{letter}")
            ),
            kind=kinds.get(str(row.get("question_type_id")), ""),
        )
        for i, row in enumerate(content["questions"])
        if row.get("data_type", "image") == "image"
    ]
    finder.check()
    return found


@layout("chartqa", "test_human.json", "test_augmented.json")
def _chartqa(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """Both parts of a split (test by default); kind is human or augmented."""
    split = split or "test"
    paths = [folder.file] if folder.file else folder.matching(f"{split}_human.json", f"{split}_augmented.json")
    if not paths:
        folder.main("ChartQA", (f"{split}_human.json", f"{split}_augmented.json"))  # raises
    finder = Images(folder, images, f"{split}/png", "png", "images")
    found = []
    for path in paths:
        part = path.stem.removeprefix(f"{split}_")
        for number, row in enumerate(load_table(path)):
            found.append(
                Question(
                    id=f"{part}/{number}",
                    text=need(row, "query", path, number),
                    images=(finder.find(need(row, "imgname", path, number)),),
                    answers=(str(need(row, "label", path, number)),),
                    kind=part,
                )
            )
    finder.check()
    return found


def _documents(what: str, title: str, *folders: str) -> Reader:
    """DocVQA and InfoVQA."""

    def read(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
        path = folder.main(title, LAYOUTS[what][0], split)
        finder = Images(folder, images, *folders)
        found = []
        for number, row in enumerate(load_json(path)["data"]):
            names = [row.get("image_local_name"), row.get("image")]
            shown = [name for given in names if given for name in (given, Path(given).name)]
            if not shown:
                raise ValueError(f"{path}, row {number}: no 'image' in it; it has {', '.join(row)}")
            found.append(
                Question(
                    id=str(need(row, "questionId", path, number)),
                    text=row["question"],
                    images=(finder.find(*shown),),
                    answers=tuple(row.get("answers", ())),
                    kind=(row.get("question_types") or [""])[0],
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
    path = folder.main("OCRBench", LAYOUTS["ocrbench"][0])
    rows = load_table(path)
    finder = Images(folder, images, "OCRBench_Images", "images")
    found = []
    for number, row in enumerate(rows):
        answers = row.get("answers", row.get("answer"))
        found.append(
            Question(
                id=str(row.get("id", number)),
                text=row["question"],
                images=(finder.find(row.get("image_path") or need(row, "image", path, number)),),
                answers=tuple(answers) if isinstance(answers, list) else (str(answers),),
                kind=row.get("type") or row.get("question_type", ""),
                extra={"dataset": row.get("dataset_name") or row.get("dataset", "")},
            )
        )
    finder.check()
    return found


@layout("hallusionbench", "HallusionBench.json")
def _hallusionbench(folder: Folder, images: Path | None, split: str | None) -> list[Question]:
    """The questions with a picture."""
    path = folder.main("HallusionBench", LAYOUTS["hallusionbench"][0])
    finder = Images(folder, images, "hallusion_bench", "images")
    names = ("category", "subcategory", "set_id", "figure_id", "question_id")
    found = []
    for number, row in enumerate(load_table(path)):
        if not row.get("filename"):
            continue
        file = re.sub(r"^\./", "", row["filename"])
        extra = {name: str(need(row, name, path, number)) for name in names}
        found.append(
            Question(
                id="/".join(extra.values()),
                text=row["question"],
                images=(finder.find(file, file.removeprefix("hallusion_bench/")),),
                answers=(str(row["gt_answer"]),),
                kind=row["subcategory"],
                extra=extra,
            )
        )
    finder.check()
    return found
