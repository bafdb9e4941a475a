# SPDX-License-Identifier: Apache-2.0
"""`mmcompress check` says of a checkpoint, from its config alone, what `compress` says of the loaded model."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mmcompress.adapters import adapter_for
from mmcompress.assets import MODELS, model_path

import mmcompress as mm
from mmcompress import check as checks
from mmcompress.check import check, examine
from mmcompress.cli import main
from mmcompress.plan import methods
from mmcompress.runtime.probe import Forms

from .architectures import CLASSES, NAMES, OLDEST, TABLE, build, config
from .exactness import PLANS

Said = pytest.CaptureFixture[str]


@pytest.mark.skipif(OLDEST, reason="configs and the table are those of the newest transformers")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_values_is_told_what_the_table_says(name: str) -> None:
    with torch.device("meta"):
        model = getattr(transformers, CLASSES[name])._from_config(config(name))
    row, heard = TABLE[name], PLANS["audio"].format(0.5)
    found = examine(model, [*methods(), heard])
    for kind in ("input", "layer", "signal", "encoder"):
        if row[kind] != "audio only":
            said = found.methods.get(PLANS[kind].partition("(")[0], found.refused)
            assert (said is None) == (row[kind] == "ok"), (kind, said)
    if row["audio"] != "no audio":  # muse_spark has what it takes, but transformers does not say that it hears
        assert (found.methods.get(heard, found.refused) is None) == (row["audio"] == "ok")
    assert found.works == ("ok" in (row["input"], row["audio"]))
    assert {"signals": found.signals, "positions": found.positions} == {n: row[n] for n in ("signals", "positions")}
    assert found.refused or set(found.methods) == {*methods(), heard}
    assert not any(p.device.type != "meta" for p in model.parameters()), "the model was given values"


@pytest.mark.parametrize("name", MODELS)
def test_the_same_with_and_without_weights(name: str) -> None:
    loaded = transformers.AutoModelForImageTextToText.from_pretrained(model_path(name), dtype=torch.float32)
    with_weights, without = examine(loaded), check(name)
    for field in (
        "family",
        "stages",
        "methods",
        "signals",
        "modalities",
        "positions",
        "layers",
        "attention",
        "parameters",
    ):
        assert getattr(with_weights, field) == getattr(without, field), field
    assert without.works and without.tokens[0].startswith("336 x 336 pixels: ")


@pytest.mark.parametrize("name", ["kimi_k25", "glm4v", "hunyuan_vl", "qwen3_vl"])
def test_forms_of_attention_are_those_of_the_loaded_model(name: str) -> None:
    model = build(name)
    with torch.device("meta"):
        empty = type(model)._from_config(config(name))
    language_model = adapter_for(empty).language_model
    without = checks._Sampled(language_model, empty)
    real = Forms(adapter_for(model).language_model, model)
    for index in range(len(language_model.layers)):
        ours, theirs = without.of(index, "test"), real.of(index, "test")
        for field in ("plain", "rotation", "scaling", "softcap", "sinks", "cached", "norm", "out", "name"):
            assert getattr(ours, field) == getattr(theirs, field), field
        assert ours.layer is language_model.layers[index]


def test_rotary_tables_are_those_of_a_model_with_values() -> None:
    real = build("qwen2_5_vl")
    with torch.device("meta"):
        empty = type(real)._from_config(real.config)
    checks._Sampled(empty.model.language_model, empty)
    ours, theirs = empty.model.language_model.rotary_emb, real.model.language_model.rotary_emb
    assert torch.equal(ours.inv_freq, theirs.inv_freq) and ours.inv_freq.abs().sum() > 0


def test_every_kind_of_layer_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(text_config={"model_type": "llama", "num_hidden_layers": 80, "hidden_size": 64,
                                                  "num_attention_heads": 4, "intermediate_size": 96})
        )  # fmt: skip
    tried = []
    real = checks._Sampled._real
    monkeypatch.setattr(checks._Sampled, "_real", lambda self, layer: tried.append(layer) or real(self, layer))
    found = examine(model)
    assert len(tried) == 1 and found.methods["pyramiddrop"] is None
    assert found.attention == ["80 x full_attention: LlamaAttention, rotary rotate"]


def folder(tmp_path: Path, **files: Any) -> str:
    for name, content in files.items():
        path = tmp_path / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"model_index__json": {"_class_name": "StableDiffusionPipeline"}}, "is a diffusion pipeline, which draws pictures"),
        ({"config__json": {"_class_name": "UNet2D", "_diffusers_version": "0.3"}}, "is a diffusion model, which draws pictures"),
        ({"model-Q4_K_M__gguf": "GGUF"}, "is a GGUF file of llama.cpp"),
        ({"adapter_config__json": {"base_model_name_or_path": "a/b"}}, "is an adapter of PEFT: check a/b"),
        ({"params__json": {"dim": 1}}, "in the form of Mistral's own code"),
        ({"config__json": {"architecture": "vit_base_patch16_224"}}, "is a vision transformer of timm"),
        (
            {"config__json": {"model_type": "internvl_chat", "auto_map": {"AutoModel": "x.Y"}}},
            "the code of .* lies in the checkpoint .*take a checkpoint that was converted for transformers",
        ),
        ({"config__json": {"model_type": "future_vl", "transformers_version": "9.1"}}, "knows no model_type 'future_vl'; .* 9.1"),
        ({"config__json": {"model_type": "llama", "num_hidden_layers": 1}}, "it takes no pictures.*so it has no"),
        ({"config__json": {"model_type": "t5", "num_layers": 1}}, "it takes no pictures"),
        ({"config__json": {"model_type": "florence2"}}, "it is an encoder-decoder: .*smaller pictures"),
        ({"config__json": {"model_type": "mllama"}}, "by cross-attention: .*smaller pictures, or fewer tiles"),
        (
            {"config__json": {"model_type": "llava", "text_config": {"model_type": "llama", "hidden_size": 63}}},
            "LlavaForConditionalGeneration cannot be built from config.json",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_compressed_is_named(files: dict[str, Any], said: str, tmp_path: Path, capsys: Said) -> None:
    name = folder(tmp_path, **files)
    assert main(["check", name]) == 1 and "refused  " in capsys.readouterr().out
    assert main(["check", name, "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert re.search(said, told["refused"]) and told["works"] is False, told["refused"]


def test_the_words_are_those_of_compress(tmp_path: Path) -> None:
    name = folder(tmp_path, config__json={"model_type": "llama", "num_hidden_layers": 1})
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=1))
    with pytest.raises(NotImplementedError) as refused:
        mm.compress(model, "divprune")
    assert check(name).refused == str(refused.value)


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("/no/such/folder", {}, "no such folder"),
        ("llava-shaps", {}, "did you mean 'llava-shapes'"),
        ("{}", {"README__md": "x"}, "has no config.json: it is no checkpoint"),
        ("{}/README.md", {"README__md": "x"}, "is a file: give the folder of a checkpoint"),
        ("{}", {"config__json": "{"}, "config.json is not JSON"),
        ("{}", {"config__json": "[]"}, "holds no config"),
    ],
)  # fmt: skip
def test_where_no_checkpoint_is(name: str, files: dict[str, Any], said: str, tmp_path: Path, capsys: Said) -> None:
    assert main(["check", name.format(folder(tmp_path, **files))]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_name_on_the_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch, capsys: Said) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nmore")

    monkeypatch.setattr("transformers.utils.hub.cached_file", gone)
    assert main(["check", "owner/name"]) == 2
    assert capsys.readouterr().err == (
        "mmcompress: owner/name: no such folder here, and from the hub: We couldn't connect to 'https://huggingface.co'\n"
    )


def test_a_name_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only small files are asked for."""
    asked = []

    def cached(name: str, file: str, **_: Any) -> str | None:
        asked.append(file)
        path = tmp_path / file
        return str(path) if path.is_file() else None

    monkeypatch.setattr("transformers.utils.hub.cached_file", cached)
    folder(tmp_path, model_index__json={})
    assert "is a diffusion pipeline" in str(check("owner/name").refused)
    assert asked == ["config.json", "model_index.json"]
    folder(tmp_path, config__json=json.loads((model_path("llava-shapes") / "config.json").read_text()))
    assert check("owner/name").works


