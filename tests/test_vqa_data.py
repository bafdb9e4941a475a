# SPDX-License-Identifier: Apache-2.0
"""Layouts on disk, written as their sites have them, and the prompts of the protocols."""

from __future__ import annotations

import base64
import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mmcompress.eval.data import Question, digest, open_picture, read_questions
from mmcompress.eval.data.question import PictureError
from mmcompress.eval.prompts import VICUNA, conversation, instruction, new_tokens, question_text
from mmcompress.eval.tasks import TASKS, task_of
from PIL import Image

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def picture(path: Path, color: str = "red") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), color).save(path)
    return path


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(file, "PNG")
    return file.getvalue()


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = isinstance(content, list) and path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content))
    return path


def ask(task: str, question: Question, protocol: str) -> str:
    return question_text(task_of(task), question, protocol)  # type: ignore[arg-type]


def vqav2(folder: Path, prefix: str = "v2_") -> None:
    ids = (262148000, 262148001)
    asked = [{"image_id": 262148, "question": f"Is it {i}?", "question_id": i} for i in ids]
    write(
        folder / f"{prefix}OpenEnded_mscoco_val2014_questions.json",
        {"info": {}, "data_type": "mscoco", "data_subtype": "val2014", "questions": asked},
    )
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": n} for n in range(1, 11)]
    told = [
        {"question_type": "is", "multiple_choice_answer": "yes", "answers": answers, "image_id": 262148,
         "answer_type": "yes/no", "question_id": i}
        for i in reversed(ids)
    ]  # fmt: skip
    write(folder / f"{prefix}mscoco_val2014_annotations.json", {"data_subtype": "val2014", "annotations": told})
    picture(folder / "val2014" / "COCO_val2014_000000262148.jpg")


def test_vqav2_and_okvqa(tmp_path: Path) -> None:
    vqav2(tmp_path)
    found = read_questions("vqav2", tmp_path)
    assert [q.id for q in found] == ["262148000", "262148001"]
    assert found[0].answers == ("yes",) * 10 and found[0].kind == "yes/no"
    assert open_picture(found[0].images[0]).size == (8, 6)
    assert ask("vqav2", found[0], "llava") == f"Is it 262148000?\n{SHORT}"
    vqav2(tmp_path, "")
    assert len(read_questions("okvqa", tmp_path)) == len(read_questions("vqav2", tmp_path)) == 2
    assert "Unanswerable" in ask("okvqa", found[0], "lmms") and "Unanswerable" not in ask("okvqa", found[0], "llava")
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(ValueError, match=r"v2_mscoco_val2014_annotations\.json is missing.*test"):
        read_questions("vqav2", tmp_path)


