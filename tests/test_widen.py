# SPDX-License-Identifier: Apache-2.0
"""Wider copies of the embedded models: the same logits, answers and choices; and the commands that take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcompress.assets import MODELS, PAGES, checkpoint, model_path, split
from mmcompress.eval.synthetic import evaluate, items, prepare
from mmcompress.eval.synthetic.benchmark import load, takes_any_shape
from mmcompress.eval.synthetic.pages import page_items
from mmcompress.eval.widen import widen

import mmcompress as mm
from mmcompress.cli import main

from .families import build

PLANS = ("voronoi(keep=0.25)", "fastv(layer=2, keep=0.25)", "tome(keep=0.5)")
"""Chosen by cosine, by attention in a layer, and by keys of the encoder."""


@pytest.fixture(scope="module", params=[*MODELS, PAGES])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """A model, its copy and a batch of questions."""
    model, processor = load(model_path(request.param))
    asked = page_items(2) if request.param == PAGES else items(2, stretched=takes_any_shape(model))
    return model, widen(model, 4, 2), (processor, prepare(processor, asked))


@torch.no_grad()
def test_a_wider_copy_says_the_same(pair: tuple[Any, Any, Any]) -> None:
    model, wide, (processor, (batch,)) = pair
    ours, theirs = (one(**batch.inputs).logits for one in (wide, model))
    assert (ours - theirs).abs().max() < 2e-6 * theirs.abs().max() + 2e-5
    text, vision = wide.config.get_text_config(), wide.config.vision_config
    assert text.hidden_size == 4 * model.config.get_text_config().hidden_size
    assert vision.hidden_size == 2 * model.config.vision_config.hidden_size
    grown = sum(p.numel() for p in wide.parameters()) / sum(p.numel() for p in model.parameters())
    assert 4 < grown < 16
    assert evaluate(wide, processor, [batch]).answers == evaluate(model, processor, [batch]).answers
    if "pages" in processor.tokenizer.name_or_path:
        return  # of white paper one patch is as good as another: rounding decides
    for plan in PLANS:
        kept, logits = [], []
        for one in (model, wide):
            with mm.compressed(one, plan):
                logits.append(one(**batch.inputs, logits_to_keep=1).logits)
                kept.append([visual.selection.keep for visual in mm.trace(one).visuals])
        assert all(torch.equal(a, b) for a, b in zip(*kept, strict=True)), plan
        assert (logits[0] - logits[1]).abs().max() < 1e-4, plan


def test_a_model_with_tied_embeddings_and_grouped_queries() -> None:
    """Embeddings repeat, the head divides: they cannot be one tensor any more."""
    model = build("qwen3_vl")
    text = model.config.get_text_config()
    assert text.num_key_value_heads < text.num_attention_heads
    model.config.tie_word_embeddings = text.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    wide = widen(model, 3, 1)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids).logits for one in (wide, model))
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert wide.lm_head.weight is not wide.get_input_embeddings().weight
    assert widen(model, 1, 1).lm_head.weight.shape == model.lm_head.weight.shape


def test_what_cannot_be_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llava")
    with pytest.raises(ValueError, match="vision=0: at least 1"):
        widen(model, 8, 0)
    with mm.compressed(model, "uniform(keep=0.5)"), pytest.raises(ValueError, match="before it is compressed"):
        widen(model)
    # lengths are not kept: a model that multiplies embeddings by one would say something else
    embed = model.get_input_embeddings()
    forward = type(embed).forward
    monkeypatch.setattr(type(embed), "forward", lambda self, x: forward(self, x) * self.embedding_dim)
    with pytest.raises(NotImplementedError, match="would not say the same"):
        widen(model, 2, 1)


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert split("llava-shapes@8x4") == ("llava-shapes", (8, 4)) and split("llava-shapes") == ("llava-shapes", None)
    assert split("someone/model@2x1") == ("someone/model", (2, 1)) and split("a@b@2x") == ("a@b@2x", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine@2x2").mkdir()
    assert split("mine@2x2") == ("mine@2x2", None) and checkpoint("mine@2x2") == "mine@2x2"


def test_commands_take_a_wider_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    line = ["bench", "llava-shapes@2x1", "--plan", "uniform(keep=0.5)", "--repeats", "1", "--warmup", "0"]
    assert main([*line, "--new-tokens", "2", "--device", "cpu", "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    assert record["model"] == "llava-shapes@2x1" and "llava-shapes@2x1" in capsys.readouterr().out
    folder = tmp_path / "sweep"
    line = ["sweep", "llava-shapes", "--plan", "uniform", "--keep", "50%", "--questions", "7", "--repeats", "1"]
    assert (
        main([*line, "--time-on", "llava-shapes@2x1", "--examples", "0", "--device", "cpu", "--out", str(folder)]) == 0
    )
    swept = json.loads((folder / "sweep.json").read_text())
    assert swept["model"] == "llava-shapes" and swept["cost"]["model"] == "llava-shapes@2x1"
    assert swept["cost"]["weights"] == record["weights"]
    with pytest.raises(SystemExit):
        main(["demo", "--model", "llava-shape@2x1"])
    assert "choose among llava-shapes" in capsys.readouterr().err
