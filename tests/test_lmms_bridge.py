# SPDX-License-Identifier: Apache-2.0
"""lmms-eval with plans, on an embedded model and data on disk: nothing is downloaded."""

from __future__ import annotations

import functools
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmcompress.assets import MODELS, model_path
from mmcompress.eval.comparison import compare
from mmcompress.eval.evaluator import STOCK, load_record
from mmcompress.eval.lmms import CompressedModel, base, model_arguments, plan_digest, read_plan, run_lmms
from mmcompress.eval.lmms import run as command_run
from mmcompress.eval.lmms.records import reply_of
from mmcompress.eval.synthetic import Item, items
from mmcompress.eval.synthetic.benchmark import load, prompt, same

import mmcompress as mm
from mmcompress.cli import main

from .test_evaluator import TWO_ON_A_CPU

ROOT = Path(__file__).parent.parent
QUESTIONS = 14
PLAN = "visionzip(keep=0.25) >> fastv(layer=1, keep=0.5)"
OTHER = "divprune(keep=0.05)"

UTILS = """
from PIL import Image

def picture(doc):
    return [Image.open(doc["path"])]

def stored(doc):
    return [doc["image"]]

def text(doc):
    return doc["question"]

def judge(doc, results):
    return {"right": float(results[0].lower().split() == doc["answer"].lower().split())}
"""
TASK = """
task: {name}
dataset_path: {path}
{data}
test_split: test
output_type: generate_until
doc_to_visual: !function utils.{visual}
doc_to_text: !function utils.text
doc_to_target: answer
process_results: !function utils.judge
generation_kwargs: {{max_new_tokens: 8, temperature: 0, do_sample: false{more}}}
metric_list:
  - metric: right
    aggregation: mean
    higher_is_better: true
"""


# ---------------------------------------------------------------------- without lmms-eval
def test_a_plan_between_commas() -> None:
    expected = mm.as_pipeline(PLAN)
    for text in (PLAN, f'"{PLAN}"', f" '{PLAN}'", PLAN.replace(",", ";"), json.dumps(expected.to_dict()), expected):
        assert read_plan(text) == expected
    quoted = "plan(fastv(layer=2, keep=0.5), positions=\\'keep\\')"
    assert read_plan(f"'{quoted}'").positions == "keep"  # type: ignore[union-attr]
    for text in (None, "", "stock", '"none"'):
        assert read_plan(text) is None
    with pytest.raises(ValueError, match=r"cut at a comma.*semicolons"):
        read_plan("fastv(layer=2")
    with pytest.raises(ValueError, match="did you mean 'fastv'"):
        read_plan("fastvv(layer=2; keep=0.5)")


def test_a_plan_file_needs_its_digest(tmp_path: Path) -> None:
    """The response cache of lmms-eval knows the file by its name only."""
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(mm.as_pipeline(PLAN).to_dict()))
    with pytest.raises(ValueError, match=r"known to the response cache.*plan_sha=sha256:") as error:
        read_plan(str(file))
    sha = str(error.value).split("plan_sha=")[1].split()[0]
    assert sha == plan_digest(mm.as_pipeline(PLAN))
    assert read_plan(str(file), sha) == mm.as_pipeline(PLAN)
    file.write_text(json.dumps(mm.as_pipeline(OTHER).to_dict()))
    with pytest.raises(ValueError, match=f"is not {sha}"):
        read_plan(str(file), sha)


def test_settings_as_text() -> None:
    assert model_arguments({"pretrained": "a/b", "plan": PLAN, "frames": None}) == f'pretrained=a/b,plan="{PLAN}"'
    with pytest.raises(ValueError, match="quotation mark"):
        model_arguments({"pretrained": 'a"b'})


def test_without_lmms_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_missing", ImportError("No module named 'lmms_eval'"))
    for call in (lambda: run_lmms("llava-shapes", [PLAN], ["gqa"], "out"), lambda: CompressedModel("llava-shapes")):
        with pytest.raises(ImportError, match=r"pip install 'mmcompress\[lmms\]'.*No module named"):
            call()


