# SPDX-License-Identifier: Apache-2.0
"""The embedded model, the benchmark that it was trained on, and the command that shows them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mmcompress.assets import CLIP, MODELS, checkpoint, model_path, weights_path
from mmcompress.eval.cost import midsize
from mmcompress.eval.making.data import Encoder, patch_labels, small_picture
from mmcompress.eval.making.families import FAMILIES
from mmcompress.eval.making.model import GRID, make_tokenizer
from mmcompress.eval.prompts import unknown_words
from mmcompress.eval.statistics import Difference
from mmcompress.eval.synthetic import CHANCE, KINDS, draw, evaluate, items, make_scene, prepare, scenes
from mmcompress.eval.synthetic.benchmark import load, prompt, takes_any_shape
from mmcompress.eval.synthetic.questions import neighbours
from PIL import Image
from transformers import AutoProcessor

import mmcompress as mm
from mmcompress.cli import main


@pytest.fixture(scope="module")
def embedded() -> tuple[Any, Any]:
    return load(model_path())


# ---------------------------------------------------------------------- benchmark
def test_scenes_are_reproducible_and_splits_disjoint() -> None:
    assert make_scene(5) == make_scene(5)
    assert np.array_equal(np.asarray(draw(make_scene(5))), np.asarray(draw(make_scene(5))))
    train, test = scenes("train", 3000), scenes("test", 500)
    assert not {s.signature for s in train} & {s.signature for s in test}
    assert not {item.scene.signature for item in items(300)} & {s.signature for s in train}
    with pytest.raises(ValueError, match="choose 'train' or 'test'"):
        scenes("all", 1)


def test_questions_are_right() -> None:
    """Answers recomputed from the scene by other means."""
    for item in items(700):
        things, question = item.scene.things, item.question
        words = question.text.split()
        if question.kind == "color":
            assert [t.color for t in things if t.shape == words[-2]] == [question.answer]
        elif question.kind == "shape":
            assert [t.shape for t in things if t.color == words[-2]] == [question.answer]
        elif question.kind == "count":
            assert int(question.answer) == sum(words[2] in (t.color, t.shape) for t in things)
        elif question.kind == "existence":
            assert question.answer == ("yes" if any(t.name == " ".join(words[3:5]) for t in things) else "no")
        elif question.kind == "reading":
            assert question.answer.replace(" ", "") == item.scene.sign.code
        else:
            (anchor,) = [i for i, t in enumerate(things) if t.name == " ".join(words[-3:-1])]
            if question.kind == "place":
                x, y = things[anchor].center
                assert (
                    question.answer
                    == f"{('top', 'middle', 'bottom')[int(y // 32)]} {('left', 'center', 'right')[int(x // 32)]}"
                )
            else:
                j = neighbours(item.scene, anchor)[" ".join(words[2:-4])]
                assert j is not None and things[j].name == question.answer
                dx = things[j].center[0] - things[anchor].center[0]
                dy = things[j].center[1] - things[anchor].center[1]
                assert {"left": dx < 0, "right": dx > 0, "above": dy < 0, "below": dy > 0}[words[2]]


def test_chance_is_stated_for_every_type() -> None:
    assert set(CHANCE) == set(KINDS)
    assert all(0 < chance <= 0.5 for chance in CHANCE.values())


def test_patch_labels_lie_on_the_objects() -> None:
    scene = make_scene(11)
    labels = patch_labels(scene)
    assert labels.shape[1] == GRID**2
    for thing in scene.things:
        x, y = (int(v // 8) for v in thing.center)
        assert labels[0, y * GRID + x] > 0 and labels[1, y * GRID + x] > 0
    assert (labels[2] > 0).sum() >= 3


def test_training_sees_what_the_processor_makes(embedded: tuple[Any, Any]) -> None:
    """Token ids and pixels of the training loop are those of processor and chat template."""
    _, processor = embedded
    item = items(1)[0]
    ids = processor(images=item.picture, text=prompt(processor, item.question.text), return_tensors="pt")
    encoder = Encoder(make_tokenizer())
    own = encoder([[item.question]], [encoder.square])
    length = ids["input_ids"].shape[1]
    assert torch.equal(own.input_ids[0, :length], ids["input_ids"][0])
    pixels = torch.from_numpy(small_picture(item.scene).copy()).permute(2, 0, 1) / 255
    assert ((pixels - 0.5) / 0.25 - ids["pixel_values"][0]).abs().max() < 0.1


# ---------------------------------------------------------------------- the model
@pytest.mark.parametrize("name", MODELS)
def test_size_of_the_embedded_models(name: str) -> None:
    from safetensors import safe_open

    with safe_open(model_path(name) / "model.safetensors", "pt") as weights:
        tensors = [weights.get_tensor(key) for key in weights.keys()]  # noqa: SIM118
    assert sum(t.numel() for t in tensors) <= 3_000_000
    assert all(t.dtype == torch.float16 for t in tensors)


def test_all_embedded_models_together_are_small() -> None:
    files = [f for name in (*MODELS, CLIP) for f in model_path(name).iterdir()]
    assert sum(f.stat().st_size for f in files) < 30_000_000


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("count", "least"), [(105, 0.86), pytest.param(490, 0.90, marks=pytest.mark.slow)])
def test_the_embedded_models_work(name: str, count: int, least: float) -> None:
    """At least 90 % over types (less on few questions, where luck is larger), on pictures of different shapes where the family is
    made for that."""
    model, processor = load(model_path(name))
    questions = items(count, stretched=takes_any_shape(model))
    score = evaluate(model, processor, prepare(processor, questions))
    by_type = {kind: score.accuracy(kind) for kind in KINDS}
    assert score.accuracy() >= least, by_type
    assert min(by_type.values()) >= ((0.80 if name == MODELS[0] else 0.60) if count > 400 else 0.5), by_type


@pytest.mark.parametrize("name", MODELS)
def test_the_compressor_in_the_package_belongs_to_its_model(name: str) -> None:
    model, _ = load(model_path(name))
    weights = weights_path("explain_compress", name)
    assert sum(path.stat().st_size for path in weights.iterdir()) < 1e6
    with mm.compressed(model, "explain_compress", weights=weights, keep=0.25):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_compressor_in_the_package_beats_its_proxy(name: str) -> None:
    """On questions that nothing was chosen by."""
    model, processor = load(model_path(name))
    batches = prepare(processor, items(350, start=5_000_000, stretched=takes_any_shape(model)))
    found = []
    for method, options in (
        ("explain_compress", {"weights": weights_path("explain_compress", name)}), ("explain_compress", {}), ("random", {}),
    ):  # fmt: skip
        with mm.compressed(model, method, keep=0.25, **options):
            found.append(evaluate(model, processor, batches).accuracy())
    assert found[0] > found[1] > found[2]


def test_exit_routers_and_flexible_projector_in_the_package(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    batches = prepare(processor, items(70), 35)
    stock = evaluate(model, processor, batches).accuracy()
    with mm.compressed(model, "dyvte", weights=weights_path("dyvte", "llava-shapes")):
        assert evaluate(model, processor, batches).accuracy() > 0.95 * stock
        assert mm.report(model).flops < 0.75 * mm.report(model).full_flops
    found = {}
    for what, options in (("trained", {"weights": weights_path("tokenflex", "llava-shapes")}), ("own", {})):
        with mm.compressed(model, "tokenflex", keep=0.2, **options):
            found[what] = evaluate(model, processor, batches).accuracy()
    assert found["trained"] > found["own"] + 0.05


def test_weights_that_are_not_there_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"no weights for 'sparsevlm' with llava-shapes: there are those for .*explain_compress"
    ):
        weights_path("sparsevlm", "llava-shapes")
    other, _ = load(model_path("qwen3-vl-shapes"))
    with pytest.raises(ValueError, match="trained for another model"):
        mm.compress(other, "explain_compress", weights=weights_path("explain_compress", "llava-shapes"))


@pytest.mark.parametrize("name", MODELS[1:])
def test_layouts_of_the_embedded_models_are_those_of_the_training(name: str) -> None:
    """Where the labels of the training were taken from and where the engine says that the tokens lie."""
    model, processor = load(model_path(name))
    family = FAMILIES[name]()
    mm.compress(model, "uniform", keep=0.5)
    for item in items(8, stretched=True):
        with torch.no_grad():
            model(**processor(images=item.picture, text=prompt(processor, item.question.text), return_tensors="pt"))
        (visual,) = mm.trace(model).visuals
        assert visual.layout == family.layout(item.picture)


def test_stretched_scenes_have_room_for_everything() -> None:
    shapes = set()
    for scene in scenes("train", 300, stretched=True):
        width, height = scene.size
        shapes.add((width > height) - (width < height))
        for thing in scene.things:
            (x, y), r = thing.center, thing.radius
            assert r <= x <= width - r and r <= y <= height - r
            assert thing.cell == int(y // scene.cell[1]) * 3 + int(x // scene.cell[0])
        left, top, right, bottom = (*scene.sign.boxes[0][:2], *scene.sign.boxes[-1][2:])
        assert left >= 0 and top >= 0 and right <= width and bottom <= height
        assert draw(scene).size == (round(width * 3), round(height * 3))
    assert shapes == {-1, 0, 1}


def test_compression_costs_what_it_should(embedded: tuple[Any, Any]) -> None:
    """All tokens: the same answers. Half the tokens by a method: better than chance, worse than or equal to stock but for what
    two answers may win by luck. One token: much worse."""
    model, processor = embedded
    questions = prepare(processor, items(70))
    stock = evaluate(model, processor, questions)
    with mm.compressed(model, "visionzip", keep=1.0):
        assert evaluate(model, processor, questions).answers == stock.answers
    chance = sum(CHANCE[kind] for kind in KINDS) / len(KINDS)
    with mm.compressed(model, "visionzip", keep=0.5):
        half = evaluate(model, processor, questions)
        assert half.answers != stock.answers
        assert chance + 0.2 < half.accuracy() <= stock.accuracy() + 2 / 70
    with mm.compressed(model, "uniform", keep=1):
        assert evaluate(model, processor, questions).accuracy() < stock.accuracy() - 0.2


def test_padded_batch_equals_single_runs_on_real_pictures(embedded: tuple[Any, Any]) -> None:
    model, processor = embedded
    batch = items(14)
    with mm.compressed(model, "visionzip(keep=0.25) >> fastv(layer=2, keep=0.5)"):
        together = evaluate(model, processor, prepare(processor, batch, 14)).answers
        alone = evaluate(model, processor, prepare(processor, batch, 1)).answers
    assert together == alone


# ---------------------------------------------------------------------- the command
@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "scene.png"
    items(7)[6].picture.save(path)  # a reading question
    return path


def test_run_on_a_file(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kept.png"
    arguments = [
        "run",
        "llava-shapes",
        "--image",
        str(picture),
        "--question",
        "What does the sign say?",
        "--out",
        str(out),
    ]
    assert main([*arguments, "--plan", "visionzip(keep=0.5) >> fastv(layer=2, keep=0.5)"]) == 0
    text = capsys.readouterr().out
    assert f"stock       {items(7)[6].question.answer}" in text
    assert "72 of 144 tokens enter the LLM" in text
    assert Image.open(out).size[0] > 200


def test_run_on_a_saved_copy_and_on_text_alone(
    embedded: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, processor = embedded
    model.save_pretrained(tmp_path / "copy")
    processor.save_pretrained(tmp_path / "copy")
    assert main(["run", str(tmp_path / "copy"), "--question", "is there a red ring ?"]) == 0
    assert "nothing to compress" in capsys.readouterr().out


def test_run_on_a_wide_grey_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "wide.png", tmp_path / "kept.png"
    Image.new("L", (300, 90), 128).save(path)
    assert (
        main(["run", "llava-shapes", "--image", str(path), "--question", "what color is the ring ?", "--out", str(out)])
        == 0
    )
    assert out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "visionzap"], "unknown method 'visionzap': did you mean 'visionzip'"),
        (["--plan", "visionzip(keep=2.0)"], "keep=2.0: a ratio must lie in (0, 1]"),
        (["--plan", "visionzip(keep=145)"], "keep=145, but only 144 visual tokens"),
        (["--image", "nowhere.png"], "nowhere.png: no such file"),
        (["--image", "BROKEN"], "not a readable picture"),
        (["--image", "CUT"], "not a readable picture"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: at least 1"),
    ],
)
def test_run_says_what_is_wrong(
    arguments: list[str], message: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"this is no picture")
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:2000])
    named = {"BROKEN": str(tmp_path / "broken.png"), "CUT": str(tmp_path / "cut.png")}
    base = ["run", "llava-shapes", "--image", str(picture), "--question", "what does the sign say ?"]
    assert main([*base, *(named.get(a, a) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("mmcompress: ") and error.count("\n") == 1


def test_run_on_something_that_is_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(tmp_path), "--question", "anything"]) == 2
    assert "cannot load" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llava-shape", "no model 'llava-shape' here: did you mean 'llava-shapes'?"),
        ("Qwen3_VL_Shapes", "did you mean 'qwen3-vl-shapes'?"),
        ("internvl-shaps", "did you mean 'internvl-shapes'?"),
        ("clip-shape", "did you mean 'clip-shapes'?"),
        ("clip-shapes", "clip-shapes answers no questions: it is the pair of towers for open_clip"),
        ("./llava-shapes", "./llava-shapes: no such folder"),
        ("~/nowhere", "~/nowhere: no such folder"),
    ],
)
def test_a_slip_in_the_name_of_a_model_is_told_at_once(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", asked)
    commands = [["run", name, "--question", "x"], ["eval", name], ["learn", "dyvte", name], ["explain-train", name]]
    for line in [*commands, *([] if name.startswith((".", "~")) else [["bench", name]])]:
        assert main(line) == 2
        assert message in capsys.readouterr().err
    assert checkpoint("someone/llava-shapes") == "someone/llava-shapes" and checkpoint("gpt2") == "gpt2"


def test_words_that_a_model_does_not_know(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["run", "llava-shapes", "--image", str(picture), "--max-new-tokens", "2", "--question"]
    assert main([*line, "What is the dog doing in this photo?"]) == 0
    told = capsys.readouterr().err
    assert told == "warning: words that this model does not know, and reads as <unk>: dog, doing, this, photo?\n"
    assert main([*line, "what color is the ring ?", "--plan", "divprune(keep=1)"]) == 0
    assert capsys.readouterr().err == "warning: keep=1 is a count, one token; for all write keep=1.0 or 100%\n"

    class Bytes:
        tokenizer = SimpleNamespace(unk_token_id=None)

    assert unknown_words(Bytes(), ["anything"]) == ""  # a tokenizer that can read everything


def test_methods_lists_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("divprune", "fastv", "random", "tome", "uniform", "visionzip"))


@pytest.mark.slow
def test_demo_writes_table_pictures_and_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--model", "llava-shapes", "--model", "llava-next-shapes"]
    assert main(["demo", *models, "--questions", "14", "--keep", "0.25", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "demo.json").read_text())
    rows = {row["method"]: row for row in record["llava-shapes"]["rows"]}
    assert {row["method"] for row in record["llava-next-shapes"]["rows"]} == set(rows)
    assert rows["none"]["tokens"] == 144
    assert all(rows[name]["tokens"] == 36 for name in rows if name != "none")
    assert rows["fastv"]["visual_flops"] > rows["visionzip"]["visual_flops"]
    assert rows["none"]["total_flops"] > rows["fastv"]["total_flops"] > rows["visionzip"]["total_flops"] > 0
    for name in ("random", "uniform", "divprune", "visionzip", "tome", "fastv", "visionzip_fastv"):
        picture = np.asarray(Image.open(tmp_path / f"llava-shapes_{name}.png").convert("L"))
        assert picture.std() > 10
    assert (tmp_path / "llava-next-shapes_divprune.png").exists()
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("whole prefill, vision included") == 2  # the report, and what the table calls FLOPs
    assert "accuracy of every embedded model with 25%" in text and "llava-next-shapes" in text
    assert rows["none"]["change"] is None
    for row in (rows[name] for name in rows if name != "none"):  # two questions of each type
        assert row["change"]["value"] == pytest.approx(row["accuracy"] - rows["none"]["accuracy"])
        assert row["change"]["clusters"] == 14 and row["change"]["full"] == pytest.approx(1.0)
        assert row["change"]["changed"] >= 14 * abs(row["change"]["value"]) - 1e-9
    few = sum(
        Difference(**row["change"]).verdict == "too few questions to tell" for row in rows.values() if row["change"]
    )
    assert (
        few >= 5
        and f"too few questions to tell for {few} of 7 plans; needed for a difference of 1 point: about" in text
    )
    assert main(["demo", *models, "--keep", "64", "--out", str(tmp_path / "x")]) == 2
    assert "--keep 64: a count" in capsys.readouterr().err and not (tmp_path / "x").exists()


@pytest.mark.parametrize("family", list(midsize.FAMILIES))
def test_bench_measures(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bench command on tiny models: the form of the record, not the times."""
    from mmcompress.eval.cost import latency

    from . import families

    def tiny_prompt(model: Any, **_: Any) -> dict[str, torch.Tensor]:
        return families.prompts(model, family, [[5, families.image(family), 4]], mask=False)

    monkeypatch.setattr(midsize, "build", families.build)
    monkeypatch.setattr(latency, "one_image_prompt", tiny_prompt)
    out = tmp_path / "bench.json"
    assert main(["bench", family, "--plan", "visionzip(keep=0.25)", "--repeats", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["families"][family]
    stock, zipped = found["rows"]
    assert (stock["plan"], stock["prefill_speedup"], stock["flops_ratio"]) == ("stock", 1.0, 1.0)
    assert zipped["flops_ratio"] > 1 and zipped["kv_bytes"] < stock["kv_bytes"] and zipped["select_ms"] > 0
    assert {"device", "torch", "transformers", "commit"} <= set(found["machine"])
    assert main(["bench", "--list"]) == 0 and main(["bench", "nothing"]) == 2
    assert "choose among llava" in capsys.readouterr().err


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("family", list(midsize.FAMILIES))
def test_midsize_models_have_the_tokens_that_they_say(family: str) -> None:
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1}  # M-RoPE needs its 64 dimensions
    model = mm.compress(
        midsize.build(family, hidden_size=64, intermediate_size=64, num_hidden_layers=1, **one_head),
        "uniform",
        keep=0.25,
    )
    model(**midsize.one_image_prompt(model))
    (visual,) = mm.trace(model).visuals
    assert f"{visual.layout.tokens} visual tokens" in midsize.FAMILIES[family]


def test_flops_are_counted_like_the_report_says() -> None:
    """torch's counter against the arithmetic of the report: the difference of two plans is all in the LLM, but for rotary tables,
    which some versions of transformers make by a matrix product."""
    from mmcompress.eval.cost.counts import count
    from mmcompress.eval.cost.latency import count_flops

    from . import families

    model = families.build("llava")
    inputs = families.prompts(model, "llava", [[5, families.image("llava"), 4]], mask=False)
    counted, reported = [], []
    for keep in (4, 12):
        tables = count(model, inputs, f"uniform(keep={keep})").rotary
        with mm.compressed(model, "uniform", keep=keep):
            counted.append(count_flops(model, inputs) - tables)
            reported.append(mm.report(model).flops)
    assert counted[1] - counted[0] == reported[1] - reported[0]


@pytest.mark.slow
def test_transfer_restarts_where_it_stopped(tmp_path: Path) -> None:
    """A run that is stopped and started again ends with the same weights as one that was not."""
    from mmcompress.eval.making.transfer import Transfer, TransferRecipe

    recipe = TransferRecipe(
        scenes=40, test_scenes=4, codebook_scenes=8, vision_steps=2, vision_batch=2, language_steps=4, language_batch=2,
        turns=2, save_every=2,
    )  # fmt: skip
    family = FAMILIES["llava-next-shapes"]
    straight = Transfer(tmp_path / "straight", family(), recipe, device="cpu").run()

    class Stopped(Exception):
        pass

    stopped = Transfer(tmp_path / "stopped", family(), recipe, device="cpu")

    def stop(stage: str, step: int, *_: Any) -> None:
        if (stage, step) == ("language", 4):
            raise Stopped

    stopped.record = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.run()
    resumed = Transfer(tmp_path / "stopped", family(), recipe, device="cpu").run()
    a, b = (load(path)[0].state_dict() for path in (straight, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_restarts_where_it_stopped(tmp_path: Path) -> None:
    """A run that is stopped and started again ends with the same weights as one that was not."""
    from mmcompress.eval.making.train import Recipe, Trainer

    recipe = Recipe(
        scenes=24,
        test_scenes=8,
        vision_steps=4,
        vision_batch=4,
        align_steps=2,
        language_steps=4,
        language_batch=4,
        finish_steps=2,
        relations_steps=2,
        finish_batch=4,
        turns=3,
        few_objects=0.5,
        save_every=2,
    )
    straight = Trainer(tmp_path / "straight", recipe, device="cpu").run()

    class Stopped(Exception):
        pass

    stopped = Trainer(tmp_path / "stopped", recipe, device="cpu")
    record = stopped.record

    def stop(stage: str, step: int, *rest: Any) -> None:
        record(stage, step, *rest)
        if (stage, step) == ("language", 4):
            raise Stopped

    stopped.record = stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.run()
    resumed = Trainer(tmp_path / "stopped", recipe, device="cpu").run()
    a, b = (load(path)[0].state_dict() for path in (straight, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)
