# SPDX-License-Identifier: Apache-2.0
"""The two ways in which masses are added, what a step of decoding costs, and training."""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import pytest
import torch
import transformers
import transformers.modeling_utils as modeling
from mmcompress.assets import model_path
from mmcompress.eval.cost.masses import mass_costs, there
from mmcompress.eval.cost.record import prompt_inputs
from mmcompress.eval.docs.speed import masses
from mmcompress.eval.synthetic import items
from mmcompress.eval.synthetic.benchmark import load
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask

import mmcompress as mm
import mmcompress.runtime.cache as cache_module
from mmcompress.api import is_compressed
from mmcompress.plan import as_pipeline
from mmcompress.runtime.cache import CACHE, Ledger
from mmcompress.runtime.channel import Wide, widened

from .architectures import CLASSES
from .architectures import build as architecture
from .architectures import prompts as prompts_of
from .families import TEXT, VISION, build, prompts
from .flash import FlashStandIn, _one
from .test_families import GREEDY, WEIGHED, close, samples
from .tiny import IMAGE, OLDEST

MODELS = ("llava-shapes", "llava-next-shapes", "qwen3-vl-shapes", "internvl-shapes")


def plan(way: str | bool, stages: str = WEIGHED) -> str:
    return f"plan({stages}, mass={way!r})"


# ---------------------------------------------------------------------- the channels
def attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(shared, 1) for x in (k, v))
    return (q @ k.transpose(2, 3) * scale + bias).softmax(-1) @ v


@pytest.mark.parametrize(("size", "values", "width"), [(16, 16, 24), (128, 128, 136), (12, 30, 32), (30, 8, 32)])
def test_channels_equal_a_bias(size: int, values: int, width: int) -> None:
    generator = torch.Generator().manual_seed(size)
    q, k = torch.randn(2, 4, 5, size, generator=generator), torch.randn(2, 2, 9, size, generator=generator)
    v = torch.randn(2, 2, 9, values, generator=generator)
    bias = (
        torch.randint(1, 700, (2, 1, 1, 7), generator=generator).float().log()
    )  # of the first keys: later ones weigh one
    wide = widened(q, k, v, bias, 0.3)
    assert {x.shape[-1] for x in wide} == {width}
    whole = torch.nn.functional.pad(bias, (0, 2))
    close(attended(*wide, torch.zeros(()), 0.3)[..., :values], attended(q, k, v, whole, 0.3), 1e-5)


def test_in_half_precision_channels_hold_the_bias_better_than_a_mask() -> None:
    """Relative error of the weight exp(bias) of a key, masses 1 to 4,096: up to 3.2 % in a mask of bfloat16 (which rounds the
    logarithm), 0.0043 % in two channels. Of attention on random keys with masses 1 to 59: 2.5e-2 and 7.2e-3 at most."""
    bias, scale = torch.arange(1, 4097).float().log()[None, None, None], 128**-0.5
    zero = torch.zeros(1, 1, 4096, 128, dtype=torch.bfloat16)
    q, k, _ = widened(zero[:, :, :1], zero, zero, bias, scale)
    held = (q.double() @ k.double().transpose(2, 3) * scale)[:, :, 0]
    by_channels = ((held - bias[:, 0].double()).exp() - 1).abs().max()
    by_mask = ((bias.bfloat16().double() - bias.double()).exp() - 1).abs().max()
    assert by_channels < 5e-5 and 3e-2 < by_mask < 4e-2
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 8, 200, 128, generator=generator).bfloat16() for _ in range(3)]
    bias = torch.randint(1, 60, (1, 1, 1, 200), generator=generator).float().log()
    mask = torch.where(torch.ones(200, 200).tril().bool(), bias, -torch.inf)
    attend = torch.nn.functional.scaled_dot_product_attention
    exact = attend(*(x.double() for x in given), mask.double())
    masked = attend(*given, mask.bfloat16())
    wide = attend(*widened(*given, bias, scale), is_causal=True, scale=scale)[..., :128]
    errors = [(x.double() - exact).abs().max().item() for x in (masked, wide)]
    assert errors[1] < 1e-2 < errors[0] < 4e-2


