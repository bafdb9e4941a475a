# SPDX-License-Identifier: Apache-2.0
"""`mmcompress learn`: its batches, that training learns, and that a run goes on where it was stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmcompress.assets import model_path
from mmcompress.eval.making.learned import RECIPES, Learning, asked, inputs_of
from mmcompress.eval.synthetic import items, prepare
from mmcompress.eval.synthetic.benchmark import load
from mmcompress.eval.synthetic.scenes import draw, scenes

import mmcompress as mm
from mmcompress.cli import main
from mmcompress.weights import Saved

from .families import build, prompts
from .test_families import samples

SMALL: dict[str, Any] = {"batch": 2, "questions": 7, "save_every": 1}


@pytest.mark.parametrize("name", ["llava-shapes", "qwen3-vl-shapes"])
def test_labels_are_the_answers(name: str) -> None:
    model, processor = load(model_path(name))
    drawn = scenes("train", 2, 40)
    talks = [asked(scene, turns, np.random.default_rng(1)) for scene, turns in zip(drawn, (3, 1), strict=True)]
    made = inputs_of(processor, [draw(scene) for scene in drawn], talks)
    for row, talk in enumerate(talks):
        ids, labels = made["input_ids"][row], made["labels"][row]
        words = processor.tokenizer.decode(labels[labels >= 0], skip_special_tokens=False).split("</s>")
        assert [text.split() for text in words[:-1]] == [question.answer.split() for question in talk]
        assert torch.equal(ids[labels >= 0], labels[labels >= 0])
        assert int(labels[-1]) == processor.tokenizer.eos_token_id
    with torch.no_grad():  # the embedded model was trained on such sequences
        logits = model(**{n: x for n, x in made.items() if n != "labels"}).logits
    wanted = made["labels"][:, 1:]
    right = (logits[:, :-1].argmax(-1) == wanted)[wanted >= 0].float().mean()
    assert right > 0.7


def test_one_question_is_the_prompt_of_the_benchmark() -> None:
    _, processor = load(model_path())
    (item,) = items(1)
    made = inputs_of(processor, [item.picture], [[item.question]])
    known = prepare(processor, [item])[0].inputs
    before = int((made["labels"][0] == -100).sum())
    assert torch.equal(made["input_ids"][:, :before], known["input_ids"])
    assert torch.equal(made["pixel_values"], known["pixel_values"])


@pytest.mark.parametrize("method", ["p_mod", "gamma_mod"])
def test_training_of_a_converted_model_lowers_the_loss(method: str) -> None:
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava"))
    wanted = inputs["input_ids"][:, -3:]
    mm.convert(model, method, std=0.1, **({"layers": (1, 2)} if method == "gamma_mod" else {}))
    model.train()
    trained = list(model.model.language_model.parameters())
    before = [router.weight.detach().clone() for router in mm.conversion(model).routers.values()]
    optimizer, losses = torch.optim.AdamW(trained, 1e-3), []
    for _ in range(12):
        logits = model(**inputs, use_cache=False).logits[:, -4:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        loss = loss + mm.conversion(model).router_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for old, router in zip(before, mm.conversion(model).routers.values(), strict=True):
        assert not torch.equal(old, router.weight)


@pytest.mark.parametrize("method", ["dyvte", "tokenflex", "p_mod"])
def test_a_run_goes_on_where_it_was_stopped(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    inputs = Learning.inputs

    def noted(self: Learning, step: int) -> dict[str, Any]:
        if step < 10**6:
            steps.append(step)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return inputs(self, step)

    monkeypatch.setattr(Learning, "inputs", noted)
    model, processor = load(model_path())
    recipe = replace(RECIPES[method], steps=2, **SMALL)
    with pytest.raises(KeyboardInterrupt):
        Learning(tmp_path, model, processor, method, recipe).run()
    model, processor = load(model_path())
    folder = Learning(tmp_path, model, processor, method, recipe).run()
    assert steps == [0, 1, 1]
    saved = Saved.load(folder, method)
    assert saved.training["recipe"]["steps"] == 2 and saved.training["scores"]
    model, processor = load(model_path())
    if method == "p_mod":
        mm.convert(model, method, weights=folder)
    else:
        mm.compress(model, method, weights=str(folder))
    assert model.generate(**prepare(processor, items(2))[0].inputs, max_new_tokens=2).shape[0] == 2
    with pytest.raises(ValueError, match="another model"):
        if method == "p_mod":
            mm.convert(load(model_path("llava-next-shapes"))[0], method, weights=folder)
        else:
            mm.compress(load(model_path("llava-next-shapes"))[0], method, weights=str(folder))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--steps", "1", "--batch", "2", "--questions", "7", "--out", str(tmp_path)]
    assert main(["learn", "gamma_mod", "llava-shapes", *sizes]) == 0
    assert "mmcompress.convert(model, 'gamma_mod', weights=" in capsys.readouterr().out.replace("\n", "")
    assert main(["learn", "dyvte", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert main(["learn", "p_mod", "llava-shapes", "--steps", "0"]) == 2
    assert "--steps 0: at least 1" in capsys.readouterr().err