# ---------------------------------------------------------------------- with lmms-eval
@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The entry point of this pyproject.toml, installed or not; a folder whose packages are found first."""
    if importlib.util.find_spec("lmms_eval") is None:
        pytest.skip("lmms-eval is not installed: it brings about 90 packages (pip install 'mmcompress[lmms]')")
    home = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "-c", "from setuptools import setup; setup()", "-q", "egg_info", "--egg-base", str(home)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    sys.path.insert(0, str(home))
    try:
        pytest.importorskip("lmms_eval.evaluator", exc_type=ImportError)
        import datasets

        datasets.config.HF_DATASETS_CACHE = home / "cache"
        yield home
    finally:
        sys.path.remove(str(home))


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load(model_path())


@pytest.fixture(scope="module")
def asked() -> list[Item]:
    return items(QUESTIONS)


@pytest.fixture(scope="module")
def folder(harness: Path, asked: list[Item], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks: `shapes_files` has pictures beside a .jsonl, `shapes_stored` is a folder as on the hub, `mute` cuts every answer
    to nothing, `broken` lacks a picture; POPE/ is a copy of a hub benchmark."""
    from datasets import Dataset, Image

    base = tmp_path_factory.mktemp("tasks")
    (base / "utils.py").write_text(UTILS)
    rows = []
    for i, item in enumerate(asked):
        item.picture.save(base / f"{i}.png")
        rows.append(
            {
                "path": str(base / f"{i}.png"),
                "question": item.question.text,
                "answer": item.question.answer,
                "number": i,
            }
        )
    (base / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (base / "broken.jsonl").write_text(
        "\n".join(json.dumps(row | {"path": row["path"].replace("/3.", "/x.")}) for row in rows)
    )

    def stored(name: str, table: list[dict[str, Any]]) -> str:
        (base / name / "data").mkdir(parents=True)
        data = Dataset.from_list([{**row, "image": row["path"]} for row in table]).cast_column("image", Image())
        data.to_parquet(base / name / "data" / "test-00000-of-00001.parquet")
        return str(base / name)

    yes_no = [row for row in rows if row["answer"] in ("yes", "no")]
    stored("POPE", [{**row, "question_id": str(i), "category": "random"} for i, row in enumerate(yes_no)])
    written = {
        "shapes_files": ("json", "test", "picture", ""),
        "broken": ("json", "broken", "picture", ""),
        "mute": ("json", "test", "picture", f", until: {[*'abcdefghijklmnopqrstuvwxyz0123456789 ']}"),
        "shapes_stored": (stored("hub", rows), "", "stored", ""),
    }
    for name, (path, file, visual, more) in written.items():
        data = f"dataset_kwargs: {{data_files: {{test: {base / file}.jsonl}}}}" if file else ""
        (base / f"{name}.yaml").write_text(TASK.format(name=name, path=path, data=data, visual=visual, more=more))
    return base


@pytest.fixture(scope="module")
def direct(embedded: tuple[Any, Any], asked: list[Item]) -> Any:
    """Our own greedy answers, one question at a time."""
    model, processor = embedded

    @functools.cache
    def answers(plan: str, instruction: str = "") -> list[str]:
        found = []
        with mm.compressed(model, plan) if plan != STOCK else torch.no_grad():
            for item in asked:
                text = prompt(processor, item.question.text + instruction)
                inputs = processor(images=[item.picture], text=text, return_tensors="pt")
                out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
                found.append(processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
        return found

    return answers


def accuracy(answers: list[str], asked: list[Item]) -> float:
    return sum(same(answer, item.question.answer) for answer, item in zip(answers, asked, strict=True)) / len(asked)


def replies(results: dict[str, Any], task: str) -> list[str]:
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [reply_of(sample).strip() for sample in samples]


def evaluate(folder: Path, tasks: list[str], arguments: str, model: Any = "mmcompress", **more: Any) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    manager = TaskManager("WARNING", include_path=str(folder), include_defaults=False, model_name="mmcompress")
    return simple_evaluate(
        model=model, model_args=arguments, tasks=tasks, task_manager=manager, device="cpu", verbosity="WARNING", **more
    )


def test_the_harness_finds_the_model(harness: Path) -> None:
    from lmms_eval.models import get_model, list_available_models

    assert "mmcompress" in list_available_models()
    assert get_model("mmcompress") is CompressedModel


@pytest.mark.parametrize(("plan", "batch"), [(STOCK, 1), (PLAN, 1), (PLAN, 4)])
def test_answers_are_those_of_direct_generation(
    folder: Path, direct: Any, asked: list[Item], plan: str, batch: int
) -> None:
    """Padded batches too; from pictures beside a .jsonl and from a folder as on the hub."""
    tasks = ["shapes_files", "shapes_stored"]
    results = evaluate(folder, tasks, f'pretrained=llava-shapes,plan="{plan}"', batch_size=batch)
    for task in tasks:
        assert replies(results, task) == direct(plan)
        assert results["results"][task]["right,none"] == pytest.approx(accuracy(direct(plan), asked))
    assert results["throughput"]["avg_empty_answers"] == 0
    assert results["samples"]["shapes_files"][0]["token_counts"][0]["output_tokens"] >= 1
    shares = results["throughput"]["avg_visual_tokens_in_llm"] / results["throughput"]["avg_visual_tokens_of_prompt"]
    assert shares == 1 if plan == STOCK else 0.125 <= shares < 0.25


def test_plans_differ_here(direct: Any) -> None:
    """Else the tests of caches could not fail."""
    assert len({tuple(direct(plan)[:6]) for plan in (STOCK, PLAN, OTHER)}) == 3


def test_plans_do_not_share_a_cache(
    folder: Path, direct: Any, embedded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    stock = CompressedModel._answer

    def answer(self: CompressedModel, *arguments: Any) -> Any:
        ran.append(self.plan)
        return stock(self, *arguments)

    monkeypatch.setattr(CompressedModel, "_answer", answer)

    def run(plan: str, model: Any = "mmcompress") -> list[str]:
        ran.clear()
        arguments = model_arguments({"pretrained": "llava-shapes", "batch_size": 4, "plan": plan})
        if model is not None and not isinstance(model, str):
            model = CompressedModel.create_from_arg_string(arguments, {"loaded": embedded})
        found = replies(
            evaluate(folder, ["shapes_files"], arguments, model, use_cache=str(tmp_path), limit=6), "shapes_files"
        )
        mm.uncompress(embedded[0])
        return found

    for plan in (STOCK, OTHER):
        assert run(plan) == direct(plan)[:6]
        assert ran
        assert run(plan) == direct(plan)[:6]
        assert not ran, "the second time the answers are in the cache"
        assert run(plan, embedded) == direct(plan)[:6]
        assert not ran, "a model that is there already has the same key"


def test_empty_answers_are_counted(folder: Path, embedded: tuple[Any, Any], tmp_path: Path) -> None:
    model = CompressedModel("llava-shapes", batch_size=7, loaded=embedded)
    results = evaluate(folder, ["mute"], "", model)
    assert replies(results, "mute") == [""] * QUESTIONS
    assert model.counts["empty"] == model.counts["answers"] == QUESTIONS
    assert results["throughput"]["avg_empty_answers"] == QUESTIONS


def test_nothing_fails_in_silence(folder: Path, embedded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RuntimeError, match=r"document\(s\) broken 3: FileNotFoundError"):
        evaluate(folder, ["broken"], "pretrained=llava-shapes", batch_size=2)
    model = CompressedModel("llava-shapes", batch_size=14, loaded=embedded)
    monkeypatch.setattr(model, "_answer", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=r"document\(s\) shapes_files .*: ZeroDivisionError"):
        evaluate(folder, ["shapes_files"], "", model)
    with pytest.raises(ValueError, match=r"keep unknown.*plan in quotes"):
        CompressedModel("llava-shapes", plan="visionzip", keep=0.5)
    with pytest.raises(ValueError, match="batch_size='auto': a whole number from 1 on"):
        CompressedModel("llava-shapes", batch_size="auto")
    for arguments in (f"pretrained=llava-shapes,plan={PLAN}", "pretrained=llava-shapes,stock"):
        with pytest.raises(ValueError, match="in quotes"):
            CompressedModel.create_from_arg_string(arguments)
    request = SimpleNamespace(args=("text", {}, lambda doc: [], 0, "task", "test"))
    with pytest.raises(NotImplementedError, match="--include_path"):
        model.generate_until([request])
    with pytest.raises(NotImplementedError, match="take the variant that generates"):
        model.loglikelihood([])
    with pytest.raises(NotImplementedError, match="multi_round"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize("name", MODELS)
def test_requests_of_any_form(name: str, asked: list[Item], harness: Path) -> None:
    """Two pictures, none, several turns, other generation kwargs, mixed in one call: each as alone, in their order."""
    from lmms_eval.api.instance import Instance

    model, processor = load(model_path(name))
    pictures = [item.picture for item in asked[:3]]

    def user(text: str, *shown: Any) -> dict[str, Any]:
        return {
            "role": "user",
            "content": [*({"type": "image", "url": x} for x in shown), {"type": "text", "text": text}],
        }

    assistant = {"role": "assistant", "content": [{"type": "text", "text": "red"}]}
    conversations = [
        [user("How many red things are there?", *pictures[:2])],
        [user("Is there a red circle?")],
        [user("What color is the sign?", pictures[2]), assistant, user("Is there a blue square?")],
        [user("Is there a green circle?", pictures[1])],
    ]
    wanted: list[dict[str, Any]] = [
        {"max_new_tokens": 6},
        {"max_new_tokens": 6},
        {"max_new_tokens": 6},
        {"max_new_tokens": 2},
    ]
    plan = "divprune(keep=0.25) >> fastv(layer=1, keep=0.5)"
    subject = CompressedModel(name, plan=plan, batch_size=4, loaded=(model, processor))
    subject.task_dict = {"t": {"test": conversations}}
    requests = [
        Instance(
            "generate_until",
            ("text", lambda doc: doc, kwargs, i, "t", "test"),
            0,
            {"task": "t", "doc_id": i, "repeats": 1},
        )
        for i, kwargs in enumerate(wanted)
    ]
    found = subject.generate_until(requests)
    for conversation, kwargs, result in zip(conversations, wanted, found, strict=True):
        shown = [part["url"] for turn in conversation for part in turn["content"] if part["type"] == "image"]
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        inputs = processor(images=shown or None, text=text, return_tensors="pt")
        out = model.generate(**inputs, do_sample=False, **kwargs)[0, inputs["input_ids"].shape[1] :]
        assert result.text == processor.decode(out, skip_special_tokens=True)
        assert result.token_counts.input_tokens == inputs["input_ids"].shape[1]


def test_generation_kwargs(embedded: tuple[Any, Any], harness: Path) -> None:
    subject = CompressedModel("llava-shapes", loaded=embedded, max_new_tokens=77)
    plain = subject._wanted({})
    assert (plain["do_sample"], plain["max_new_tokens"], plain["until"]) == (False, 77, [])
    greedy = subject._wanted(
        {"temperature": 0, "top_p": 0.9, "do_sample": True, "until": "\n", "image_aspect_ratio": "pad"}
    )
    assert (greedy["do_sample"], greedy["top_p"], greedy["until"]) == (False, None, ["\n"])
    assert subject._ignored == {"image_aspect_ratio"}
    warm = subject._wanted({"temperature": 0.7, "top_p": 0.9, "num_beams": 3})
    assert (warm["do_sample"], warm["temperature"], warm["top_p"], warm["num_beams"]) == (True, 0.7, 0.9, 3)
    assert "top_k" not in warm, "what the task does not say is the checkpoint's"
    with pytest.raises(NotImplementedError, match="--repeats"):
        subject._wanted({"num_return_sequences": 2})


def command(folder: Path, plan: str, out: Path) -> list[str]:
    arguments = f'pretrained=llava-shapes,plan="{plan}",batch_size=1'
    return [
        "--model", "mmcompress", "--model_args", arguments, "--tasks", "shapes_stored", "--include_path", str(folder),
        "--output_path", str(out), "--log_samples", "--device", "cpu", "--verbosity", "DEBUG",
    ]  # fmt: skip


def written(out: Path) -> tuple[float, list[str]]:
    (results,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_shapes_stored.jsonl")
    rows = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda row: row["doc_id"])
    return json.loads(results.read_text())["results"]["shapes_stored"]["right,none"], [
        reply_of(row).strip() for row in rows
    ]


def in_two_processes(line: list[str], harness: Path, folder: Path) -> None:
    """`accelerate launch` of a module with its arguments in `folder`; there really are two processes, and they end well."""
    (folder / "site").mkdir()
    noted = (
        "import os, pathlib\nrank = os.environ.get('RANK')\nrank and pathlib.Path(os.environ['RANKS'], rank).touch()\n"
    )
    (folder / "site" / "sitecustomize.py").write_text(noted)
    path = os.pathsep.join([str(folder / "site"), str(harness), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "RANKS": str(folder / "ranks"),
    }
    (folder / "ranks").mkdir()
    done = subprocess.run(
        [*TWO_ON_A_CPU, *line], env={**os.environ, **settings}, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert sorted(path.name for path in (folder / "ranks").iterdir()) == ["0", "1"]


def test_command_line_in_two_processes(
    folder: Path, harness: Path, direct: Any, asked: list[Item], tmp_path: Path
) -> None:
    """`accelerate launch ... -m lmms_eval`: the same numbers as one process."""
    in_two_processes(["lmms_eval", *command(folder, PLAN, tmp_path / "out")], harness, tmp_path)
    assert written(tmp_path / "out") == (pytest.approx(accuracy(direct(PLAN), asked)), direct(PLAN))


def test_our_own_command_in_two_processes(
    folder: Path, harness: Path, direct: Any, asked: list[Item], tmp_path: Path
) -> None:
    """`accelerate launch ... -m mmcompress eval --harness lmms`: the same numbers as one process, written once."""
    line = ["eval", "llava-shapes", "--plan", PLAN, "--harness", "lmms", "--tasks", str(folder / "shapes_files.yaml")]
    in_two_processes(["mmcompress", *line, "--out", str(tmp_path / "out")], harness, tmp_path)
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("lmms_*.json")]
    assert sorted(record["plan"] for record in records) == sorted([STOCK, PLAN])
    for record in records:
        said = direct(record["plan"])
        assert record["scores"]["shapes_files"]["right"] == pytest.approx(accuracy(said, asked))
        rows = load_record(tmp_path / "out" / record["records"]["shapes_files"])["rows"]
        assert [row["reply"].strip() for row in rows] == said


def test_command_line(
    folder: Path, direct: Any, asked: list[Item], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lmms_eval.__main__ import cli_evaluate

    monkeypatch.setattr(sys, "argv", ["lmms-eval", *command(folder, OTHER, tmp_path)])
    cli_evaluate()
    assert written(tmp_path) == (pytest.approx(accuracy(direct(OTHER), asked)), direct(OTHER))


def test_our_own_command(
    folder: Path,
    direct: Any,
    asked: list[Item],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two plans, a task file and a benchmark of lmms-eval whose data lie on disk; the records are those of `mmcompress eval`."""
    tasks = [f"pope={folder / 'POPE'}", str(folder / "shapes_files.yaml")]
    manager = command_run.task_manager(tasks, None)
    monkeypatch.setattr(command_run, "task_manager", lambda *_: manager)  # reading the tasks of lmms-eval takes seconds
    ask = functools.partial(run_lmms, "llava-shapes", [STOCK, PLAN], tasks, tmp_path, device="cpu")
    stock, compressed = ask()
    for record, plan in ((stock, STOCK), (compressed, PLAN)):
        assert record["plan"] == plan
        assert record["scores"]["shapes_files"]["right"] == pytest.approx(accuracy(direct(plan), asked))
        assert record["empty"] == {"pope": 0, "shapes_files": 0}
        rows = load_record(tmp_path / record["records"]["shapes_files"])["rows"]
        assert [row["reply"].strip() for row in rows] == direct(plan)
        said = direct(plan, "\nAnswer the question using a single word or phrase.")
        expected = [text for text, item in zip(said, asked, strict=True) if item.question.answer in ("yes", "no")]
        pope = load_record(tmp_path / record["records"]["pope"])
        assert [row["reply"].strip() for row in pope["rows"]] == expected
        assert pope["settings"]["plan"] == plan
    found = compare(*(load_record(tmp_path / record["records"]["pope"]) for record in (stock, compressed)))
    assert (found.base, found.other, found.questions) == (STOCK, PLAN, 2)

    monkeypatch.setattr("lmms_eval.evaluator.simple_evaluate", lambda **_: pytest.fail("the records are there already"))
    again = ask()
    assert [record["scores"] for record in again] == [record["scores"] for record in (stock, compressed)]
    line = ["eval", "llava-shapes", "--plan", PLAN, "--harness", "lmms", "--tasks", ",".join(tasks), "--device", "cpu"]
    assert main([*line, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "shapes_files" in shown and "pope" in shown and "visionzip" in shown and "mmcompress compare" in shown
    assert main([*line, "--protocol", "llava"]) == 2 and "our own evaluator" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no task 'popes'"):
        run_lmms("llava-shapes", [PLAN], ["popes"], tmp_path)
    with pytest.raises(ValueError, match="no folder 'nowhere'"):
        run_lmms("llava-shapes", [PLAN], ["pope=nowhere"], tmp_path)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        run_lmms("llava-shapes", [], ["pope"], tmp_path)
