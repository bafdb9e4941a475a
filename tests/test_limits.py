# SPDX-License-Identifier: Apache-2.0
"""Models that are only partly supported, and pictures at the edges."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from mmcompress.adapters.common import CommonAdapter
from mmcompress.eval.making.families import FAMILIES
from mmcompress.eval.making.model import make_model, make_processor
from mmcompress.eval.synthetic.benchmark import prompt
from PIL import Image

import mmcompress as mm
from mmcompress.cli import main

from . import architectures
from . import reference as _registers_by_hidden  # noqa: F401
from .families import END, IMAGE, QWEN, START, TEXT, VIDEO, VISION
from .tiny import GREEDY, PAD


# ---------------------------------------------------------------------- a model that no adapter knows
def vip_llava() -> Any:
    """Features of several layers, a projector of its own: follows the common interface."""
    torch.manual_seed(0)
    config = transformers.VipLlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION).to_dict(),
        text_config=transformers.LlamaConfig(**TEXT).to_dict(),
        image_token_index=IMAGE,
        vision_feature_layers=[-2, -3],
        projector_layernorm_eps=1e-5,
    )
    model = transformers.VipLlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    model.generation_config.suppress_tokens = [IMAGE]
    return model


def vip_inputs() -> dict[str, torch.Tensor]:
    ids = torch.tensor([[5, 6, 7, *[IMAGE] * 16, 8, 9], [PAD, PAD, 5, *[IMAGE] * 16, 10, 11]])
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}


@torch.no_grad()
@pytest.mark.parametrize(
    "plan", ["random(keep=0.5)", "divprune(keep=0.5)", "uniform(keep=0.5) >> by_hidden(layer=2, keep=0.5)"]
)
def test_unknown_model_takes_stages_that_need_only_features(plan: str) -> None:
    model, inputs = vip_llava(), vip_inputs()
    logits = model(**inputs).logits
    with mm.compressed(model, "random", keep=1.0):
        assert torch.equal(model(**inputs).logits, logits)
    mm.compress(model, plan)
    a, b = (model.generate(**inputs, **GREEDY, use_cache=cached) for cached in (True, False))
    assert torch.equal(a, b)
    assert [(v.tokens, v.kept) for v in mm.trace(model).visuals] == [(16, 8)] * 2


@pytest.mark.parametrize(("lengths", "pictures"), [((8, 4), [4, 4, 4]), ((7, 5), [7, 5]), ((5, 5), [5, 5])])
def test_one_tensor_per_sample_is_dealt_to_its_pictures(lengths: tuple[int, int], pictures: list[int]) -> None:
    """Three states of pictures; only where all samples are whole pictures."""
    features = [torch.randn(n, 3) for n in lengths]
    output = SimpleNamespace(pooler_output=features, last_hidden_state=torch.zeros(3, 4, 2))
    found = CommonAdapter.features(None, output, {"pixel_values": torch.zeros(2, 2, 3, 8, 8)})  # type: ignore[arg-type]
    assert [len(one) for one in found] == pictures
    assert torch.equal(torch.cat([*found]), torch.cat(features))


@pytest.mark.parametrize("plan", ["visionzip", "tome"])
def test_unknown_model_says_what_it_lacks(plan: str) -> None:
    model = architectures.build("got_ocr2")
    with pytest.raises(NotImplementedError, match=r"vision encoder of GotOcr2ForConditionalGeneration .*is not known"):
        mm.compress(model, plan)
    assert not any(module._forward_pre_hooks for module in model.modules())


# ---------------------------------------------------------------------- a hybrid language model
def qwen3_5() -> Any:
    torch.manual_seed(0)
    kinds = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    text = {
        **TEXT, "head_dim": 32, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "layer_types": kinds, "rope_parameters": {**rope, "partial_rotary_factor": 0.25},
    }  # fmt: skip
    vision = {
        "depth": 4, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": 32,
        "intermediate_size": 48, "out_hidden_size": 64, "num_position_embeddings": 64,
    }  # fmt: skip
    config = transformers.Qwen3_5Config(
        text_config=text, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START,
        vision_end_token_id=END,
    )  # fmt: skip
    model = transformers.Qwen3_5ForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, START, END]
    return model


@torch.no_grad()
@pytest.mark.parametrize("plan", ["divprune(keep=0.5)", "tome(keep=0.5) >> visionzip(keep=0.5)"])
def test_hybrid_language_model_before_the_llm(plan: str) -> None:
    from .families import image, prompts

    model = qwen3_5()
    inputs = prompts(model, QWEN[-1], [[5, image(QWEN[-1]), 4], [3, image(QWEN[-1], True), 6]])
    logits = model(**inputs).logits
    with mm.compressed(model, "random", keep=1.0):
        assert torch.equal(model(**inputs).logits, logits)
    mm.compress(model, plan)
    a, b = (model.generate(**inputs, **GREEDY, use_cache=cached) for cached in (True, False))
    assert torch.equal(a, b)
    assert all(v.kept < v.tokens for v in mm.trace(model).visuals)


@torch.no_grad()
def test_masses_in_a_hybrid_language_model() -> None:
    """They weigh where a layer attends, in the report it says so; layers with a state see every token once."""
    from .families import image, prompts

    model = qwen3_5()
    inputs = prompts(model, QWEN[-1], [[5, image(QWEN[-1]), 4], [3, image(QWEN[-1], True), 6]])
    real = inputs["attention_mask"].bool()
    mm.compress(model, "voronoi(keep=0.5)", mass=False)
    light, kept = model(**inputs).logits[real], "weigh what they stand for in 1 of 4 layers; the others carry a state"
    assert not any(kept in note for note in mm.report(model).notes)
    mm.compress(model, "voronoi(keep=0.5)")
    assert (model(**inputs).logits[real] - light).abs().max() > 1e-2
    assert any(kept in note for note in mm.report(model).notes)
    a, b = (model.generate(**inputs, **GREEDY, use_cache=cached) for cached in (True, False))
    assert torch.equal(a, b)
    model.model.language_model.config.layer_types = ["linear_attention"] * 4
    with pytest.raises(NotImplementedError, match="no layer of the language model attends"):
        mm.compress(model, "voronoi(keep=0.5)")


def test_hybrid_language_model_refuses_layer_cuts() -> None:
    with pytest.raises(NotImplementedError, match=r"fastv.*layers of type linear_attention, whose state cannot forget"):
        mm.compress(qwen3_5(), "fastv(layer=2)")


# ---------------------------------------------------------------------- pictures at the edges
def edge_pictures(folder: Path) -> dict[str, Image.Image]:
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    plain = Image.fromarray(noise)
    turned = folder / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    plain.save(turned, exif=exif)
    deep = folder / "deep.png"
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(deep)
    return {
        "one pixel": plain.resize((1, 1)),
        "ten to one": plain.resize((400, 40)),
        "one to ten": plain.resize((40, 400)),
        "grey": plain.convert("L"),
        "with alpha": plain.convert("RGBA"),
        "print colours": plain.convert("CMYK"),
        "palette": plain.convert("P"),
        "16 bit": Image.open(deep),
        "turned": Image.open(turned),
    }


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    made = {}
    for name, family in FAMILIES.items():
        torch.manual_seed(0)
        processor = family().make_processor()
        made[name] = family().make_model(processor.tokenizer).eval(), processor
    processor = make_processor()
    made["llava-shapes"] = make_model(processor.tokenizer).eval(), processor
    return made


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-shapes", *FAMILIES])
def test_pictures_of_all_kinds_do_what_the_processor_does(
    name: str, models: dict[str, tuple[Any, Any]], tmp_path: Path
) -> None:
    """What the stock processor and model take, the compressed model takes; what they refuse, they refuse alone."""
    model, processor = models[name]
    taken = []
    for kind, picture in edge_pictures(tmp_path).items():
        mm.uncompress(model)
        try:
            inputs = processor(images=picture, text=prompt(processor, "what is there ?"), return_tensors="pt")
            stock = model(**inputs).logits
        except Exception:  # refused by transformers itself, before anything of ours
            continue
        taken.append(kind)
        with mm.compressed(model, "divprune", keep=1.0):
            assert torch.equal(model(**inputs).logits, stock), kind
        for plan in ("visionzip(keep=0.25)", "tome(keep=0.5) >> divprune(keep=3) >> fastv(layer=2, keep=0.5)"):
            with mm.compressed(model, plan):
                if mm_tokens(model, inputs) < 6:  # fewer tokens than the plan keeps
                    continue
                assert model(**inputs).logits.isfinite().all(), kind
    assert {"one pixel", "grey", "with alpha", "turned", "palette"} <= set(taken)


def mm_tokens(model: Any, inputs: Any) -> int:
    return int((inputs["input_ids"] == model.config.image_token_id).sum())


def test_command_line_shows_every_readable_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, picture in edge_pictures(tmp_path).items():
        path = tmp_path / f"{kind}.{'tif' if kind == 'print colours' else 'png'}"
        picture.save(path)
        code = main(
            ["run", "llava-next-shapes", "--image", str(path), "--question", "what does the sign say ?", "--out",
             str(tmp_path / "kept.png"), "--max-new-tokens", "2", "--plan", "divprune(keep=0.5)"]
        )  # fmt: skip
        assert code == 0, (kind, capsys.readouterr().err)


def test_command_line_refuses_a_truncated_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = tmp_path / "whole.png", tmp_path / "cut.png"
    edge_pictures(tmp_path)["ten to one"].save(whole)
    cut.write_bytes(whole.read_bytes()[:400])
    assert main(["run", "llava-next-shapes", "--image", str(cut), "--question", "what ?"]) == 2
    error = capsys.readouterr().err
    assert "cut.png" in error and "not a readable picture" in error and error.count("\n") == 1


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    from mmcompress.cli.common import open_image

    edge_pictures(tmp_path)
    values = np.asarray(open_image(tmp_path / "deep.png"))[..., 0]
    expected = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)[..., 0]
    assert np.array_equal(values, expected)