def test_gqa_in_llavas_evaluation_folder(tmp_path: Path) -> None:
    rows = {
        "201307251": {
            "imageId": "n161313",
            "question": "Is it overcast?",
            "answer": "no",
            "types": {"structural": "verify"},
        },
        "201640614": {
            "imageId": "n235859",
            "question": "Who is it?",
            "answer": "boy",
            "types": {"structural": "query"},
        },
    }
    write(tmp_path / "gqa/data/questions1.2/testdev_balanced_questions.json", rows)
    line = {
        "question_id": "201307251",
        "image": "n161313.jpg",
        "text": f"Is it overcast?\n{SHORT}",
        "category": "default",
    }
    write(tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl", [line])
    for name in ("n161313", "n235859"):
        picture(tmp_path / f"gqa/data/images/{name}.jpg")
    found = read_questions("gqa", tmp_path)
    assert [(q.id, q.answers, q.kind) for q in found] == [
        ("201307251", ("no",), "verify"),
        ("201640614", ("boy",), "query"),
    ]
    assert ask("gqa", found[0], "llava") == line["text"]
    write(tmp_path / "gqa/data/questions1.2/val_balanced_questions.json", {"1": rows["201307251"]})
    assert [len(read_questions("gqa", tmp_path, split=split)) for split in (None, "testdev", "val")] == [2, 2, 1]
    # LLaVA's own file as a plain table: no answers, the prompt is there
    plain = read_questions("exact", tmp_path / "gqa/llava_gqa_testdev_balanced.jsonl", tmp_path / "gqa/data/images")
    assert plain[0].answers == () and plain[0].text == line["text"]


def test_textvqa_with_and_without_the_words_of_llava(tmp_path: Path) -> None:
    row = {
        "question_id": 34602,
        "question": "What is the BRAND of it?",
        "image_id": "003a8ae2ef43b901",
        "answers": ["dakota"] * 10,
    }
    write(tmp_path / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": [row]})
    picture(tmp_path / "train_images/003a8ae2ef43b901.jpg")
    (without,) = read_questions("textvqa", tmp_path)
    assert ask("textvqa", without, "llava") == f"What is the BRAND of it?\n{SHORT}"
    text = f"what is the brand of it?\nReference OCR token: DAKOTA, DIGITAL\n{SHORT}"
    write(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [{"question_id": "003a8ae2ef43b901", "text": text}])
    (question,) = read_questions("textvqa", tmp_path)
    assert (
        ask("textvqa", question, "llava") == f"What is the BRAND of it?\nReference OCR token: DAKOTA, DIGITAL\n{SHORT}"
    )
    assert ask("textvqa", question, "lmms") == f"What is the brand of it?\n{SHORT}"
    assert ask("textvqa", question, "official") == f"What is the BRAND of it?\n{SHORT}"
    assert digest([question]) != digest([without])


def test_pope_reads_all_splits(tmp_path: Path) -> None:
    for split in ("random", "popular", "adversarial"):
        lines = [
            {
                "question_id": i,
                "image": "COCO_val2014_000000310196.jpg",
                "text": "Is there a dog in the image?",
                "label": label,
            }
            for i, label in enumerate(("yes", "no"), 1)
        ]
        (tmp_path / "coco").mkdir(exist_ok=True)
        (tmp_path / f"coco/coco_pope_{split}.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    picture(tmp_path / "val2014/COCO_val2014_000000310196.jpg")
    found = read_questions("pope", tmp_path)
    ids = [f"{part}/{i}" for part in ("adversarial", "popular", "random") for i in (1, 2)]
    assert [q.id for q in found] == ids and found[2].kind == "popular" and found[1].answers == ("no",)
    assert len(read_questions("pope", tmp_path, split="random")) == 2
    assert len(read_questions("pope", tmp_path / "coco/coco_pope_random.json", tmp_path / "val2014")) == 2


def test_mme_in_both_of_its_folder_forms(tmp_path: Path) -> None:
    home = tmp_path / "MME_Benchmark_release_version"
    text = "Is there a dog? Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    picture(home / "existence/0001.jpg")
    (home / "existence/0001.txt").write_text(text)
    picture(home / "posters/images/tt1.png")
    (home / "posters/questions_answers_YN").mkdir()
    (home / "posters/questions_answers_YN/tt1.txt").write_text(text)
    (home / "readme.txt").write_text("hello")
    found = read_questions("mme", tmp_path)
    assert [q.id for q in found] == [
        "existence/0001.jpg/0",
        "existence/0001.jpg/1",
        "posters/tt1.png/0",
        "posters/tt1.png/1",
    ]
    assert found[2].group == found[3].group == "posters/tt1.png" and found[3].answers == ("No",)
    assert ask("mme", found[0], "llava") == ask("mme", found[0], "lmms") == f"Is there a dog?\n{SHORT}"
    assert ask("mme", found[0], "official") == "Is there a dog? Please answer yes or no."
    (home / "existence/0001.jpg").unlink()
    with pytest.raises(ValueError, match=r"0001\.txt: its picture is missing"):
        read_questions("mme", tmp_path)


def test_scienceqa(tmp_path: Path) -> None:
    problem = {
        "question": "Which?",
        "choices": ["west", "east"],
        "answer": 1,
        "hint": "A map.",
        "image": "image.png",
        "subject": "s",
    }
    write(tmp_path / "problems.json", {"4": problem, "5": {**problem, "image": None}, "6": problem})
    write(tmp_path / "pid_splits.json", {"test": ["4", "5"], "val": ["6"]})
    picture(tmp_path / "images/test/4/image.png")
    (question,) = read_questions("scienceqa", tmp_path)
    assert question.id == "4" and question.answers == ("B",) and question.options == (("A", "west"), ("B", "east"))
    assert ask("scienceqa", question, "lmms") == f"Context: A map.\nWhich?\nA. west\nB. east\n{LETTER}"
    turns = [
        {"from": "human", "value": "<image>\nContext: A map.\nWhich?\nA. west\nB. east"},
        {"from": "gpt", "value": "B"},
    ]
    write(tmp_path / "llava_test_CQM-A.json", [{"id": "4", "image": "4/image.png", "conversations": turns}])
    (question,) = read_questions("scienceqa", tmp_path)
    assert ask("scienceqa", question, "llava") == f"Context: A map.\nWhich?\nA. west\nB. east\n{LETTER}"
    with pytest.raises(ValueError, match=r"--split train: pid_splits\.json has test, val"):
        read_questions("scienceqa", tmp_path, split="train")


def test_mmbench(tmp_path: Path) -> None:
    path = tmp_path / "mmbench_dev_20230712.tsv"
    columns = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "L2-category"]
    picture_ = base64.b64encode(Image.new("RGB", (40, 30)).tobytes() + b"x").decode()
    shown = base64.b64encode(png() + b" " * 600).decode()
    assert len(picture_) > 512
    with path.open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(columns)
        rows.writerow([241, "Which is it?", "nan", "cat", "dog", "nan", "", "A", "attribute", shown, "logic"])
        rows.writerow([1000241, "Which is it?", "a\nhint", "dog", "cat", "nan", "", "B", "attribute", "241", "logic"])
    first, second = read_questions("mmbench", tmp_path)
    assert first.options == (("A", "cat"), ("B", "dog")) and first.hint == "" and first.kind == "attribute"
    assert second.images == first.images and open_picture(first.images[0]).size == (8, 6)
    assert first.extra["l2_category"] == "logic"
    assert ask("mmbench", second, "llava") == f"a\nhint\nWhich is it?\nA. dog\nB. cat\n{LETTER}"
    assert ask("mmbench", first, "lmms") == f"Which is it?\nThere are several options:\nA. cat\nB. dog\n\n{LETTER}"
    rows_ = [task_of("mmbench").row(q, q.answers[0], "official") for q in (first, second)]
    assert rows_[0].cluster == rows_[1].cluster == "241"
    scores = task_of("mmbench").scores(rows_, "official")
    assert scores["circular"] == scores["category/attribute"] == scores["l2_category/logic"] == 1.0


def test_chartqa_docvqa_infovqa(tmp_path: Path) -> None:
    chart = tmp_path / "ChartQA Dataset/test"
    for part in ("human", "augmented"):
        write(chart / f"test_{part}.json", [{"imgname": "1.png", "query": f"How many, {part}?", "label": "14"}])
    picture(chart / "png/1.png")
    found = read_questions("chartqa", tmp_path)
    assert [(q.id, q.kind, q.answers) for q in found] == [
        ("human/0", "human", ("14",)),
        ("augmented/0", "augmented", ("14",)),
    ]
    assert ask("chartqa", found[0], "lmms") == "How many, human?\nAnswer the question with a single word."
    assert ask("chartqa", found[0], "official") == f"How many, human?\n{SHORT}"
    row = {
        "questionId": 49153,
        "question": "What?",
        "image": "documents/pybv0228_81.png",
        "answers": ["0.28"],
        "data_split": "val",
    }
    write(tmp_path / "doc/val_v1.0.json", {"dataset_name": "docvqa", "data": [row]})
    picture(tmp_path / "doc/documents/pybv0228_81.png")
    (question,) = read_questions("docvqa", tmp_path)
    assert (question.id, question.answers) == ("49153", ("0.28",))
    info = {"questionId": 1, "question": "What?", "image_local_name": "38477.jpeg", "answers": ["a"], "image_url": "x"}
    write(tmp_path / "info/infographicsVQA_val_v1.0_withQT.json", {"data": [info]})
    picture(tmp_path / "info/infographicsVQA_val_v1.0_images/38477.jpeg")
    assert read_questions("infovqa", tmp_path / "info")[0].images[0].name == "38477.jpeg"  # type: ignore[union-attr]


def test_vizwiz_seedbench_ocrbench_hallusionbench(tmp_path: Path) -> None:
    viz = {
        "image": "VizWiz_val_00000000.jpg",
        "question": "What?",
        "answers": [{"answer": "can", "answer_confidence": "yes"}] * 10,
    }
    write(tmp_path / "viz/Annotations/val.json", [viz])
    picture(tmp_path / "viz/val/VizWiz_val_00000000.jpg")
    (question,) = read_questions("vizwiz", tmp_path / "viz")
    assert question.answers == ("can",) * 10
    assert ask("vizwiz", question, "llava").startswith(
        "What?\nWhen the provided information is insufficient, respond with"
    )
    seed = {"answer": "B", "choice_a": "x", "choice_b": "y", "choice_c": "z", "choice_d": "w", "data_id": "1454426_2591111986",
            "data_type": "image", "question": "How?", "question_id": "101669", "question_type_id": 1}  # fmt: skip
    content = {"questions": [seed, {**seed, "data_type": "video"}], "question_type": {"Scene Understanding": 1}}
    write(tmp_path / "seed/SEED-Bench.json", content)
    picture(tmp_path / "seed/SEED-Bench-image/x.png").rename(tmp_path / "seed/SEED-Bench-image/1454426_2591111986")
    (question,) = read_questions("seedbench", tmp_path / "seed")
    assert question.kind == "Scene Understanding" and question.options[3] == ("D", "w")
    ocr = {
        "dataset_name": "HME100k",
        "type": "Formula",
        "id": 3,
        "question": "Write it",
        "image_path": "a/b.jpg",
        "answers": ["x ^ 2"],
    }
    write(tmp_path / "ocr/OCRBench.json", [ocr])
    picture(tmp_path / "ocr/OCRBench_Images/a/b.jpg")
    (question,) = read_questions("ocrbench", tmp_path / "ocr")
    assert task_of("ocrbench").row(question, "x^2", "official").value == 1
    assert ask("ocrbench", question, "lmms") == "Write it"
    hallu = {"category": "VD", "subcategory": "figure", "visual_input": "1", "set_id": "0", "figure_id": "1", "question_id": "2",
             "question": "Is it?", "gt_answer": "1", "filename": "./hallusion_bench/VD/figure/0_1.png"}  # fmt: skip
    write(tmp_path / "hallu/HallusionBench.json", [hallu, {**hallu, "filename": None}])
    picture(tmp_path / "hallu/hallusion_bench/VD/figure/0_1.png")
    (question,) = read_questions("hallusionbench", tmp_path / "hallu")
    rows = [task_of("hallusionbench").row(question, "Yes, it is", "lmms")]
    assert task_of("hallusionbench").scores(rows, "lmms") == {"aAcc": 1.0, "qAcc": 1.0, "fAcc": 1.0}


def test_plain_tables(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    picture(tmp_path / "images/a.png")
    rows = [
        {"question": "What?", "answer": "red", "image": "a.png", "category": "color"},
        {"question": "Who?", "image": "images/a.png"},
    ]
    found = read_questions("exact", write(tmp_path / "mine.jsonl", rows))
    assert [(q.id, q.answers, q.kind) for q in found] == [("0", ("red",), "color"), ("1", (), "")]
    (tmp_path / "mine.csv").write_text(
        "id,question,answers,image,options\nx,What?,B,a.png,\"['cat', 'dog']\"\ny,Who?,dog,a.png,\"['cat', 'dog']\"\n"
    )
    found = read_questions("letter", tmp_path / "mine.csv")
    assert [q.answers for q in found] == [("B",), ("B",)] and found[0].options == (("A", "cat"), ("B", "dog"))
    assert ask("letter", found[0], "official") == "What?\nA. cat\nB. dog"
    hub = [{"question": "Q", "answer": 1, "choices": ["0", "1"], "image": {"bytes": png("blue"), "path": None}}] * 2
    for shard in range(2):
        parquet.write_table(pyarrow.Table.from_pylist(hub), tmp_path / f"test-0000{shard}-of-00002.parquet")
    found = read_questions("scienceqa", tmp_path)
    assert [q.id for q in found] == ["0", "1", "2", "3"] and found[3].answers == ("B",)
    assert open_picture(found[3].images[0]).getpixel((0, 0)) == (0, 0, 255)
    twice = [
        {"question_id": "e/1.jpg", "question": f"{i}?", "answer": "Yes", "category": "existence", "image": "a.png"}
        for i in "ab"
    ]
    found = read_questions("mme", write(tmp_path / "mme.jsonl", twice))
    assert [q.id for q in found] == ["existence/e/1.jpg/0", "existence/e/1.jpg/1"] and found[0].group == found[1].group
    several = {
        "question": "Q <image 1> <image 2>",
        "options": "['x', 'y']",
        "answer": "A",
        "image_1": "a.png",
        "image_2": "a.png",
    }
    (question,) = read_questions("mmmu", write(tmp_path / "mmmu.jsonl", [several]))
    assert len(question.images) == 2 and ask("mmmu", question, "official").endswith(f"B. y\n\n{LETTER}")
    numbered = {"question": "How many?", "options": ["3", "2", "1", "0"], "answer": "2", "image": "a.png"}
    assert read_questions("ai2d", write(tmp_path / "ai2d.jsonl", [numbered]))[0].answers == ("C",)
    assert read_questions("letter", tmp_path / "ai2d.jsonl")[0].answers == ("B",)


def test_errors_say_what_is_wrong_and_what_is_there(tmp_path: Path) -> None:
    row = {"question": "What?", "answer": "red", "image": "a.png", "id": "7"}
    with pytest.raises(ValueError, match="no such file or folder"):
        read_questions("gqa", tmp_path / "nothing")
    with pytest.raises(
        ValueError, match=r"no questions of GQA: looked for testdev_balanced_questions\.json.*found nothing"
    ):
        read_questions("gqa", tmp_path)
    (tmp_path / "note.md").write_text("x")
    with pytest.raises(ValueError, match=r"found note\.md"):
        read_questions("gqa", tmp_path)
    with pytest.raises(ValueError, match=r"1 of 1 pictures are missing, the first is 'a\.png'.*--images FOLDER"):
        read_questions("exact", write(tmp_path / "a.jsonl", [row]))
    picture(tmp_path / "a.png")
    with pytest.raises(ValueError, match="the id '7' is there twice"):
        read_questions("exact", write(tmp_path / "a.jsonl", [row, row]))
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl is empty"):
        read_questions("exact", tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n{broken\n")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2 is not JSON"):
        read_questions("exact", tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl, row 1: no column one of question.*it has frage"):
        read_questions("exact", write(tmp_path / "a.jsonl", [{"frage": "?"}]))
    with pytest.raises(ValueError, match=r"row 1: expected an object with a value for each column, got 1"):
        read_questions("exact", write(tmp_path / "a.jsonl", [1, 2]))
    with pytest.raises(ValueError, match="none of the options A: cat, B: dog"):
        read_questions("letter", write(tmp_path / "a.jsonl", [{**row, "options": ["cat", "dog"]}]))
    write(tmp_path / "b.jsonl", [row])
    with pytest.raises(ValueError, match="several tables of exact, say which by --data FILE"):
        read_questions("exact", tmp_path)
    with pytest.raises(ValueError, match=r"--images .*no such folder"):
        read_questions("exact", tmp_path / "b.jsonl", tmp_path / "nowhere")
    (tmp_path / "a.png").write_bytes(png()[:30])
    with pytest.raises(PictureError, match=r"a\.png is not a readable picture"):
        open_picture(read_questions("exact", tmp_path / "b.jsonl")[0].images[0])


def test_conversation_and_limits() -> None:
    class Processor:
        image_token = "<image>"
        chat_template = None

    text = conversation(Processor(), "What?", 1, "vicuna")
    assert text == f"{VICUNA} USER: <image>\nWhat? ASSISTANT:"
    with pytest.raises(ValueError, match="no chat template"):
        conversation(Processor(), "What?", 1)
    with pytest.raises(ValueError, match="template='mine': choose one of chat, vicuna"):
        conversation(Processor(), "What?", 1, "mine")
    limits = [new_tokens(task_of(name), "lmms") for name in ("gqa", "docvqa", "pope", "textvqa")]
    assert limits == [16, 32, 128, 128]
    question = Question("1", "Q", (), ("a",))
    assert question_text(task_of("exact"), question, "official", "Be brief.") == "Q\nBe brief."
    assert question_text(task_of("exact"), question, "official", "") == "Q"
    options = replace(question, options=(("A", "x"), ("B", "y")), answers=("A",))
    for task in TASKS.values():  # nobody's own table is asked otherwise than it is written
        if task.own:
            assert question_text(task, question, task.protocols[0]) == "Q"
            assert question_text(task, options, task.protocols[0]) == "Q\nA. x\nB. y"
    own = [name for name, task in TASKS.items() if task.own]
    assert own == [name for name, task in TASKS.items() if task.title.startswith("a table")]
    assert instruction(task_of("mmstar"), question, "lmms") == f"\n{LETTER[:-1]}"
    assert instruction(task_of("mmstar"), question, "official") == f"\n{LETTER}"
