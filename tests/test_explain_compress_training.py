# SPDX-License-Identifier: Apache-2.0
"""explain_compress: labels on disk, training, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcompress.assets import model_path
from mmcompress.eval import explain_train
from mmcompress.eval.cost.counts import count
from mmcompress.eval.cost.midsize import build as midsize
from mmcompress.eval.cost.midsize import one_image_prompt
from mmcompress.eval.explain_train import Labels, Recipe, training_questions
from mmcompress.eval.synthetic.benchmark import load
from torch import Tensor

import mmcompress as mm
from mmcompress.cli import main
from mmcompress.explain.compressor import Fitting, Pair, agreement, fit, losses, padded
from mmcompress.methods.explain_compress import Compressor

from .families import build

SAMPLES = 24


def shifted_pairs(count: int, seed: int = 0) -> list[Pair]:
    """What is relevant stands one token behind the attention; visuals of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        attention = torch.rand(12 + 4 * (i % 3), generator=generator) ** 4 / 20
        found.append(Pair(attention, attention.roll(1)))
    return found


def test_a_net_learns_what_attention_alone_does_not_say() -> None:
    train, held_out = shifted_pairs(120), shifted_pairs(30, seed=1)
    seen: list[tuple[int, float, float]] = []
    how = Fitting(epochs=12, batch=24, rate=5e-3)
    net = fit(train, held_out, how, show=lambda *row: seen.append(row))
    found = agreement(net, held_out)
    assert found["divergence"] < 0.5 * found["divergence of a flat guess"]
    assert found["overlap learned 25 %"] > found["overlap proxy 25 %"] + 0.3
    assert found["overlap learned 25 %"] > found["overlap chance 25 %"] > 0.2
    assert len(seen) == 12 and seen[-1][1] < seen[0][1]
    assert found["divergence"] == pytest.approx(min(now for *_, now in seen), rel=1e-4)  # the best epoch, not the last
    again = fit(train, held_out, how)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))


def test_training_stops_when_it_gets_no_better() -> None:
    seen: list[int] = []
    generator = torch.Generator().manual_seed(2)
    noise = [Pair(torch.rand(9, generator=generator), torch.rand(9, generator=generator)) for _ in range(24)]
    fit(noise[:16], noise[16:], Fitting(epochs=60, patience=2, rate=2e-2), show=lambda epoch, *_: seen.append(epoch))
    assert 3 <= len(seen) < 60
    nothing = [Pair(torch.rand(5), torch.zeros(5))]
    with pytest.raises(ValueError, match="0 to hold out"):
        fit(noise, nothing)
    with pytest.raises(ValueError, match="patience=0"):
        Fitting(patience=0)
    with pytest.raises(ValueError, match="rate=-1"):
        Fitting(rate=-1)


def test_losses_of_ragged_batches_are_those_of_each_pair() -> None:
    torch.manual_seed(0)
    net, pairs = Compressor((8, 16)), shifted_pairs(5)
    together = losses(net, pairs)
    apart = torch.cat([losses(net, [pair]) for pair in pairs])
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)
    assert padded(pairs)[2].sum(1).tolist() == [12, 16, 20, 12, 16]


# ---------------------------------------------------------------------- the command
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves behind for an embedded model."""
    out: Path = tmp_path_factory.mktemp("explain") / "out"
    arguments = ["explain-train", "llava-shapes", "--out", str(out), "--samples", str(SAMPLES), "--batch", "12"]
    assert main([*arguments, "--epochs", "2", "--score", "7", "--compare", "random", "--device", "cpu"]) == 0
    return out


def loaded() -> tuple[Any, Any]:
    return load(model_path())


def test_the_command_writes_weights_that_fit_the_model(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_text())
    assert report["asked"] == SAMPLES and 1 < report["right"] <= SAMPLES and report["labels"] == report["right"]
    wanted = {f"{name} {keep} %" for name in ("learned", "random") for keep in (50, 25, 10)}
    assert set(report["accuracy"]) == {"full", *wanted}
    assert (folder / "weights" / "model.safetensors").stat().st_size < 10**6
    model, _ = loaded()
    mm.compress(model, "explain_compress", weights=folder / "weights", keep=0.25)
    with pytest.raises(ValueError, match="another model"):
        mm.compress(build("llava"), "explain_compress", weights=folder / "weights")


def test_labels_are_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded()
    questions = training_questions(SAMPLES, model)
    recipe = Recipe(samples=SAMPLES, batch=12, new_tokens=8)
    made: list[int] = []
    batch = Labels._batch

    def counted(self: Labels, asked: Any) -> dict[str, Tensor]:
        made.append(len(asked))
        return batch(self, asked)

    monkeypatch.setattr(Labels, "_batch", counted)
    pairs, right = Labels(folder / "labels", model, processor, questions, recipe).make()
    assert not made and len(pairs) == right == json.loads((folder / "report.json").read_text())["right"]
    last = sorted((folder / "labels").glob("000001-*"))[0]
    last.unlink()  # as if the run had been stopped before it
    again, _ = Labels(folder / "labels", model, processor, questions, recipe).make()
    assert made == [12] and len(again) == len(pairs)
    assert all(torch.equal(a.relevance, b.relevance) for a, b in zip(pairs, again, strict=True))
    assert all(len(pair.attention) == 144 and pair.relevance.min() >= 0 for pair in pairs)
    with pytest.raises(ValueError, match="another mode"):
        Labels(folder / "labels", model, processor, questions, Recipe(batch=12, new_tokens=8, mode="fast"))
    with pytest.raises(ValueError, match="another base"):
        Labels(folder / "labels", build("llava"), processor, questions, recipe)


@pytest.mark.slow
def test_online_cost_is_below_one_percent_of_the_prefill(tmp_path: Path) -> None:
    model = midsize("llava")
    inputs = one_image_prompt(model)
    Compressor().save_pretrained(tmp_path, model)
    stock = count(model, inputs)
    found = count(model, inputs, f"explain_compress(weights={str(tmp_path)!r}, keep=0.25)", stock)
    assert 0 < found.overhead < 0.01 * stock.total


def test_wrong_answers_give_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = loaded()
    questions = training_questions(20, model)[:4]
    monkeypatch.setattr(Labels, "_answers", lambda self, inputs, most: [[5], [5], [5], [5]])
    with pytest.raises(ValueError, match="none of 4 answers is right"):
        Labels(tmp_path / "labels", model, processor, questions, Recipe(batch=4)).make()


def test_bad_input_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["llava-shapes", "--samples", "3"], "samples=3"),
        (["llava-shapes", "--task", "gqa"], "needs --data"),
        (["llava-shapes", "--kernel", "4", "--score", "0", "--samples", "20", "--data", str(tmp_path)], "no table"),
        ([str(tmp_path / "none")], "no such folder"),
        (["llava-shapes", "--epochs", "0"], "--epochs 0: at least 1"),
    ):
        assert main(["explain-train", *arguments, "--out", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err
    assert explain_train.RIGHT == 0.5