def test_a_quantised_checkpoint_is_one_without(tmp_path: Path) -> None:
    values = json.loads((model_path("llava-shapes") / "config.json").read_text())
    found = check(folder(tmp_path, config__json=values | {"quantization_config": {"quant_method": "awq", "bits": 4}}))
    assert found.works and found.notes == [
        "quantised (awq): what is said holds for the modules as they are without that"
    ]


def test_a_large_model_takes_seconds_and_little_memory(tmp_path: Path) -> None:
    """Of 33 billion parameters: one attention module of each kind is made, and nothing else."""
    text = {"hidden_size": 4096, "intermediate_size": 29568, "num_hidden_layers": 80, "num_attention_heads": 32,
            "num_key_value_heads": 8, "model_type": "qwen2_5_vl_text"}  # fmt: skip
    made = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        fill = checks._Sampled._fill
        patch.setattr(checks._Sampled, "_fill", lambda self, module: (fill(self, module), made.append(module)))
        found = check(folder(tmp_path, config__json={"model_type": "qwen2_5_vl", "text_config": text}))
    assert found.works and found.methods["fastv"] is None and found.parameters > 30e9
    held = sum(p.numel() for module in made for p in module.parameters(recurse=False) if not p.is_meta)
    assert held == 2 * 4096 * (4096 + 1024) + 4096 + 2 * 1024 + 2 * 4096, "more than one attention module and two norms"


def test_the_command_says_it_in_lines(capsys: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["check", "qwen3-vl-shapes"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for part in (
        "model qwen3-vl-shapes qwen3_vl Qwen3VLForConditionalGeneration",
        "input stages work layer stages work encoder stages work",
        "signals patches, features modalities image, video positions keep layers 6 full_attention",
        "not dyvte: dyvte has no routers: train them",
    ):
        assert part in out, out
    assert main(["check", "llava-shapes", "--load", "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["works"] and told["methods"]["fastv"] is None and told["stages"]["layer"] == "ok"


def test_one_plan_is_asked(capsys: Said) -> None:
    plan = "divprune(keep=0.5) >> fastv(layer=2, keep=0.5)"
    assert main(["check", "llava-shapes", "--plan", plan, "--plan", "fastv(layer=99, keep=0.5)", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["methods"][plan] is None and told["stages"] == {"input": "ok", "layer": "ok"}
    assert "has 6 layers, cut before one of 1 to 5" in told["methods"]["fastv(layer=99, keep=0.5)"]
    assert main(["check", "llava-shapes", "--plan", "visionzap"]) == 2
    assert "unknown method 'visionzap'" in capsys.readouterr().err
