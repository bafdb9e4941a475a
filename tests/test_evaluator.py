# SPDX-License-Identifier: Apache-2.0
"""The evaluator on an embedded model: kill and restart, torn files, settings that never mix, pictures that cannot be read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcompress.assets import model_path
from mmcompress.eval import evaluator
from mmcompress.eval.comparison import compare, retention
from mmcompress.eval.data import Question, open_picture, read_questions
from mmcompress.eval.evaluator import Setup, bucketed, evaluate, load_record, rows_of, shapes_questions, weights_digest
from mmcompress.eval.inputs import AskError, inputs_of
from mmcompress.eval.journal import Journal
from mmcompress.eval.prompts import conversation, question_text
from mmcompress.eval.synthetic import items
from mmcompress.eval.synthetic.benchmark import load
from mmcompress.eval.tasks import task_of
from mmcompress.eval.tuning import batches
from PIL import Image

import mmcompress as mm
from mmcompress.cli import main

PLAN = "divprune(keep=0.1)"
SETUP = Setup("exact", suffix="", batch_size=4, new_tokens=8)
COUNT = 14


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load(model_path("llava-shapes"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes of the embedded benchmark as pictures and a table on disk."""
    folder = tmp_path_factory.mktemp("table")
    rows = []
    for i, item in enumerate(items(COUNT)):
        item.picture.save(folder / f"{i}.png")
        rows.append({"id": f"q{i}", "question": item.question.text, "answer": item.question.answer, "image": f"{i}.png", "kind": item.question.kind})  # fmt: skip  # noqa: E501
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "questions.jsonl"


@pytest.fixture(scope="module")
def whole(
    loaded: tuple[Any, Any], table: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, Any]]]:
    """An unbroken run of the stock model and of a plan."""
    folder = tmp_path_factory.mktemp("whole")
    questions = read_questions("exact", table)
    return folder, {plan: evaluate(*loaded, questions, SETUP, plan, folder, "llava-shapes") for plan in ("stock", PLAN)}


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for key in ("rows", "scores", "by_kind", "settings", "visual_tokens", "new_tokens", "empty", "fingerprint"):
        assert found[key] == expected[key], key


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_record_says_everything(whole: tuple[Path, dict[str, dict[str, Any]]], loaded: tuple[Any, Any]) -> None:
    folder, records = whole
    stock, less = records["stock"], records[PLAN]
    assert stock["answered"] == COUNT and stock["empty"] == 0 and stock["failed"] == {} and stock["cut"] == 0
    assert stock["scores"]["accuracy"] >= 0.8
    assert stock["scores"]["accuracy"] == pytest.approx(sum(row["value"] for row in stock["rows"]) / COUNT)
    assert sum(one["questions"] for one in stock["by_kind"].values()) == COUNT and len(stock["by_kind"]) == 7
    assert stock["visual_tokens"]["prompt"]["mean"] == stock["visual_tokens"]["mean_of_layers"]["mean"] == 144
    assert less["visual_tokens"]["prompt"]["max"] == 144 and less["visual_tokens"]["entering"]["max"] == 14
    assert {"device", "torch", "transformers", "commit"} <= set(stock["machine"])
    assert stock["tokens_per_second"] > 0 and stock["new_tokens"] >= COUNT
    assert load_record(evaluator.record_path(folder, less))["rows"] == less["rows"]
    assert [row["id"] for row in stock["rows"]] == [f"q{i}" for i in range(COUNT)]
    assert "_mmcompress_engine" not in loaded[0].__dict__ and loaded[1].tokenizer.padding_side == "left"


