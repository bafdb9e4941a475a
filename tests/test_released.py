# SPDX-License-Identifier: Apache-2.0
"""The configurations of released checkpoints (assets/released.json, each with its source) at their real size, without weights.

What no source shows is left to the defaults of transformers.
"""

from __future__ import annotations

import functools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from mmcompress.adapters import adapter_for
from mmcompress.assets import released

from mmcompress.check import _class_of, check
from mmcompress.flops import layer_costs
from mmcompress.runtime.adapter import Adapter
from mmcompress.trace import Shape, kv_bytes

from .architectures import OLDEST, TABLE
from .exactness import PLANS

pytestmark = pytest.mark.skipif(OLDEST, reason="configs are in the form of the newest transformers")
RELEASED: dict[str, dict[str, Any]] = released()
HYBRID = ("Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-35B-A3B", "LiquidAI/LFM2-VL-1.6B", "openbmb/MiniCPM-V-4.6")
OTHERS = (*HYBRID, "Qwen/Qwen3-VL-30B-A3B-Instruct", "google/gemma-4-31B-it", "moonshotai/Kimi-K2.5")
"""Not a gated MLP and grouped queries in every layer."""
DENSE = [name for name in RELEASED if name not in OTHERS]
M_ROPE = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "paddleocr_vl")


def given(name: str) -> dict[str, Any]:
    return RELEASED[name]["config"]


def text_of(name: str) -> dict[str, Any]:
    """The language model's values as they were released: nested or flat, and what vicuna and mistral leave to their class."""
    config = given(name)
    text = config.get("text_config", config)
    usual = transformers.CONFIG_MAPPING[text.get("model_type", "qwen2_vl")]().to_dict()
    return {**usual, **usual.get("text_config", {}), **text}


@functools.cache
def empty(name: str) -> Any:
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        config = transformers.CONFIG_MAPPING[given(name)["model_type"]].from_dict(given(name))
        return _class_of(given(name))._from_config(config, dtype=torch.float32)


@functools.cache
def adapter_of(name: str) -> Adapter:
    found = adapter_for(empty(name))
    assert isinstance(found, Adapter)
    return found


@pytest.mark.parametrize("name", RELEASED)
def test_the_model_is_that_of_the_name(name: str) -> None:
    """Its size, its token ids, its heads."""
    model, adapter, text = empty(name), adapter_of(name), text_of(name)
    size = re.search(r"(\d+(?:\.\d+)?)B", name.upper().partition("/")[2])
    if size:
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(float(size[1]), rel=0.2)
    wanted = given(name).get("image_token_id", given(name).get("image_token_index", model.config.image_token_id))
    assert adapter.placeholders["image"] == wanted
    layers = adapter.language_model.layers
    assert len(layers) == text["num_hidden_layers"] and adapter.language_model.config.hidden_size == text["hidden_size"]
    if name in DENSE:
        width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        for layer in (layers[0], layers[-1]):
            assert layer.self_attn.head_dim == width
            assert layer.self_attn.q_proj.out_features == width * text["num_attention_heads"]
            assert layer.self_attn.k_proj.out_features == width * text["num_key_value_heads"]


@pytest.mark.parametrize("name", RELEASED)
def test_positions(name: str) -> None:
    assert adapter_of(name).reindexes == (given(name)["model_type"] not in M_ROPE)


def matrices(hidden: int, heads: int, kv: int, width: int, mlp: int) -> int:
    """Multiply-adds of a token: queries, keys, values, output, and a gated MLP of three matrices."""
    return hidden * (2 * heads + 2 * kv) * width + 3 * hidden * mlp


