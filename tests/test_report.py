# SPDX-License-Identifier: Apache-2.0
"""The report speaks of this model: FLOPs by module shapes against torch's counter, KV bytes against the cache, words and units."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from mmcompress.adapters import adapter_for
from mmcompress.eval.cost.counts import count
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import mmcompress as mm
from mmcompress.flops import LLM, OPERATORS, WHOLE, LayerCost, counted, layer_costs
from mmcompress.runtime.cache import CACHE, Held, cache_of, held_bytes
from mmcompress.trace import Report, flop, size

from . import architectures, families, tiny
from .architectures import OLDEST

EXACT = (
    "llava", "qwen3_vl_moe", "qwen3_omni_moe_thinker", "glm4v_moe", "kimi_k25", "deepseek_ocr2", "aria", "minimax_m3_vl",
    "apertus1p5", "gemma4", "step3p7", "paligemma", "molmo2", "hunyuan_vl", "glm46v",
)  # fmt: skip
NAMED = {
    "qwen3_5": ("linear_attn", 3), "qwen3_5_moe": ("linear_attn", 3), "lfm2_vl": ("conv", 3), "dots3_note": ("indexer", 2),
    "ernie4_5_vl_moe": ("experts", 3), "hy_v4_vl": ("attn_hc", 4),
}  # fmt: skip
"""What the modules do not tell, and in how many of the four layers."""


@contextmanager
def by_torch(language_model: Any) -> Iterator[dict[str, int]]:
    """FLOPs of the decoder layers in the calls of a block, as torch counts them; what hooks do before a layer is not in them."""
    found, starts, handles = {"layers": 0}, list[int](), []

    def enter(*_: Any) -> None:
        starts.append(counter.get_total_flops())

    def leave(*_: Any) -> None:
        found["layers"] += counter.get_total_flops() - starts.pop()

    for layer in language_model.layers:
        handles += [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave, prepend=True)]
    try:
        with FlopCounterMode(display=False, custom_mapping=OPERATORS) as counter, sdpa_kernel(SDPBackend.MATH):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def checked(name: str) -> tuple[tuple[LayerCost, ...], int, int]:
    """Costs of the layers of an architecture; their sum over a prompt; the same by torch."""
    model = architectures.build(name)
    language_model, inputs = adapter_for(model).language_model, architectures.prompts(model, [[5, "0", 4]])
    with torch.no_grad(), by_torch(language_model) as found:
        model(**inputs, use_cache=True)
    costs = layer_costs(language_model)
    return costs, sum(cost.flops(inputs["input_ids"].shape[1]) for cost in costs), found["layers"]


@pytest.mark.skipif(OLDEST, reason="the sizes of the tiny models are those of the newest configs")
@pytest.mark.parametrize("name", EXACT)
def test_the_shapes_of_modules_give_what_torch_counts(name: str) -> None:
    """Grouped queries, experts, latent attention, layers of several widths, towers of several kinds."""
    costs, told, right = checked(name)
    assert told == right and not any(cost.missing for cost in costs)


@pytest.mark.parametrize("name", NAMED)
def test_what_cannot_be_counted_is_named(name: str) -> None:
    costs, told, right = checked(name)
    word, layers = NAMED[name]
    assert sum(any(word in what for what in cost.missing) for cost in costs) == layers
    assert told < right


@pytest.mark.slow
def test_every_architecture_is_counted_or_named() -> None:
    """All those of the installed transformers that compress, tiny: exact, or something is missing by name."""
    wrong, seen = [], 0
    for name in architectures.NAMES:
        try:
            model = architectures.build(name)
            adapter_for(model)
            model(**architectures.prompts(model, [[5, "0", 4]]))
        except Exception:  # not for compression, or stock does not run it
            continue
        try:
            costs, told, right = checked(name)
        except (IndexError, AssertionError):  # torch's counter cannot see into it
            continue
        seen += 1
        if abs(told - right) > 1e-3 * right and not any(cost.missing for cost in costs):
            wrong.append((name, told, right))
    assert not wrong and seen > 50


def test_experts_count_as_far_as_a_token_runs_them() -> None:
    """Two of four experts of 64 to 96; the router; no expert that sleeps."""
    model = architectures.build("qwen3_vl_moe")
    language_model = adapter_for(model).language_model
    config = language_model.config
    width, inner, heads = config.hidden_size, config.moe_intermediate_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    token = 2 * (2 * width * heads + 2 * width * keys + config.num_experts * width + 2 * 3 * width * inner)
    assert [(c.token, c.pair) for c in layer_costs(language_model)] == [(token, 4 * heads)] * 4
    language_model.layers[1].mlp.gate.top_k = 3
    assert layer_costs(language_model)[1].token == token + 2 * 3 * width * inner


def test_lists_of_experts_and_packed_or_wrapped_matrices() -> None:
    """Experts as a list of modules; weights that are packed into bytes; an adapter beside a matrix."""
    peft = pytest.importorskip("peft")
    model = tiny.build()
    language_model = model.model.language_model
    plain = layer_costs(language_model)
    inner = language_model.layers[0].mlp
    matrices = 2 * 3 * 64 * 96

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts, self.top_k = nn.ModuleList([inner, inner.__class__(language_model.config)]), 1

    language_model.layers[0].mlp = Block()
    assert layer_costs(language_model)[0] == plain[0]
    language_model.layers[0].mlp.top_k = 2
    assert layer_costs(language_model)[0].token == plain[0].token + matrices
    del language_model.layers[0].mlp.top_k
    assert "mlp.experts" in layer_costs(language_model)[0].missing[0]

    class Packed(nn.Module):
        in_features, out_features = 64, 96

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(64 * 96 // 2, 1, dtype=torch.uint8), requires_grad=False)

    language_model.layers[2].mlp.gate_proj = Packed()
    assert layer_costs(language_model)[2] == plain[2]
    wrapped = peft.get_peft_model(tiny.build(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    costs = layer_costs(wrapped.get_base_model().model.language_model)
    assert costs[0].token == plain[3].token + 2 * 2 * (64 + 64) and costs[0].pair == plain[3].pair


# ---------------------------------------------------------------------- the report
@torch.no_grad()
@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe", "kimi_k25", "qwen3_vl_moe", "apertus1p5"])
def test_kv_bytes_are_those_of_the_cache(name: str) -> None:
    """Hybrid layers, latent attention, experts, other heads: in half of the tokens, half of the bytes."""
    model = architectures.build(name)
    inputs = architectures.prompts(model, [[5, "0", 4]])
    stock = held_bytes(cache_of(model(**inputs, use_cache=True)))
    mm.compress(model, "uniform(keep=0.5)")
    cache = cache_of(model(**inputs, use_cache=True))
    found = mm.report(model)
    tensors = [x for layer in cache.layers for x in (getattr(layer, "keys", None), getattr(layer, "values", None))]
    assert found.kv_bytes == sum(x.numel() * x.itemsize for x in tensors if x is not None)
    assert found.full_kv_bytes == stock.now == stock.full
    length, left = inputs["input_ids"].shape[1], found.layers[0]
    assert found.kv_bytes * length == found.full_kv_bytes * left
    assert (stock.states > 0) == ("qwen3_5" in name) == any("of states" in note for note in found.notes)
    assert ("not in the FLOPs of the LLM layers: linear_attn" in str(found)) == ("qwen3_5" in name)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["uniform(keep=0.5)", "fastv(layer=2, keep=0.5)"])
def test_a_later_turn_pays_for_pairs_with_the_past(plan: str) -> None:
    """A picture in the second turn: FLOPs of the layers with and without compression, as torch counts them."""
    model = tiny.build()
    language_model = model.model.language_model
    one, two = (tiny.prompts(model, [[5, "image", 4]], seed=seed, mask=False) for seed in (0, 1))
    with by_torch(language_model) as stock:
        cache = cache_of(model(**one))
        first = stock["layers"]
        model(**two, **{CACHE: cache})
    mm.compress(model, plan)
    with by_torch(language_model) as made:
        cache = cache_of(model(**one))
        before = made["layers"]
        found = mm.report(model)
        assert found.full_flops == first and found.flops == before if "uniform" in plan else found.flops < first
        model(**two, **{CACHE: cache})
    found = mm.report(model)
    assert found.full_flops == stock["layers"] - first
    if "uniform" in plan:  # what cuts compute runs in hooks of layers, too
        assert found.flops == made["layers"] - before
    assert found.kv_bytes == held_bytes(cache).now and found.full_kv_bytes == 4 * 2 * 2 * 50 * 16 * 4


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@pytest.mark.parametrize("plan", ["divprune(keep=0.25)", "tome(keep=0.5)", "fastv(layer=1, keep=0.5)"])
def test_the_whole_prefill_is_the_number_of_bench(family: str, plan: str) -> None:
    model = families.build(family)
    inputs = families.prompts(model, family, [[5, families.image(family), 4]], mask=False)
    stock, made = count(model, inputs), count(model, inputs, plan)
    mm.compress(model, plan)
    model(**inputs)
    assert mm.report(model).prefill is None and "mm.report(model, inputs) counts it" in str(mm.report(model))
    found = mm.report(model, inputs)
    assert found.prefill == (made.total, stock.total)
    assert found.flops == made.flops["exact"]["full"] and found.full_flops == stock.flops["exact"]["full"]
    assert found.kv_bytes == made.kv_bytes and found.full_kv_bytes == stock.kv_bytes
    assert made.vision > 0 and made.total > made.vision + found.flops
    text = families.prompts(model, family, [[9]], mask=False)
    with pytest.raises(ValueError, match="no image or video"):
        mm.report(model, text)
    assert mm.trace(model).visuals and "_mmcompress_engine" in model.__dict__


def test_a_model_without_a_language_model_takes_no_inputs() -> None:
    timm = pytest.importorskip("timm")
    model = mm.compress(timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32).eval(), "tome", keep=0.5)
    model(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match="leave it out"):
        mm.report(model, {"x": torch.zeros(1)})


@torch.no_grad()
def test_without_a_cache_there_are_no_bytes() -> None:
    model = mm.compress(tiny.build(), "divprune(keep=0.5)")
    model(**tiny.prompts(model, tiny.RAGGED), use_cache=False)
    found = mm.report(model)
    assert (found.kv_bytes, found.full_kv_bytes) == (0, 0) and "KV cache  none" in str(found)


@torch.no_grad()
def test_a_padded_batch_and_half_precision() -> None:
    """FLOPs are of real tokens, bytes of what is stored."""
    model = mm.compress(tiny.build(dtype=torch.bfloat16), "uniform(keep=0.5)")
    out = model(**tiny.prompts(model, tiny.RAGGED))
    found = mm.report(model)
    alone = []
    for sample in tiny.RAGGED:
        model(**tiny.prompts(model, [sample]))
        alone.append(mm.report(model))
    assert found.flops == sum(one.flops for one in alone) and found.full_flops == sum(one.full_flops for one in alone)
    assert found.kv_bytes == 4 * 2 * (2 * 2 * 27 * 16) * 2 == held_bytes(cache_of(out)).now
    assert found.full_kv_bytes == 4 * 2 * (2 * 2 * 43 * 16) * 2


def test_milliseconds_are_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmcompress.runtime.engine import Engine

    ticks = iter(range(1000))
    monkeypatch.setattr(Engine, "_now", lambda self, device=None: float(next(ticks)))
    model = mm.compress(tiny.build(), "uniform(keep=0.5)", timing=True)
    model(**tiny.prompts(model, [[5, "image", 4]]))
    found = mm.report(model).milliseconds
    assert found["vision"] == 1000.0 and found["select"] == 1000.0 and found["language"] == 2000.0


@torch.no_grad()
def test_a_trace_outlives_its_model() -> None:
    """In a file it holds what its modules cost, not the modules."""
    model = mm.compress(tiny.build(), "uniform(keep=0.5)")
    model(**tiny.prompts(model, [[5, "image", 4]]))
    trace = mm.trace(model)
    file = pickle.dumps(trace)
    assert len(file) < 100_000 and str(pickle.loads(file).report()) == str(trace.report())


def test_operators_count_as_their_naive_implementations() -> None:
    """Greedy MAP: all products, then in step j of 3 an update of 6 rows by j earlier ones."""
    shapes = (2, 6, 4), (2, 6), 3
    assert OPERATORS[torch.ops.mmcompress.greedy_map](*shapes) == 2 * (2 * 6 * 6 * 4 + 3 * 3 * 6)


def test_a_unit_begins_at_one() -> None:
    assert [size(value) for value in (0, 1023, 1024, 2**20, 2**20 - 1, 2**30)] == [
        "0 B", "1023 B", "1.00 KiB", "1.00 MiB", "1024.00 KiB", "1.00 GiB",
    ]  # fmt: skip
    assert [flop(value) for value in (0, 999, 1000, 10**6, 999_999, 10**18)] == [
        "0 FLOP", "999 FLOP", "1.00 kFLOP", "1.00 MFLOP", "1000.00 kFLOP", "1000000.00 TFLOP",
    ]  # fmt: skip


def test_words_and_units() -> None:
    found = Report(
        plan="p", visuals=[(1, 0, "image", 16, 4)], layers=[13, 13, 11], full_tokens=25, flops=3_100_000, full_flops=6_200_000,
        prefill=(4_500_000_000, 9_000_000_000), kv_bytes=12_000, full_kv_bytes=25_600, milliseconds={"vision": 1.5},
        substitutes={"cls_attention": "received_attention", "clip_text": "text_embeddings"}, notes=["so it is"],
    )  # fmt: skip
    assert str(found).splitlines() == [
        "plan      p",
        "visual    image 1 of prompt 2: 4 of 16 tokens enter the LLM",
        "layers    13 from layer 0, 11 from layer 2 (of 25 tokens, text included)",
        f"FLOPs     {LLM}: 3.10 MFLOP of 6.20 MFLOP (50.0 %)",
        f"          {WHOLE}: 4.50 GFLOP of 9.00 GFLOP (50.0 %)",
        "KV cache  11.72 KiB of 25.00 KiB (46.9 %)",
        "time      vision 1.50 ms",
        "note      received_attention stands for cls_attention, which this model cannot give",
        "note      text_embeddings stands for clip_text, for which no clip= is given",
        "note      so it is",
    ]
    assert WHOLE == "whole prefill, vision included" and LLM == "LLM layers"
    assert Held() == Held(0, 0, 0) and LayerCost(2, 3).flops(5, 7) == 10 + 3 * 5 * 12


def test_the_counter_splits_a_prefill() -> None:
    """Vision before the language model, rotary tables, bytes; and one source for every command."""
    from mmcompress.eval.cost.latency import count_flops

    model = tiny.build()
    inputs = tiny.prompts(model, [[5, "image", 4]], mask=False)
    found = counted(model, inputs, model.model.language_model)
    assert found.total == count_flops(model, inputs) == count(model, inputs).total
    assert 0 < found.before < found.total and found.held == 4 * 2 * 2 * 25 * 16 * 4