def test_killed_and_restarted(
    table: Path, whole: tuple[Path, dict[str, dict[str, Any]]], loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    """A process is really killed (SIGKILL) while it answers; the rest is answered here; all is as in an unbroken run."""
    code = (
        "import sys; from mmcompress.assets import model_path; from mmcompress.eval.synthetic.benchmark import load; "
        "from mmcompress.eval.data import read_questions; from mmcompress.eval.evaluator import Setup, evaluate; "
        "import time; show = lambda now: time.sleep(0.3); "
        "evaluate(*load(model_path()), read_questions('exact', sys.argv[1]), "
        f"Setup('exact', suffix='', batch_size=4, new_tokens=8), {PLAN!r}, sys.argv[2], 'llava-shapes', show)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(table), str(tmp_path)])
    try:
        start = time.monotonic()
        while not any(path.read_bytes().count(b"\n") >= 5 for path in tmp_path.glob("*.jsonl")):
            assert process.poll() is None and time.monotonic() - start < 240
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    (journal,) = tmp_path.glob("*.jsonl")
    assert not list(tmp_path.glob("*.json"))
    before = lines_of(journal)
    assert 4 <= len(before) - 1 < COUNT
    with journal.open("ab") as file:
        file.write(b'{"id": "q13", "reply": "re')  # torn in the middle of a line
    shown: list[evaluator.Progress] = []
    questions = read_questions("exact", table)
    found = evaluate(*loaded, questions, SETUP, PLAN, tmp_path, "llava-shapes", shown.append)
    same(found, whole[1][PLAN])
    after = lines_of(journal)
    assert after[: len(before)] == before  # nothing lost, nothing written again
    assert sorted(line["id"] for line in after[1:]) == sorted(q.id for q in questions)
    assert shown[0].done == len(before) - 1 and shown[-1].done == shown[-1].total == COUNT
    size = journal.stat().st_size
    calls = []
    handle = loaded[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = evaluate(*loaded, questions, SETUP, PLAN, tmp_path, "llava-shapes")
    handle.remove()
    assert not calls and journal.stat().st_size == size
    same(again, found)


TWO_ON_A_CPU = [
    sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m",
]  # fmt: skip
"""`accelerate launch` as it starts two processes on a CPU, with ACCELERATE_USE_CPU=true; with --cpu it starts one, whatever
--num_processes says."""


def launch(table: Path, out: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Our own command in two processes."""
    line = [
        *TWO_ON_A_CPU,
        "mmcompress",
        "eval",
        "llava-shapes",
        "--task",
        "exact",
        "--data",
        str(table),
        "--suffix",
        "",
    ]
    line += ["--batch-size", "4", "--max-new-tokens", "8", "--plan", PLAN, "--out", str(out)]
    return subprocess.run(line, env={**os.environ, "OMP_NUM_THREADS": "1", **settings}, capture_output=True, text=True)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(
    table: Path, whole: tuple[Path, dict[str, dict[str, Any]]], loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    """A picture that cannot be read is in the part of the second process; what two have answered, one does not ask again."""
    folder = tmp_path / "data"
    shutil.copytree(table.parent, folder)
    questions = read_questions("exact", folder / table.name)
    texts = [conversation(loaded[1], question_text(task_of("exact"), q, "official", ""), 1) for q in questions]
    broken = bucketed(questions, texts, 4, False)[1][0]  # the second batch
    expected = [row for row in whole[1][PLAN]["rows"] if row["id"] != questions[broken].id]
    (folder / f"{broken}.png").write_bytes((folder / f"{broken}.png").read_bytes()[:60])
    done = launch(folder / table.name, tmp_path / "out")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("1 of 14 questions were left out") == 1  # said once
    (path,) = (tmp_path / "out").glob("exact_official_divprune*.json")
    found = load_record(path)
    assert list(found["failed"]) == [questions[broken].id] and found["answered"] == COUNT - 1
    alone = evaluate(
        *loaded, read_questions("exact", folder / table.name), SETUP, PLAN, tmp_path / "alone", "llava-shapes"
    )
    same(found, alone)
    assert [row["reply"] for row in found["rows"]] == [row["reply"] for row in expected]
    parts = sorted(path.parent.glob("exact_official_divprune*.jsonl"))
    sizes = [len(part.read_bytes().splitlines()) - 1 for part in parts]
    assert len(parts) == 2 and min(sizes) >= 4 and sum(sizes) == COUNT - 1
    calls: list[int] = []
    handle = loaded[0].register_forward_pre_hook(lambda *_: calls.append(1))
    again = evaluate(
        *loaded, read_questions("exact", folder / table.name), SETUP, PLAN, tmp_path / "out", "llava-shapes"
    )
    handle.remove()
    same(again, found)
    assert not calls


def test_a_batch_of_which_a_part_was_written(
    whole: tuple[Path, dict[str, dict[str, Any]]], loaded: tuple[Any, Any], table: Path, tmp_path: Path
) -> None:
    """The missing answers come from the whole batch again: the same padding, the same numbers."""
    source = evaluator.record_path(whole[0], whole[1]["stock"])
    journal = tmp_path / f"{source.name}l"
    lines = source.with_suffix(".jsonl").read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:7]) + lines[7][:20])  # two of the second batch, the third torn
    widths: list[int] = []

    def look(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] > 1:
            widths.append(len(kwargs["input_ids"]))

    handle = loaded[0].register_forward_pre_hook(look, with_kwargs=True)
    found = evaluate(*loaded, read_questions("exact", table), SETUP, "stock", tmp_path, "llava-shapes")
    handle.remove()
    same(found, whole[1]["stock"])
    assert widths == [4, 4, 2]
    assert [line["id"] for line in lines_of(journal)[1:]] == [json.loads(line)["id"] for line in lines[1:]]


def test_settings_never_mix(loaded: tuple[Any, Any], table: Path, tmp_path: Path) -> None:
    model, processor = loaded
    questions = read_questions("exact", table)[:2]
    setups = [SETUP, replace(SETUP, protocol="lmms"), replace(SETUP, suffix="Be brief."), replace(SETUP, new_tokens=4)]
    setups += [replace(SETUP, batch_size=1), replace(SETUP, task="soft")]
    for setup in setups:
        evaluate(model, processor, questions, setup, "stock", tmp_path)
    evaluate(model, processor, questions, SETUP, "uniform(keep=0.5)", tmp_path)
    evaluate(model, processor, questions, SETUP, "uniform(keep=0.25)", tmp_path)
    evaluate(model, processor, [*questions[:1], replace(questions[1], text="what ?")], SETUP, "stock", tmp_path)
    assert len(list(tmp_path.glob("*.jsonl"))) == len(list(tmp_path.glob("*.json"))) == 9
    before = weights_digest(model)
    parameter = model.lm_head.weight
    kept = parameter.data.clone()
    parameter.data[0, 0] += 1
    assert weights_digest(model) != before
    parameter.data.copy_(kept)
    assert weights_digest(model) == before
    with mm.compressed(model, PLAN), pytest.raises(ValueError, match="give plan= instead"):
        evaluate(model, processor, questions, SETUP, "stock", tmp_path)


def test_pictures_that_cannot_be_read(loaded: tuple[Any, Any], table: Path, tmp_path: Path) -> None:
    questions = list(read_questions("exact", table)[:6])
    broken = tmp_path / "broken.png"
    broken.write_bytes((table.parent / "2.png").read_bytes()[:60])
    questions[2] = replace(questions[2], images=(broken,))
    found = evaluate(*loaded, questions, SETUP, "stock", tmp_path / "out")
    assert list(found["failed"]) == ["q2"] and "broken.png is not a readable picture" in found["failed"]["q2"]
    assert found["answered"] == 5 and [row["id"] for row in found["rows"]] == ["q0", "q1", "q3", "q4", "q5"]
    with pytest.raises(AskError, match=r"broken\.png"):
        evaluate(*loaded, questions, replace(SETUP, strict=True), "stock", tmp_path / "strict")
    again = evaluate(*loaded, questions, SETUP, "stock", tmp_path / "out")
    assert again["failed"] == found["failed"] and again["rows"] == found["rows"]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_one_question_that_cannot_be_asked_stops_no_run(
    batch_size: int, loaded: tuple[Any, Any], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused by the processor (an image token too many, half a character), by the model, or longer than the context: in one batch
    with others, which are answered as without it. A restart asks nothing again."""
    model, processor = loaded
    questions = list(read_questions("exact", table)[:8])
    setup = replace(SETUP, batch_size=batch_size)
    questions[1] = replace(questions[1], text="<image> what ?")
    questions[2] = replace(questions[2], text=f"half of {chr(0xD83D if batch_size == 1 else 0xDE00)} what ?")
    questions[4] = replace(questions[4], images=questions[4].images * 15)
    real = evaluator._generate

    def generate(model: Any, processor: Any, inputs: Any, most: int) -> Any:
        if any("refused" in text for text in processor.batch_decode(inputs["input_ids"])):
            raise ValueError("no such prompt\nmore")
        return real(model, processor, inputs, most)

    processor.tokenizer.add_tokens(["refused"])
    monkeypatch.setattr(evaluator, "_generate", generate)
    questions[6] = replace(questions[6], text="refused ?")
    found = evaluate(model, processor, questions, setup, "stock", tmp_path / "out")
    assert [row["id"] for row in found["rows"]] == ["q0", "q3", "q5", "q7"] and found["answered"] == 4
    assert set(found["failed"]) == {"q1", "q2", "q4", "q6"}
    assert "the processor refuses it (ValueError: The total number of <image> tokens" in found["failed"]["q1"]
    assert found["failed"]["q2"] == "its text has half a character in it (a lone surrogate)"
    assert found["failed"]["q4"] == "its prompt has 2168 tokens, and the context of the model is 2048"
    assert found["failed"]["q6"] == "the model refuses it (ValueError: no such prompt)"
    others = [questions[i] for i in (0, 3, 5, 7)]
    alone = evaluate(model, processor, others, setup, "stock", tmp_path / "alone")
    assert [row["reply"] for row in found["rows"]] == [row["reply"] for row in alone["rows"]]
    calls: list[int] = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    again = evaluate(model, processor, questions, setup, "stock", tmp_path / "out")
    handle.remove()
    assert not calls and again["failed"] == found["failed"] and again["rows"] == found["rows"]
    less = evaluate(model, processor, questions, setup, PLAN, tmp_path / "out")
    assert less["failed"] == found["failed"] and less["answered"] == 4
    for number, message in ((1, "image"), (2, "surrogate"), (4, "context"), (6, "no such prompt")):
        with pytest.raises(AskError, match=f"question q{number}: .*{message}.*; without --strict it is left out"):
            evaluate(
                model, processor, questions[number : number + 1], replace(setup, strict=True), "stock", tmp_path / "s"
            )
    with pytest.raises(AskError, match="none of the 2 questions can be asked; 'q2': its text has half"):
        evaluate(model, processor, [questions[2], questions[4]], setup, "stock", tmp_path / "none")
    assert not list((tmp_path / "none").glob("*.json"))


def test_a_prompt_that_fills_the_context_leaves_no_place_for_an_answer() -> None:
    def processor(text: list[str], **_: Any) -> dict[str, torch.Tensor]:
        lengths = [len(one.split()) for one in text]
        return {"attention_mask": torch.tensor([[0] * (max(lengths) - n) + [1] * n for n in lengths])}

    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4))
    questions: Any = [SimpleNamespace(id=f"q{i}", images=(), videos=()) for i in range(3)]
    asked, inputs, wrong = inputs_of(
        SimpleNamespace(config=config), processor, questions, ["a b c", "a b c d", "a"], [0, 1, 2]
    )
    assert asked == [0, 2] and inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert wrong == {"q1": "its prompt has 4 tokens, and the context of the model is 4"}


def test_an_answer_that_reaches_beyond_the_context(
    loaded: tuple[Any, Any], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt of 148 tokens or more and an answer: named if the model read a position beyond its context."""
    questions = read_questions("exact", table)
    found = evaluate(*loaded, questions, SETUP, "stock", tmp_path / "whole")
    lines = [line for path in (tmp_path / "whole").glob("*.jsonl") for line in lines_of(path)[1:]]
    lengths = {
        q.id: loaded[1](images=[open_picture(q.images[0])], text=[conversation(loaded[1], q.text, 1)])["input_ids"]
        for q in questions
    }
    length = {name: len(ids[0]) for name, ids in lengths.items()}
    used = {line["id"]: length[line["id"]] + line["new_tokens"] - 1 for line in lines}
    context = sorted(used.values())[COUNT // 2]
    monkeypatch.setattr(loaded[0].config.get_text_config(), "max_position_embeddings", context)
    short = evaluate(*loaded, questions, SETUP, "stock", tmp_path / "short")
    assert (
        set(short["failed"]) == {name for name, n in used.items() if n > context} and 0 < len(short["failed"]) < COUNT
    )
    assert all(f"the context of the model is {context}" in reason for reason in short["failed"].values())
    assert [row for row in found["rows"] if row["id"] not in short["failed"]] == short["rows"]


def test_a_device_that_runs_out_of_memory_is_no_refusal(
    loaded: tuple[Any, Any], table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (torch.OutOfMemoryError("2 GiB"), NotImplementedError("no such layer"), KeyError("ours")):

        def generate(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(evaluator, "_generate", generate)
        with pytest.raises(type(error), match=str(error.args[0])):
            evaluate(*loaded, read_questions("exact", table), SETUP, "stock", tmp_path)


def test_a_picture_that_one_processor_refuses(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The processor of Qwen takes nothing longer than 200 times its height: eval, sweep and tune leave the question out."""
    folder = tmp_path / "data"
    shutil.copytree(table.parent, folder)
    Image.new("RGB", (2000, 3)).save(folder / "0.png")
    data = ["--task", "exact", "--data", str(folder / table.name)]
    line = ["eval", "qwen3-vl-shapes", *data, "--questions", "5", "--max-new-tokens", "4", "--suffix", ""]
    for _ in range(2):
        assert main([*line, "--batch-size", "2", "--out", str(tmp_path / "out")]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert (
            "left out: question q0: the processor refuses it (ValueError: absolute aspect ratio must be smaller" in out
        )
        assert "1 of 5 questions were left out" in out
    line = [
        "sweep",
        "qwen3-vl-shapes",
        "--task",
        f"exact={folder / table.name}",
        "--questions",
        "3",
        "--plan",
        "uniform",
    ]
    assert main([*line, "--keep", "0.5", "--repeats", "0", "--out", str(tmp_path / "sweep")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert (
        "left out: exact, question q0: the processor refuses it" in out
        and "exact: 1 of 3 questions were left out" in out
    )
    model, processor = load(model_path("qwen3-vl-shapes"))
    questions = read_questions("exact", folder / table.name)[:3]
    with pytest.warns(UserWarning, match="1 of 3 questions are left out; 'q0': the processor refuses it"):
        asked = batches(model, processor, "exact", questions)
    assert [q.id for batch in asked for q in batch.questions] in (["q1", "q2"], ["q2", "q1"])


def test_what_cannot_be_judged_fails_before_the_first_answer(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    question = Question("1", "what ?", (), ("a",))
    with pytest.raises(ValueError, match="ten answers"):
        evaluate(*loaded, [question], Setup("textvqa", "llava"), "stock", tmp_path)
    with pytest.raises(ValueError, match="unknown method 'visionzap'"):
        evaluate(*loaded, [question], Setup("exact"), "visionzap", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="hallusionbench has no protocol 'official': choose one of lmms"):
        Setup("hallusionbench")
    with pytest.raises(ValueError, match="batch_size=0: at least 1"):
        Setup("exact", batch_size=0)
    with pytest.raises(ValueError, match="protocol='mine'"):
        Setup("exact", "mine")  # type: ignore[arg-type]


def test_a_journal_knows_its_settings_in_any_order_and_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lines, sync = tmp_path / "a.jsonl", list[int](), os.fsync

    def watched(file: int) -> None:
        sync(file)
        lines.append(path.read_bytes().count(b"\n"))

    monkeypatch.setattr(os, "fsync", watched)
    with Journal(path, {"task": "exact", "plan": {"keep": 1, "name": "x"}}) as journal:
        journal.append([{"id": "1"}])
        journal.append([{"id": "2"}, {"id": "3"}])
    assert lines == [1, 2, 4]
    with Journal(path, {"plan": {"name": "x", "keep": 1}, "task": "exact"}) as journal:
        assert list(journal.records) == ["1", "2", "3"]


def test_journal(tmp_path: Path) -> None:
    path, settings = tmp_path / "a.jsonl", {"plan": "x", "task": "exact"}
    with Journal(path, settings) as journal:
        journal.append([{"id": "1", "reply": "ä\ud800\n"}, {"id": "2", "reply": ""}])
        with pytest.raises(ValueError, match="has the answer to '1' already"):
            journal.append([{"id": "1", "reply": ""}])
        with pytest.raises(ValueError, match="another process"):
            Journal(path, settings)
    good = path.read_bytes()
    for tail in (b"", b'{"id": "3", "rep', b'{"id": "3"}', b"\x00\x00\x00", b"\x00\x00\n"):
        path.write_bytes(good + tail)
        with Journal(path, settings) as journal:
            assert list(journal.records) == ["1", "2"] and journal.repaired == bool(tail)
        assert path.read_bytes() == good
    for cut in range(len(good)):  # killed anywhere: what stands in whole lines is there
        path.write_bytes(good[:cut])
        with Journal(path, settings) as journal:
            assert len(journal.records) == max(0, good[:cut].count(b"\n") - 1)
            journal.append([{"id": "9", "reply": "x"}])
        with Journal(path, settings) as journal:
            assert "9" in journal.records
    path.write_bytes(good)
    with pytest.raises(ValueError, match=r"other settings \(plan\)"):
        Journal(path, {**settings, "plan": "y"})
    path.write_bytes(good.replace(b'{"id": "1"', b'{"id" "1"'))
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Journal(path, settings)
    path.write_bytes(good + good.splitlines(keepends=True)[1])
    with pytest.raises(ValueError, match="second answer to '1'"):
        Journal(path, settings)
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="not a file of predictions"):
        Journal(path, settings)


def test_batches_are_of_like_length_and_the_longest_come_first(table: Path) -> None:
    questions = [replace(q, id=str(i)) for i, q in enumerate(list(read_questions("exact", table)) * 2)]
    questions[5] = replace(questions[5], images=())
    texts = ["x" * (7 * i % 11) for i in range(len(questions))]
    batches = bucketed(questions, texts, 4, True)
    assert sorted(i for batch in batches for i in batch) == list(range(len(questions)))
    assert [5] in batches and batches == bucketed(questions, texts, 4, True)
    lengths = [len(texts[i]) for batch in batches for i in batch if i != 5]
    assert lengths == sorted(lengths, reverse=True)


def test_comparison(whole: tuple[Path, dict[str, dict[str, Any]]]) -> None:
    stock, less = whole[1]["stock"], whole[1][PLAN]
    found = compare(stock, less)
    assert found.questions == COUNT and found.change is not None
    assert found.change.value == pytest.approx(found.score - found.base_score)
    lost = sum(a["value"] > b["value"] for a, b in zip(stock["rows"], less["rows"], strict=True))
    assert found.flips.right_to_wrong == lost and found.flips.agreement < 1
    assert found.retention == pytest.approx(found.score / found.base_score)
    assert found.change.verdict == "too few questions to tell" and found.change.clusters == COUNT
    same = compare(stock, stock)  # that none of 14 changed shows little
    assert same.change is not None and same.change.verdict == "too few questions to tell" and same.flips.agreement == 1
    json.dumps(found.to_dict())
    nothing = {**stock, "rows": [{**row, "value": 0.0} for row in stock["rows"]]}
    with pytest.raises(ValueError, match="base score of exact is 0"):
        retention([(nothing, less)])
    moved = {**less, "settings": {**less["settings"], "model": "other"}}
    with pytest.raises(ValueError, match=r"model: 'llava-shapes' and 'other': with --force"):
        compare(stock, moved)
    forced = compare(stock, moved, force=True)
    assert (forced.other, forced.notes) == (f"other: {PLAN}", ("model: 'llava-shapes' and 'other'",))
    sums = retention([(stock, less)])
    assert sums["RelAcc"] == pytest.approx(100 * found.retention) == sums["OP"] and sums["OG"] == 0
    assert sums["OL"] == pytest.approx(100 * found.flips.agreement)
    with pytest.raises(ValueError, match="different protocols"):
        compare(stock, {**less, "settings": {**less["settings"], "protocol": "lmms"}})
    part = {**less, "rows": less["rows"][:5], "answered": 5}
    assert f"5 of {COUNT} questions are in both" in compare(stock, part).notes
    unknown = [{**row, "value": None} for row in stock["rows"]]
    blind = compare({**stock, "rows": unknown}, {**less, "rows": [{**row, "value": None} for row in less["rows"]]})
    assert (
        blind.change is None and blind.flips.agreement == found.flips.agreement and "OL" in retention([(stock, less)])
    )
    json.dumps(blind.to_dict(), allow_nan=False)
    assert rows_of(stock)[0].answers == tuple(stock["rows"][0]["answers"])


def test_the_commands(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    told = [
        "eval",
        "llava-shapes",
        "--task",
        "exact",
        "--data",
        str(table),
        "--suffix",
        "",
        "--questions",
        "7",
        "--out",
        str(out),
    ]
    assert main([*told, "--plan", PLAN, "--plan", "uniform(keep=0.5)"]) == 0
    text = capsys.readouterr().out
    assert "divprune" in text and "agreement" in text and text.count("record:") == 3
    first = read_questions("exact", table)[0]
    prompt = conversation(load(model_path())[1], first.text, 1)
    assert f"question q0 of exact as it was asked (--suffix changes that):\n{prompt}\n" in text
    assert f"stock replied {first.answers[0]!r}\n" in text and f"right: {first.answers[0]!r}\n" in text
    assert "does not know" not in text and "guessing" not in text
    stock, less = (str(next(out.glob(f"exact_official_{name}*.json"))) for name in ("stock", "divprune"))
    assert main(["compare", less, stock, "--flips", "2", "--out", str(tmp_path / "c.json")]) == 0  # stock is the base
    text = capsys.readouterr().out
    assert "RelAcc" in text and "by question type" in text and "tie" not in text.split()
    (found,) = json.loads((tmp_path / "c.json").read_text())
    assert (found["questions"], found["base"], found["other"]) == (7, "stock", PLAN)
    if found["verdict"] == "too few questions to tell":
        assert f"{PLAN}: too few questions to tell: " in text
    assert main(["compare", stock, less, "--base", less, "--out", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text())[0]["base"] == PLAN
    other = [
        *told[:8],
        "--suffix",
        "What is the dog doing ?",
        "--no-stock",
        "--plan",
        PLAN,
        "--questions",
        "7",
        "--out",
    ]
    assert main([*other, str(tmp_path / "other")]) == 0
    assert "words that this model does not know, and reads as <unk>: dog, doing\n" in capsys.readouterr().out
    asked = str(next((tmp_path / "other").glob("*.json")))
    assert main(["compare", stock, asked]) == 2
    assert "suffix: '' and 'What is the dog doing ?': with --force" in capsys.readouterr().err
    assert main(["compare", stock, asked, "--force"]) == 0
    assert capsys.readouterr().out.startswith("NOT ALIKE, exact: suffix: '' and 'What is the dog doing ?'")
    for arguments, message in (
        ([*told[:2], "--task", "nope"], "--task nope: choose one of"),
        ([*told[:2], "--task", "gqa"], "--task gqa needs --data"),
        (
            ["eval", "llava-shapes", "--data", str(table)],
            "for a table of your own one of exact, soft, anls, relaxed, letter, yesno",
        ),
        ([*told, "--no-stock"], "--no-stock needs a --plan"),
        ([*told, "--protocol", "mine"], "protocol='mine'"),
        ([*told, "--questions", "0"], "--questions 0: at least 1"),
        ([*told, "--plan", "visionzap"], "unknown method 'visionzap'"),
        (["compare", stock, str(tmp_path / "c.json")], "no record of `mmcompress eval`"),
        (["compare", stock, str(tmp_path / "nothing.json")], "no such file"),
    ):
        assert main(arguments) == 2, arguments
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llava-next-shapes", "qwen3-vl-shapes"])
def test_the_embedded_benchmark_on_other_families(name: str, tmp_path: Path) -> None:
    """Pictures of several shapes in one batch; answers as the benchmark itself counts them."""
    from mmcompress.eval.synthetic import evaluate as plain
    from mmcompress.eval.synthetic import prepare

    model, processor = load(model_path(name))
    questions = shapes_questions(7, model)
    setup = Setup("shapes", batch_size=4, new_tokens=8)
    record = evaluate(model, processor, questions, setup, "uniform(keep=0.5)", tmp_path)
    with mm.compressed(model, "uniform(keep=0.5)"):
        score = plain(model, processor, prepare(processor, items(7, stretched=True), 4))
    assert record["scores"]["accuracy"] == pytest.approx(score.accuracy())
    shown = record["visual_tokens"]
    assert shown["prompt"]["max"] > shown["prompt"]["min"] and shown["entering"]["mean"] < shown["prompt"]["mean"]
    with pytest.raises(ValueError, match="at least 7"):
        shapes_questions(3, model)