@pytest.mark.parametrize("name", DENSE)
def test_flops_and_cache_of_dense_models_by_hand(name: str) -> None:
    text = text_of(name)
    hidden, heads, kv = text["hidden_size"], text["num_attention_heads"], text["num_key_value_heads"]
    width, mlp = text.get("head_dim") or hidden // heads, text["intermediate_size"]
    costs, depth = layer_costs(adapter_of(name).language_model), text["num_hidden_layers"]
    assert {(c.token, c.pair, c.missing) for c in costs} == {
        (2 * matrices(hidden, heads, kv, width, mlp), 4 * heads * width, ())
    }
    n = 1000
    assert sum(c.flops(n) for c in costs) == depth * (
        2 * n * matrices(hidden, heads, kv, width, mlp) + 4 * n * n * heads * width
    )
    shape = Shape.of(adapter_of(name).language_model.config)
    assert kv_bytes(shape, [n] * depth) == 2 * 2 * n * depth * kv * width  # keys and values, of two bytes


def test_flops_of_experts_by_hand() -> None:
    costs = layer_costs(adapter_of("Qwen/Qwen3-VL-30B-A3B-Instruct").language_model)
    token = matrices(2048, 32, 4, 128, 8 * 768) + 2048 * 128  # 8 experts of 768, and the router of 128
    assert {(c.token, c.pair) for c in costs} == {(2 * token, 4 * 32 * 128)}


def test_flops_of_two_widths_of_heads_by_hand() -> None:
    """Gemma 4: heads of 256 in windows; of 512, with keys that are the values, everywhere else."""
    costs = layer_costs(adapter_of("google/gemma-4-31B-it").language_model)
    window = matrices(5376, 32, 16, 256, 21504)
    whole = 5376 * (2 * 32 + 4) * 512 + 3 * 5376 * 21504
    assert [c.token for c in costs[4:6]] == [2 * window, 2 * whole]
    assert [c.pair for c in costs[4:6]] == [4 * 32 * 256, 4 * 32 * 512]
    assert len(costs) == 60 and sum(c.pair == 4 * 32 * 512 for c in costs) == 10


def test_flops_of_latent_attention_by_hand() -> None:
    """Kimi: queries of rank 1536, keys and values of rank 512, heads of 128 + 64; first a dense layer, then 8 + 1 experts."""
    costs = layer_costs(adapter_of("moonshotai/Kimi-K2.5").language_model)
    attention = 7168 * 1536 + 1536 * 64 * 192 + 7168 * (512 + 64) + 512 * 64 * (128 + 128) + 64 * 128 * 7168
    dense, experts = 3 * 7168 * 18432, (8 + 1) * 3 * 7168 * 2048 + 7168 * 384
    assert [c.token for c in costs] == [2 * (attention + dense)] + 60 * [2 * (attention + experts)]
    assert {c.pair for c in costs} == {2 * 64 * (192 + 128)}


@pytest.mark.parametrize("name", HYBRID)
def test_layers_with_a_state_say_what_is_not_counted(name: str) -> None:
    costs, text = layer_costs(adapter_of(name).language_model), text_of(name)
    full = [i for i, kind in enumerate(text["layer_types"]) if kind == "full_attention"]
    assert [i for i, cost in enumerate(costs) if not cost.missing] == full
    width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    assert {costs[i].pair for i in full} == {4 * text["num_attention_heads"] * width}


def grid(rows: int, columns: int) -> torch.Tensor:
    return torch.tensor([[1, rows, columns]])