# ---------------------------------------------------------------------- in models
def answers(model: Any, inputs: dict[str, Tensor], text: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits with and without a cache, and generated tokens."""
    real = inputs["attention_mask"].bool()
    with mm.compressed(model, text):
        whole, bare = (model(**inputs, use_cache=cached).logits[real] for cached in (True, False))
        return whole, bare, model.generate(**inputs, **GREEDY)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "internvl"])
def test_every_way_gives_the_same(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager and sdpa with a mask, sdpa with channels, flash attention (a stand-in, in transformers' own code), padded or not."""
    model = build(family)
    inputs = prompts(model, family, samples(family)[-rows:])
    found = [answers(model, inputs, plan(way)) for way in ("mask", "channel")]
    light = answers(model, inputs, plan(False))
    flash = FlashStandIn(monkeypatch)
    flash.enable(model)
    found.append(answers(model, inputs, WEIGHED))
    assert set(flash.calls) == ({"dense", "varlen"} if rows == 2 else {"dense"})
    assert not any(isinstance(layer.self_attn.config, Wide) for layer in model.model.language_model.layers)
    eager = build(family, attention="eager")
    found.append(answers(eager, inputs, plan("mask")))
    for logits, bare, tokens in found[1:]:
        close(logits, found[0][0], 1e-4)  # of up to 20: 1e-5 relative
        close(bare, found[0][1], 1e-4)
        assert torch.equal(tokens, found[0][2])
    assert (light[0] - found[0][0]).abs().max() > 0.1


def bare(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **_: Any) -> Any:
    """An attention function that takes no mask of numbers, whatever it is called."""
    assert mask is None and module.config._attn_implementation == "flash_like"
    rows = (x.transpose(1, 2) for x in (query, key, value))
    return torch.stack([_one(*row, scaling, True) for row in zip(*rows, strict=True)]), None


@torch.no_grad()
def test_any_function_without_a_mask_is_given_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(modeling.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_like", bare)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "flash_like", flash_attention_mask)
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava")[:1])
    expected = answers(model, inputs, plan("mask"))
    model.model.language_model.config._attn_implementation = "flash_like"
    found = answers(model, inputs, WEIGHED)
    close(found[0], expected[0], 1e-4)
    assert torch.equal(found[2], expected[2])


@torch.no_grad()
def test_later_turns_go_by_channels_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several queries on a cache with masses, where flash attention has no mask."""
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava"))
    more = torch.randint(5, 140, (2, 5), generator=torch.Generator().manual_seed(3))
    turn = {"input_ids": more, "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)}

    def both() -> Tensor:
        mm.compress(model, WEIGHED)
        return model(**turn, past_key_values=model(**inputs).past_key_values).logits

    expected = both()
    mm.uncompress(model)
    FlashStandIn(monkeypatch).enable(model)
    close(both(), expected, 1e-4)


@torch.no_grad()
def test_copies_have_views_of_their_own_config() -> None:
    model = mm.compress(build("llava"), plan("channel"))
    inputs = prompts(model, "llava", samples("llava")[:1])
    expected = model(**inputs).logits
    other = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    close(other(**inputs).logits, expected, 1e-5)
    for one in (model, other):
        layers = mm.uncompress(one).model.language_model.layers
        assert all(layer.self_attn.config is one.model.language_model.config for layer in layers)


# ---------------------------------------------------------------------- decoding
class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def step_of(model: Any, inputs: dict[str, Tensor], text: str) -> list[str]:
    """Operations of the third step behind a prompt."""
    with mm.compressed(model, text):
        out = model(**inputs)
        for _ in range(3):
            with Operations() as done:
                out = model(input_ids=torch.tensor([[7]]), **{CACHE: getattr(out, CACHE)})
    return done.names


@torch.no_grad()
@pytest.mark.skipif(OLDEST, reason="transformers 5.17 repeats the keys that heads share wherever there is a mask")
@pytest.mark.parametrize(("stages", "more"), [("voronoi(keep=0.4)", 1), (WEIGHED, 4)])
def test_a_step_of_decoding_makes_no_mask(stages: str, more: int) -> None:
    """What masses add to a step: a part of a row that is there already, once for all layers, or in each layer behind a cut."""
    model = build("llava")
    inputs = prompts(model, "llava", samples("llava")[:1])
    light, weighed = (step_of(model, inputs, plan(way, stages)) for way in (False, "mask"))
    layers = 4  # attention looks at its mask in each
    assert not {*weighed} - {*light} and 0 < len(weighed) - len(light) <= more + layers


@torch.no_grad()
def test_the_row_of_a_ledger_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = Ledger(mass=torch.tensor([[1.0, 3.0], [2.0, 1.0]]), valid=torch.tensor([[True, True], [True, False]]))
    row = ledger.step(5, torch.float32)
    least = torch.finfo(torch.float32).min
    assert row.tolist() == [[[[0, pytest.approx(1.0986123), 0, 0, 0]]], [[[pytest.approx(0.6931472), least, 0, 0, 0]]]]
    assert ledger.step(6, torch.float32).data_ptr() == row.data_ptr()
    ledger.rows(lambda t: t[[1]])
    assert ledger.step(3, torch.float32).shape == (1, 1, 1, 3)
    monkeypatch.setattr(cache_module, "GROWTH", 8)
    model = mm.compress(build("llava"), WEIGHED)
    inputs = prompts(model, "llava", samples("llava"))
    options = {"do_sample": False, "max_new_tokens": 20}
    a, b = (model.generate(**inputs, **options, use_cache=cached) for cached in (True, False))
    assert torch.equal(a, b)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_static_decode_with_masses() -> None:
    from transformers import CompileConfig

    model = mm.compress(build("llava"), "voronoi(keep=0.4)")
    inputs = prompts(model, "llava", samples("llava"))
    expected = model.generate(**inputs, **GREEDY)
    torch._dynamo.reset()
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    assert torch.equal(
        model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config), expected
    )


@torch.no_grad()
def test_costs_of_every_way() -> None:
    model = build("llava")
    model.generation_config.eos_token_id = None
    inputs = prompts(model, "llava", samples("llava")[:1])
    rows = mass_costs(model, inputs, "voronoi(keep=0.4)", repeats=2, warmup=0, new_tokens=2)
    assert [row.way for row in rows] == ["stock", "none", "mask", "channel"]
    assert [row.decode_percent is None for row in rows] == [True, True, False, False]
    assert all(row.prefill_ms > 0 and row.decode_ms > 0 and len(row.cells()) == len(row.HEADINGS) for row in rows)
    machine = dict.fromkeys(("device", "threads", "torch", "transformers", "commit"), 1)
    record = {"plan": "p", "dtype": "float32", "repeats": 2, "machine": machine, "rows": [asdict(row) for row in rows]}
    lines = [line.split(" | ") for line in masses({"mass": record}).splitlines() if line.startswith("| llava")]
    assert [line[2] for line in lines] == ["mask", "channel"] and [line[-1] for line in lines] == ["yes |", " |"]
    assert there(model) == ["sdpa"] or torch.cuda.is_available()
    assert not is_compressed(model)


# ---------------------------------------------------------------------- training
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradients_are_the_same_in_every_way_and_with_checkpointing(family: str) -> None:
    model = build(family).train()
    inputs = prompts(model, family, samples(family)[-1:])
    found = []
    for way, checkpointing in (("mask", False), ("mask", True), ("channel", True), ("channel", False)):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            model.gradient_checkpointing_disable()
        model.zero_grad()
        with mm.compressed(model, plan(way)):
            model(**inputs).logits[:, -4:].square().mean().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, gradient in found[0].items():
            close(gradient, other[name], 2e-5 * gradient.abs().max().item() + 1e-7)
    assert any("vis" in name and gradient.abs().max() > 0 for name, gradient in found[0].items())


# ---------------------------------------------------------------------- on the way to layers
@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_masses_are_carried_through_cuts_of_the_embedded_models(name: str) -> None:
    model, processor = load(model_path(name))
    item = items(1)[0]
    text = "voronoi(keep=0.25) >> dart(layer=2, keep=0.4)"
    inputs = prompt_inputs(model, processor, item.picture, item.question.text)
    with mm.compressed(model, plan(False, text)):
        light = model(**inputs).logits
    mm.compress(model, text)
    logits = model(**inputs).logits
    first, last = mm.trace(model).call.groups
    (visual,) = mm.trace(model).visuals
    assert last.start == 2 and first.mass.sum() == inputs["input_ids"].numel() and visual.sizes.sum() == visual.tokens
    assert torch.equal(last.mass, first.mass.gather(1, last.from_base)) and last.mass.max() > 1
    assert int((last.mass > 1).sum()) <= round(0.4 * visual.kept) + 1
    assert (logits - light).abs().max() > 1e-3
    a, b = (model.generate(**inputs, do_sample=False, max_new_tokens=3, use_cache=cached) for cached in (True, False))
    assert torch.equal(a, b)


# ---------------------------------------------------------------------- what cannot be
def test_ways_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="mass='flash': choose True, False, 'mask', 'channel' or None"):
        as_pipeline("voronoi", mass="flash")
    with pytest.raises(ValueError, match="no stage of this plan merges tokens"):
        as_pipeline("divprune", mass="channel")
    assert repr(as_pipeline("voronoi(keep=0.25)", mass="channel")) == "plan(voronoi(keep=0.25), mass='channel')"
    model = build("llava")
    config = model.model.language_model.config
    inputs = prompts(model, "llava", samples("llava")[:1])
    mm.compress(model, "voronoi(keep=0.4)")
    config._attn_implementation = "flash_attention_2"  # behind the back of the engine
    with pytest.raises(RuntimeError, match=r"was set when the model was compressed already.*compress.*again"):
        model(**inputs)
    mm.uncompress(model)
    with pytest.raises(NotImplementedError, match="do not come to attn_implementation='flash_attention_2'"):
        mm.compress(model, "voronoi(keep=0.4)")  # there is no such kernel here
    with pytest.raises(NotImplementedError, match=r"mass='mask': attn_implementation='flash_attention_2'.*'channel'"):
        mm.compress(model, "voronoi(keep=0.4)", mass="mask")
    config._attn_implementation = "eager"
    with pytest.raises(NotImplementedError, match=r"mass='channel': attn_implementation='eager'.*'mask'"):
        mm.compress(model, "voronoi(keep=0.4)", mass="channel")

    def deaf(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float = 1.0, **_: Any) -> Any:
        size = query.shape[-1] // 8 * 8 - 8  # looks at no channel beyond those that it expects
        return bare(module, query[..., :size], key[..., :size], value, mask, scaling)

    monkeypatch.setitem(modeling.ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_like", deaf)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "flash_like", flash_attention_mask)
    config._attn_implementation = "flash_like"
    with pytest.raises(NotImplementedError, match=r"with a bias on its keys its output differs .*'sdpa' or 'eager'"):
        mm.compress(model, "voronoi(keep=0.4)")
    mm.compress(model, "voronoi(keep=0.4)", mass=False)


def test_capped_logits_are_refused_where_there_is_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    text = transformers.Gemma2Config(**TEXT, head_dim=16, layer_types=["full_attention"] * 4)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION), text_config=text, image_token_index=IMAGE
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    FlashStandIn(monkeypatch).enable(model)
    with pytest.raises(
        NotImplementedError, match="it caps its logits at 50, and what is added in channels would be capped"
    ):
        mm.compress(model, "voronoi(keep=0.4)")


@torch.no_grad()
@pytest.mark.skipif("inkling_mm_model" not in CLASSES, reason="not in this transformers")
def test_layers_that_attend_and_carry_a_state_weigh() -> None:
    """Inkling: every layer has convolutions beside its attention."""
    model = architecture("inkling_mm_model")
    inputs = prompts_of(model, [[5, "0", 4]])
    light, weighed = (mm.compress(model, "voronoi(keep=0.4)", mass=m)(**inputs).logits for m in (False, True))
    assert (light - weighed).abs().max() > 1e-3
    assert not any("weigh" in note for note in mm.report(model).notes)
