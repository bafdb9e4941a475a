# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear error each, and a model that is as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    LlamaForCausalLM,
    MistralConfig,
)

import mmcompress as mm

from .tiny import GREEDY, IMAGE, RAGGED, build, prompts, text_config


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def sliding() -> Any:
    text = MistralConfig(
        **{
            k: v
            for k, v in text_config().to_dict().items()
            if k
            in (
                "vocab_size",
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
            )
        },
        sliding_window=8,
    )
    model = build(text=text)
    model.model.language_model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize(
    ("model", "plan", "error", "message"),
    [
        (
            lambda: nn.Linear(2, 2),
            "visionzip",
            NotImplementedError,
            "Linear is not supported: it is no model of transf.*Supported: LLaVA-1.5",
        ),
        (
            lambda: LlamaForCausalLM(text_config()),
            "visionzip",
            NotImplementedError,
            "LlamaForCausalLM is not supported: it takes no pictures",
        ),
        (
            sliding,
            "visionzip",
            NotImplementedError,
            "look back only so far, and attn_implementation='flash_attention_2' counts for that the tokens that are left",
        ),
        (build, "fastv(layer=4)", ValueError, "has 4 layers, cut before one of 1 to 3"),
        (build, "visionzap", ValueError, "did you mean 'visionzip'"),
        (
            build,
            "divprune(keep=2.0)",
            ValueError,
            r"keep=2.0: a ratio must lie in \(0, 1\]; for a count write an int, e.g. keep=2",
        ),
        (build, "tome(keep=64)", None, ""),
    ],
)
def test_refused_at_compress(model: Any, plan: str, error: Any, message: str) -> None:
    instance = model()
    before = hooks(instance)
    if error is None:
        mm.compress(instance, plan)
        return
    with pytest.raises(error, match=message):
        mm.compress(instance, plan)
    assert hooks(instance) == before
    assert "_mmcompress_engine" not in instance.__dict__


def test_a_refused_plan_leaves_the_plan_before() -> None:
    model = mm.compress(build(), "uniform", keep=0.5)
    with pytest.raises(ValueError, match="unknown method"):
        mm.compress(model, "nothing")
    with torch.no_grad():
        model(**prompts(model, RAGGED))
    assert mm.trace(model).visuals[0].kept == 8


def test_nothing_half_installed_if_a_hook_cannot_be_placed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    before = hooks(model)
    attributes = set(model.model.__dict__)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no hooks here")

    monkeypatch.setattr(model.model.language_model.layers[2], "register_forward_pre_hook", broken)
    with pytest.raises(RuntimeError, match="no hooks here"):
        mm.compress(model, "visionzip")
    assert hooks(model) == before
    assert set(model.model.__dict__) == attributes


@torch.no_grad()
@pytest.mark.parametrize("plan", ["visionzip(keep=17)", "tome(keep=17)", "fastv(layer=2, keep=40)"])
def test_a_count_above_the_tokens_of_an_image(plan: str) -> None:
    model = build()
    inputs = prompts(model, RAGGED[:1])
    logits = model(**inputs).logits
    mm.compress(model, plan)
    with pytest.raises(ValueError, match=r"keep=\d+, but only 16 visual tokens enter this stage"):
        model(**inputs)
    mm.compress(model, "uniform", keep=16)  # the failed call has left nothing behind
    assert torch.equal(model(**inputs).logits, logits)


@torch.no_grad()
def test_the_model_works_after_a_failed_call() -> None:
    model = mm.compress(build(), "visionzip", keep=0.5)
    inputs = prompts(model, RAGGED)
    logits = model(**inputs).logits
    with pytest.raises((RuntimeError, ValueError)):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:1]})
    with pytest.raises((RuntimeError, ValueError)):
        model(**{**inputs, "pixel_values": torch.randn(3, 3, 14, 14)})
    assert torch.equal(model(**inputs).logits, logits)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["visionzip(keep=0.5)", "tome(keep=0.5)"])
def test_no_images_where_some_were_promised(plan: str) -> None:
    model = mm.compress(build(), plan)
    with pytest.raises((ValueError, RuntimeError)):
        model(input_ids=torch.tensor([[5, 6, 7]]), pixel_values=torch.zeros(0, 3, 28, 28))
    with pytest.raises(ValueError, match="the prompt has image placeholders, but no image came with it"):
        model(input_ids=torch.tensor([[5, *[IMAGE] * 16, 7]]))


@torch.no_grad()
def test_prefill_chunk_size_is_refused() -> None:
    model = mm.compress(build(), "visionzip", keep=0.5)
    inputs = prompts(model, RAGGED[:1])
    with pytest.raises((NotImplementedError, ValueError), match="prefill_chunk_size"):
        model.generate(**inputs, **GREEDY, prefill_chunk_size=10)


@torch.no_grad()
def test_other_features_than_the_config_says() -> None:
    model = mm.compress(build(), "visionzip", keep=0.5)
    with pytest.raises(NotImplementedError, match="vision_feature_layer=-1 was passed"):
        model(**prompts(model, RAGGED), vision_feature_layer=-1)


def test_a_method_that_breaks_its_budget_is_stopped() -> None:
    from dataclasses import dataclass

    @mm.register("greedy_for_tokens")
    @dataclass(frozen=True, repr=False)
    class TooMany(mm.InputStage):
        keep: float | int = 0.5

        def select(self, visuals: mm.Visuals) -> mm.Selection:
            return mm.Selection.of(torch.arange(visuals.k + 1).expand(len(visuals.features), -1))

    model = mm.compress(build(), TooMany())
    with pytest.raises(ValueError, match=r"returned keep of shape \(3, 9\), its budget is \(3, 8\)"), torch.no_grad():
        model(**prompts(model, RAGGED))


def test_a_missing_signal_is_named() -> None:
    visuals = mm.Visuals(torch.randn(1, 4, 2), mm.Layout.raster(1, 2, 2), 2, {"keys": torch.randn(1, 4, 2)})
    with pytest.raises(
        ValueError, match="signal cls_attention or received_attention is not available here; there is: keys"
    ):
        visuals["cls_attention", "received_attention"]


def test_report_before_and_without_compress() -> None:
    model = build()
    with pytest.raises(ValueError, match="not compressed"):
        mm.report(model)
    mm.compress(model, "uniform")
    with pytest.raises(ValueError, match="no call with visuals yet"):
        mm.report(model)
    with torch.no_grad():
        model(**prompts(model, [[5]]))
    with pytest.raises(ValueError, match="no call with visuals yet"):
        mm.report(model)


@pytest.mark.parametrize("what", [None, 3, "llava-hf/llava-1.5-7b-hf"])
@pytest.mark.parametrize("ask", [lambda model: mm.compress(model, "divprune"), mm.report, mm.trace, mm.uncompress])
def test_what_is_no_model_is_named(what: Any, ask: Any) -> None:
    with pytest.raises(TypeError, match=rf"got {what!r} .*give the loaded model"):
        ask(what)