@pytest.mark.parametrize(
    ("name", "arguments", "tokens", "structural", "size"),
    [
        # 1008 x 756 pixels, patches of 14, two by two: 36 x 27
        ("Qwen/Qwen2-VL-2B-Instruct", {"image_grid_thw": grid(54, 72)}, 27 * 36, 0, (27, 36)),
        ("Qwen/Qwen2.5-VL-7B-Instruct", {"image_grid_thw": grid(54, 72)}, 27 * 36, 0, (27, 36)),
        ("zai-org/GLM-4.1V-9B-Thinking", {"image_grid_thw": grid(54, 72)}, 27 * 36, 0, (27, 36)),
        # 1024 x 768, patches of 16, two by two: 32 x 24
        ("Qwen/Qwen3-VL-2B-Instruct", {"image_grid_thw": grid(48, 64)}, 24 * 32, 0, (24, 32)),
        ("Qwen/Qwen3-VL-8B-Instruct", {"image_grid_thw": grid(48, 64)}, 24 * 32, 0, (24, 32)),
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", {"image_grid_thw": grid(48, 64)}, 24 * 32, 0, (24, 32)),
        ("Qwen/Qwen3.5-9B", {"image_grid_thw": grid(48, 64)}, 24 * 32, 0, (24, 32)),
        ("Qwen/Qwen3.5-35B-A3B", {"image_grid_thw": grid(48, 64)}, 24 * 32, 0, (24, 32)),
        # squares: 336 / 14; 448 / 14 / 2; 896 / 14 / 4; 224 / 14; 512 / 16 / 4; 364 / 14 / 2
        ("llava-hf/llava-1.5-7b-hf", {}, 576, 0, (24, 24)),
        ("OpenGVLab/InternVL3_5-8B-HF", {"pixel_values": torch.zeros(1, 3, 8, 8)}, 256, 0, (16, 16)),
        ("google/gemma-3-4b-it", {"pixel_values": torch.zeros(1, 3, 8, 8)}, 256, 0, (16, 16)),
        ("google/gemma-3-27b-it", {"pixel_values": torch.zeros(1, 3, 8, 8)}, 256, 0, (16, 16)),
        ("google/paligemma-3b-pt-224", {}, 256, 0, (16, 16)),
        ("HuggingFaceTB/SmolVLM2-500M-Video-Instruct", {"pixel_values": torch.zeros(1, 1, 3, 8, 8)}, 64, 0, (8, 8)),
        ("HuggingFaceM4/Idefics3-8B-Llama3", {"pixel_values": torch.zeros(1, 1, 3, 8, 8)}, 169, 0, (13, 13)),
        # a thumbnail of 24 x 24, four tiles of it laid together, a newline for each of 48 rows
        ("llava-hf/llava-v1.6-mistral-7b-hf", {"image_sizes": torch.tensor([[672, 672]])}, 576 + 48 * 48, 48, (24, 24)),
        # 640 x 480 in two tiles side by side (672 x 336: 24 x 32 of 24 x 48 are picture)
        ("llava-hf/llava-v1.6-mistral-7b-hf", {"image_sizes": torch.tensor([[480, 640]])}, 576 + 36 * 48, 36, (24, 24)),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", {"image_sizes": torch.tensor([[384, 384]])}, 2 * 729, 27, (27, 27)),
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", {"image_sizes": torch.tensor([[768, 768]])}, 729 + 54 * 54, 54, (27, 27)),
        # 1540 x 1120 pixels, patches of 14, two by two; patches of 16 alone
        ("mistralai/Mistral-Small-3.1-24B-Instruct-2503", {"image_sizes": torch.tensor([[1120, 1540]])}, 40 * 55, 0, (40, 55)),
        ("mistralai/Ministral-3-8B-Instruct-2512", {"image_sizes": torch.tensor([[1120, 1540]])}, 40 * 55, 0, (40, 55)),
        ("mistral-community/pixtral-12b", {"image_sizes": torch.tensor([[768, 1024]])}, 48 * 64, 0, (48, 64)),
    ],
)  # fmt: skip
def test_tokens_of_a_picture(
    name: str, arguments: dict[str, Any], tokens: int, structural: int, size: tuple[int, int]
) -> None:
    (layout,) = adapter_of(name).encoded("image", arguments, [tokens + structural]).layouts
    assert (layout.cells, len(layout.structural)) == (tokens, structural)
    assert tuple(layout.views[0].grid[-2:]) == size


@pytest.mark.parametrize("name", RELEASED)
def test_check_says_what_the_table_says(name: str, tmp_path: Path) -> None:
    """From a folder with config.json alone."""
    (tmp_path / "config.json").write_text(json.dumps(given(name)))
    asked = {kind: PLANS[kind].partition("(")[0] for kind in ("input", "layer", "signal", "encoder")}
    found = check(str(tmp_path), [*asked.values()])
    row = TABLE[given(name)["model_type"]]
    works = {kind: found.methods[plan] is None for kind, plan in asked.items()}
    assert works == {kind: row[kind] == "ok" for kind in asked}, found.methods
    assert found.works and "image" in found.modalities
